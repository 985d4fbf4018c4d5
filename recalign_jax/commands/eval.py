"""`recalign eval`: evaluates a checkpoint on a held-out split."""

import argparse
import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin

from recalign_jax import gin_config, terminal
from recalign_jax.commands.common import EVALUATED, SHARES_SHOWN, load_model, make_evaluation
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.errors import InputError
from recalign_jax.evaluation import report, results
from recalign_jax.evaluation.results import Result
from recalign_jax.recommender import DecodingOptions
from seqio_tasks import ambiguity, specs, task_names
from seqio_tasks import vocabulary as vocabularies
from seqio_tasks.specs import TaskOptions, TaskSpec

USES_GIN = True

# Gin names that training and evaluation both have, and that needn't be the same.
OF_THE_COMMAND = ("MAX_EVAL_USERS", "MESH")
# What figures depend on beside the checkpoint, and `recalign report` tells evaluations apart by.
TOLD_OPTIONS = (
    *("filter_history", "num_beams", "scores", "length_penalty", "max_input_tokens"),
    *("history_length", "max_item_tokens", "item_fields", "neighbours", "rating_history", "evaluation_wording"),
    *("test_negatives", "candidate_seed"),
)
# Options that both have.
OF_BOTH = ("TaskOptions.", "T5Config.", "DecodingOptions.", "EvaluationOptions.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that an evaluation is stands in gin."""
    del parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates as gin says, and prints tables."""
    return eval_command(args.data_dir)


@gin.configurable("eval", module="recalign")
def eval_command(
    data_dir: str | None,
    task_name: str | None = None,
    split: str = "test",
    checkpoint_path: str | None = None,
    vocabulary: str | None = None,
    output_dir: str | None = None,
    mesh: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Evaluates every recommendation task that a name holds.

    Args:
      data_dir: where corpora are.
      task_name: a task or mixture.
      split: `validation` or `test`.
      checkpoint_path: MODEL_DIR, or one checkpoint in it.
      vocabulary: a SentencePiece model, see `vocabularies.find`.
      output_dir: gets `metrics.json`, and `FAMILY.parquet` with a row a user; None for neither.
      mesh: devices along each axis; None puts all along `data`.
    """
    task_name = gin_config.required("TASK_NAME", task_name, "movielens_retrieval_token")
    checkpoint_path = gin_config.required("CHECKPOINT_PATH", checkpoint_path, "DIR")
    vocabulary = vocabularies.find(gin_config.required("VOCABULARY", vocabulary, "PATH"), data_dir)
    results.check_split(split)
    folder = report.output_folder(None if output_dir is None else str(output_dir))  # it may be called 2024
    tasks = evaluated(task_name, vocabulary, data_dir)
    model = load_model(tasks[0], checkpoint_path, mesh, "EVAL_BATCH_SIZE")

    def found() -> Iterator[tuple[str, Result]]:
        for spec in tasks:
            result = make_evaluation(spec, split, model.graphdef, model.mesh, model.model_dir)(model.params)
            for share, told in SHARES_SHOWN.items():
                if (of_prompts := result.overall.get(share, 1)) < 1:
                    terminal.warn(f"{1 - of_prompts:.2%} of the prompts have no room for {told}. See MAX_INPUT_TOKENS.")
            yield f"{spec.name}, {split} split, step {model.step}", result

    given = (results.EvaluationOptions(), DecodingOptions(), TaskOptions())
    options = {name: value for one in given for name, value in dataclasses.asdict(one).items()}
    about = {"corpus": tasks[0].corpus.name, "tasks": [spec.name for spec in tasks], "split": split, "step": model.step}
    about |= {"model_dir": model.model_dir, "options": {name: options[name] for name in TOLD_OPTIONS}}
    told = report.publish(found(), tasks[0].corpus, about, folder)
    families = [spec.family for spec in tasks]
    command = baseline_command(tasks[0].corpus.name, families, split, data_dir, results.EvaluationOptions())
    terminal.say(f"Next to it: {command}")
    return told


def evaluation_command(gin_files: list[str], data_dir: str | None, checkpoint: str) -> list[str]:
    """What to type to evaluate what gin says was trained; empty for what recommends nothing, or isn't of a corpus."""
    trained = gin_config.snapshot()
    name = trained.get("train.mixture_or_task_name", "")
    name = trained.get(name.removeprefix("%"), name)
    try:
        parts = task_names.split_name(name.strip("'"), data_dir)
    except InputError:  # of a module of the user's own
        return []
    if not set(EVALUATED) & {*task_names.members(parts.base)}:
        return []
    files, settings = evaluation_settings(gin_files, trained)
    values = {"TASK_NAME": parts.of(parts.corpora[0], parts.base), "CHECKPOINT_PATH": checkpoint} | settings
    return [
        *("recalign", "eval", *(["--data_dir", data_dir] if data_dir else [])),
        *(f"--gin_file={file}" for file in files),
        *(f"--gin.{name}={value}" for name, value in values.items()),
    ]


def evaluation_settings(gin_files: Sequence[str], trained: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What an evaluation must be told so that model, prompts and decoding are those of a training.

    Clears what gin holds.

    Args:
      gin_files: of the training.
      trained: all that gin held then, from `gin_config.snapshot`.

    Returns:
      (gin files, settings that these don't have).
    """
    files = [*gin_config.model_files(gin_files), "gin_configs/runs/eval.gin"]
    gin_config.parse(files, [])
    here = gin_config.snapshot()
    found = {}
    for name, value in trained.items():
        # Without a macro, an option that these files don't bind.
        alone = name not in here and name.startswith(OF_BOTH) and not value.startswith("%")
        if alone or (here.get(name, value) != value and name not in OF_THE_COMMAND):
            found[name] = value.strip("'")
    return files, found


def baseline_command(
    corpus: str, families: list[str], split: str, data_dir: str | None, options: results.EvaluationOptions
) -> str:
    """What to type for a baseline on the same split, and of one family on that alone."""
    method = "mf" if families[0] in task_names.RATED_FAMILIES else "sasrec"
    command = ["recalign", "baseline", "--corpus", corpus, "--method", method, "--split", split]
    command += ["--family", families[0]] if len(families) == 1 else []
    command += ["--max_users", str(options.max_users)] if options.max_users else []
    if options.cutoffs != results.EvaluationOptions.cutoffs:
        command.append(f"--gin.EvaluationOptions.cutoffs={options.cutoffs}")
    command += ["--data_dir", data_dir] if data_dir else []
    return shlex.join(command)


def evaluated(name: str, vocabulary_path: str, data_dir: str | None) -> list[TaskSpec]:
    """The tasks of that name, or in the mixture of that name, that are evaluated.

    Raises:
      InputError: when there is no such task, none in it is evaluated, or it is of several corpora.
    """
    parts = task_names.split_name(name, data_dir)
    corpus = load_corpus(parts.corpora[0], data_dir)
    fitting = [f for f in EVALUATED if f in task_names.families(specs.can_be_rated(corpus))]
    if len(parts.corpora) > 1:
        raise InputError(f"TASK_NAME {name} is of several corpora; evaluate one at a time, as "
                         f"{parts.of(parts.corpora[0], parts.base)}.")  # fmt: skip
    # What the corpus can't give though it is named, `make_spec` says.
    families = [family for family in specs.families_in(parts.base, corpus) if family in EVALUATED]
    if not families:
        names = ", ".join(parts.of(corpus.name, family) for family in fitting)
        raise InputError(f"TASK_NAME {name} recommends nothing that could be evaluated. Give one of {names}, or a "
                         f"mixture, as {parts.of(corpus.name, 'all')}.")  # fmt: skip
    words, options = vocabularies.load(vocabulary_path), TaskOptions()
    found = [specs.make_spec(corpus, family, parts.item_format, words, options) for family in families]
    ambiguity.warn_of_ambiguous_items(corpus, found[0].catalog, words)
    return found
