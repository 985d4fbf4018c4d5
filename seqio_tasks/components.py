"""What the trainer reads: the tasks of a mixture as samples by index, and their rates.

Tasks of prepared corpora are rendered sample by sample, and known by their names: they need neither SeqIO nor
TensorFlow, whose import takes seconds. A task that is SeqIO only is run through tf.data, an epoch
at a time, and that epoch is kept in memory: so its samples, too, are known by index, and a run resumes as exactly.
"""

import dataclasses
import pathlib
import threading
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from recalign_jax import terminal
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.errors import InputError, did_you_mean
from seqio_tasks import ambiguity, samples, specs, task_names, vocabulary
from seqio_tasks.specs import TaskOptions, TaskSpec
from seqio_tasks.writing import Limits, Sample

_FEATURES = ("inputs", "targets")
_KEPT_ROWS = 65_536  # rows of finished epochs of a SeqIO task; two epochs stay in any case


class Component(Protocol):
    """A task, as the trainer reads it."""

    @property
    def name(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    def num_examples(self, split: str) -> int: ...

    def render(self, split: str, index: int, epoch: int, seed: int, limits: Limits) -> Sample: ...

    def shortest_row(self) -> dict[str, int]: ...


@dataclasses.dataclass(frozen=True)
class CorpusTask:
    """A task over a prepared corpus."""

    spec: TaskSpec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def num_tokens(self) -> int:
        return self.spec.num_tokens

    def num_examples(self, split: str) -> int:
        return samples.num_examples(self.spec, split)

    def render(self, split: str, index: int, epoch: int, seed: int, limits: Limits) -> Sample:
        return samples.render(self.spec, split, index, epoch, seed, limits)

    def shortest_row(self) -> dict[str, int]:
        return samples.shortest_row(self.spec)


class SeqioTask:
    """Any other SeqIO task with token features `inputs` and `targets`.

    The seed of its preprocessors is made of the run's seed and the epoch. It lives in the process that registered it.
    """

    def __init__(self, task: Any, lengths: Mapping[str, int]):
        self.name: str = task.name
        self.num_tokens = max(task.output_features[feature].vocabulary.vocab_size for feature in _FEATURES)
        self._task = task
        self._lengths = dict(lengths)
        self._epochs: dict[tuple[str, int, int], list[Sample]] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()  # the threads of the shards ask for the same epoch

    def num_examples(self, split: str) -> int:
        if split not in self._task.splits:
            return 0
        if split not in self._counts:
            self._counts[split] = len(self._epoch(split, 0, 0))
        return self._counts[split]

    def render(self, split: str, index: int, epoch: int, seed: int, limits: Limits) -> Sample:
        rows = self._epoch(split, epoch if split == "train" else 0, seed)
        # Preprocessors may drop more from one epoch than from the one that was counted.
        inputs, targets = rows[index % len(rows)]
        return Sample(inputs[: limits.inputs], targets[: limits.targets])

    def shortest_row(self) -> dict[str, int]:
        return {"inputs": 1, "targets": 1}

    def __reduce__(self) -> Any:
        raise InputError(
            f"Task {self.name!r} is SeqIO's own and can't be read by worker processes: --gin.InputOptions.workers=0."
        )

    def _epoch(self, split: str, epoch: int, seed: int) -> list[Sample]:
        with self._lock:
            if (split, epoch, seed) not in self._epochs:
                rows = self._run(split, zlib.crc32(f"{seed} {epoch}".encode()))
                self._epochs[split, epoch, seed] = rows
                of_split = [key for key in self._epochs if key[0] == split]
                # The threads of all shards are at windows of their own, and a window lies in two epochs or, of a small
                # task, in many.
                while len(of_split) > 2 and sum(len(self._epochs[key]) for key in of_split) > _KEPT_ROWS:
                    del self._epochs[of_split.pop(0)]
            return self._epochs[split, epoch, seed]

    def _run(self, split: str, seed: int) -> list[Sample]:
        dataset = self._task.get_dataset(self._lengths, split, shuffle=False, num_epochs=1, seed=seed, use_cached=False)
        rows = [Sample(*(_tokens(row, name, self.name) for name in _FEATURES)) for row in dataset.as_numpy_iterator()]
        if not rows:
            raise InputError(f"Task {self.name!r} gives no {split} examples.")
        return rows


def _tokens(row: dict[str, np.ndarray], name: str, task: str) -> np.ndarray:
    tokens = row[name]
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(
            f"Task {task!r}: {name} must be token ids, a list of integers, not {tokens.dtype} {tokens.shape}."
        )
    return tokens.astype(np.int32)


def of_corpora(name: str, vocabulary_path: str, data_dir: str | pathlib.Path | None) -> list[tuple[Component, float]]:
    """The tasks of a task or mixture of prepared corpora with their mixing rates, which sum to one.

    What `seqio_tasks.register` registers under that name, with the options that gin holds; of several corpora there are
    mixtures as well.

    Args:
      name: of the task or mixture.
      vocabulary_path: of a SentencePiece model in T5's layout.
      data_dir: where corpora are.

    Raises:
      InputError: for an unknown name, a vocabulary that doesn't fit, or a corpus that gives no train examples.
    """
    parts, words, options = task_names.split_name(name, data_dir), vocabulary.load(vocabulary_path), TaskOptions()
    found: list[CorpusTask] = []
    for corpus in (load_corpus(corpus, data_dir) for corpus in parts.corpora):
        if parts.base == "all":
            specs.warn_of_ratings(corpus)
        for family in specs.families_in(parts.base, corpus):
            found.append(_corpus_task(specs.make_spec(corpus, family, parts.item_format, words, options)))
    return _with_shares(name, [(task, _rate(task)) for task in found])


def registered(name: str, lengths: Mapping[str, int] | None = None) -> list[tuple[Component, float]]:
    """The tasks of a task or mixture in the SeqIO registry with their mixing rates, which sum to one.

    Args:
      name: of the task or mixture.
      lengths: of a row, `{"inputs": L, "targets": T}`; tasks that are SeqIO only need it.

    Raises:
      InputError: for an unknown name, or a task without the features `inputs` and `targets`.
    """
    with terminal.quiet_libraries():
        import seqio

        from seqio_tasks.tasks import SampleSource

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise InputError(f"Unknown task or mixture {name!r}.{did_you_mean(name, known)}")
    provider = seqio.get_mixture_or_task(name)
    found: list[Component] = []
    tasks = list(seqio.get_subtasks(provider))
    for task in tasks:
        if isinstance(task.source, SampleSource):
            found.append(_corpus_task(task.source.spec))
            continue
        if not set(_FEATURES) <= set(task.output_features):
            raise InputError(
                f"Task {task.name!r} has no features inputs and targets: {', '.join(task.output_features)}."
            )
        terminal.say(f"Task {task.name} is read through tf.data: an epoch of it is kept in memory.")
        found.append(SeqioTask(task, lengths or {}))
    rates = [provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1.0 for task in tasks]
    return _with_shares(name, zip(found, rates, strict=True))


def _corpus_task(spec: TaskSpec) -> CorpusTask:
    ambiguity.warn_of_ambiguous_items(spec.corpus, spec.catalog, spec.vocabulary)
    return CorpusTask(spec)


def _rate(task: CorpusTask) -> float:
    """As `seqio.mixing_rate_num_examples`: examples, at most so many, to the power of 1 / temperature."""
    count, options = task.num_examples("train"), task.spec.options
    if options.mixture_maximum is not None:
        count = min(count, options.mixture_maximum)
    try:
        return float(count ** (1 / options.mixture_temperature))
    except OverflowError:
        raise InputError(
            f"MIXTURE_TEMPERATURE is {options.mixture_temperature}: {count} examples to the power of its inverse are "
            "no number. From 1 upwards tasks come nearer to equal parts; 1 is proportional."
        ) from None


def _with_shares(name: str, found: Iterable[tuple[Component, float]]) -> list[tuple[Component, float]]:
    """Tasks with their rates, by name: the rates as parts of their sum."""
    ordered = sorted(found, key=lambda pair: pair[0].name)
    total = sum(float(rate) for _, rate in ordered)  # in one order, that the last bit doesn't depend on who calls
    if not total > 0:
        raise InputError(f"{name} has no train examples: users may have too few interactions.")
    return [(component, float(rate) / total) for component, rate in ordered]
