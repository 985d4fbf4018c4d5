"""The corpora that runs and evaluations are of, if they can be found, and the prompts that a run was trained on."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from recalign_jax.corpus.corpus import Corpus, data_dir_or_default, load_corpus
from recalign_jax.errors import InputError
from recalign_jax.reporting import gin_text
from recalign_jax.reporting.runs import FAMILIES, Evaluation, Run
from seqio_tasks import samples, specs, task_names, vocabulary
from seqio_tasks.specs import TaskOptions
from seqio_tasks.writing import Limits

_COMPARED_ROWS = 200


class Samples(NamedTuple):
    """Some training samples of one task, each with `index`, `inputs`, `targets` and their token counts."""

    task: str
    examples: int
    shown: list[dict[str, Any]]


def load(
    runs: Iterable[Run], evaluations: Iterable[Evaluation], named: Iterable[str], data_dir: str | None
) -> tuple[dict[str, Corpus], list[str]]:
    """Loads the corpora of runs and evaluations, and others by name; says why others can't be had or have changed.

    Where there are several of one name, it is enough that one of them is there.
    """
    used: dict[str, set[str]] = {name: set() for name in named}
    for run in runs:
        for name, fingerprint in run.corpora.items():
            used.setdefault(name, set()).add(fingerprint)
    for evaluation in evaluations:
        if told := evaluation.told.get("corpus"):
            evaluated = fingerprint_of(evaluation, told)
            used.setdefault(told, set()).update([evaluated] if evaluated else [])
    found, missing = {}, []
    for name, fingerprints in sorted(used.items()):
        try:
            corpus = load_corpus(name, data_dir)
        except InputError as error:
            missing.append(error.message)
            continue
        if not fingerprints or corpus.fingerprint in fingerprints:
            found[name] = corpus
        else:
            where = data_dir_or_default(data_dir)
            missing.append(f"Corpus {name} in {where} is none of those that were trained on or evaluated.")
    return found, missing


def fingerprint_of(evaluation: Evaluation, name: str) -> str:
    """Of the corpus of that name that it was made on, or else its run; "" where nothing says it."""
    of_run = evaluation.run.corpora.get(name, "") if evaluation.run else ""
    return evaluation.told.get("fingerprint", of_run)


def corpus_of(one: Run | Evaluation, corpora: dict[str, Corpus]) -> str:
    """The name of the corpus that a run or evaluation is of; "" where nothing says it, or it is several.

    Where an evaluation doesn't name it, it is that of its run, or the one whose users and targets it has.
    """
    if isinstance(one, Evaluation) and "corpus" in one.told:
        return one.told["corpus"]
    run = one if isinstance(one, Run) else one.run
    if run is not None and len(run.corpora) == 1:
        return next(iter(run.corpora))
    fitting = [name for name, corpus in corpora.items() if isinstance(one, Evaluation) and is_of(one, corpus)]
    return fitting[0] if len(fitting) == 1 else ""


def is_of(evaluation: Evaluation, corpus: Corpus) -> bool:
    """Whether the first rows of an evaluation are the corpus's users with their targets."""
    for family in FAMILIES:
        if family in evaluation.told:
            rows = user_rows(evaluation, family, ("user", "target"))[:_COMPARED_ROWS]
            users = corpus.evaluation_users[: len(rows)]
            if not (split := evaluation.told.get("split")):
                return False
            targets = corpus.targets(split)[: len(rows)]
            there = [
                {"user": corpus.user_source_id(user), "target": corpus.item_source_id(target)}
                for user, target in zip(users, targets, strict=True)
            ]
            return bool(rows) and rows == there
    return False


def user_rows(evaluation: Evaluation, family: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of FAMILY.parquet; none if there is no such file, or it can't be read."""
    import pyarrow
    from pyarrow import parquet

    path = evaluation.folder / f"{family}.parquet"
    try:
        return parquet.read_table(path, columns=list(columns)).to_pylist()
    except (OSError, pyarrow.ArrowInvalid):
        return []


def prompts(run: Run, data_dir: str | None, corpora: dict[str, Corpus]) -> list[Samples]:
    """Training samples of every task of a run's mixture, as its first epoch has them.

    They are those at a third and two thirds of the examples, with the run's seed and lengths.

    Raises:
      InputError: when the mixture, its corpus or its vocabulary can't be had, or isn't that of the run.
    """
    if run.values.get("train.mixture_or_task_module"):
        raise InputError(f"{run.mixture} comes from a module of its own, which is not run for a report.")
    parts = task_names.split_name(run.mixture, data_dir)
    lacking = {
        name
        for name in parts.corpora
        if name not in corpora or run.corpora.get(name, corpora[name].fingerprint) != corpora[name].fingerprint
    }
    if lacking:
        raise InputError(f"Corpus {', '.join(sorted(lacking))} can't be had as it was.")
    words = vocabulary.load(vocabulary.find(run.values.get("train.vocabulary") or "", data_dir))
    if run.identity.get("vocabulary", words.fingerprint) != words.fingerprint:
        raise InputError(f"Vocabulary {words.path} is not the one that {run.name} was trained with.")
    options = TaskOptions(**gin_text.parameters(run.values, "TaskOptions"))
    lengths = run.values["InputOptions.task_feature_lengths"]
    limits = Limits(lengths["inputs"], lengths["targets"])
    tasks = [
        specs.make_spec(corpora[name], family, parts.item_format, words, options)
        for name in parts.corpora
        for family in specs.families_in(parts.base, corpora[name])
    ]
    return [_samples(spec, run.values["TrainOptions.seed"], limits) for spec in tasks]


def _samples(spec: specs.TaskSpec, seed: int, limits: Limits) -> Samples:
    count = samples.num_examples(spec, "train")
    shown = []
    for index in sorted({count // 3, 2 * count // 3}):
        sample = samples.render(spec, "train", index, seed=seed, limits=limits)
        texts = {"inputs": spec.vocabulary.decode(sample.inputs), "targets": spec.vocabulary.decode(sample.targets)}
        lengths = {"input_tokens": len(sample.inputs), "target_tokens": len(sample.targets)}
        shown.append({"index": index, **texts, **lengths})
    return Samples(spec.name, count, shown)
