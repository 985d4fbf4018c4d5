"""What a checkpoint was trained on, held against what it is to be used for."""

from collections.abc import Mapping, Sequence
from typing import Any

from recalign_jax import gin_config, terminal
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError
from seqio_tasks.specs import TaskSpec
from seqio_tasks.vocabulary import Vocabulary

# What prompts look like: a checkpoint that was trained with others answers worse.
PROMPT_SETTINGS = ("HISTORY_LENGTH", "MAX_ITEM_TOKENS", "ITEM_FIELDS", "NEIGHBOURS", "RATING_HISTORY")


def task_fingerprints(specs: Sequence[TaskSpec]) -> dict[str, str]:
    """What the weights depend on: `vocabulary`, and of every corpus in the mixture its interactions and texts
    (`corpus`), which item has which number (`items`), and how items are written (`catalog`)."""
    found = {}
    for spec in specs:
        found["vocabulary"] = spec.vocabulary.fingerprint
        found[f"corpus {spec.corpus.name}"] = spec.corpus.fingerprint
        found[f"items {spec.corpus.name}"] = spec.corpus.numbering(spec.corpus.num_items)
        found[f"catalog {spec.corpus.name} {spec.catalog.item_format}"] = spec.catalog.fingerprint
    return found


def check_use(spec: TaskSpec, checkpoint_path: str, trained: Mapping[str, Any]) -> None:
    """Holds a checkpoint against a task that it is to answer; warns where it may answer worse.

    Args:
      spec: of the task.
      checkpoint_path: for messages.
      trained: identity of the checkpoint's run; empty where it wasn't trained here.

    Raises:
      InputError: when its answers would be none: another vocabulary, items written otherwise, (of formats that write
        numbers) other items with the same numbers, no tokens for new items, ratings that it was trained on.
    """
    corpus, item_format = spec.corpus, spec.catalog.item_format
    checkpoint = f"Checkpoint {checkpoint_path}"
    formats = {name.split()[-1] for name in trained if name.startswith("catalog ")}
    if trained.get("vocabulary", spec.vocabulary.fingerprint) != spec.vocabulary.fingerprint:
        raise InputError(f"{checkpoint} was trained with another vocabulary than {spec.vocabulary.path}.")
    if not formats and item_format != "token":
        terminal.warn(f"{checkpoint_path} was not trained here, so nothing tells whether it knows such prompts.")
        return
    if not formats:
        raise InputError(f"{checkpoint} was not trained here, so it has no item tokens.")
    if item_format not in formats:
        raise InputError(
            f"{checkpoint} was trained with items as {' and '.join(sorted(formats))}, "
            f"but {spec.name} has them as {item_format}."
        )
    bound = gin_config.snapshot()
    for name in PROMPT_SETTINGS:
        then, now = _in_force(trained, name), _in_force(bound, name)
        if None not in (then, now) and then != now:
            terminal.warn(f"{checkpoint_path} was trained with {name} {then}; here it is {now}.")
    if _has_another_random_split(spec, trained):
        raise InputError(
            f"{checkpoint} was trained on another state of {corpus.name}, of which the random split of ratings is "
            "another one: most of those held out now may be what it was trained on. Train anew."
        )
    if item_format != "title" and not _has_numbers_of(spec, trained):
        where = f"another catalogue than that of {corpus.directory}"
        raise InputError(f"{checkpoint} was trained on {where}: its item numbers are other items.")
    if item_format == "token" and (missing := corpus.num_items - _num_items(spec, trained)) > 0:
        raise InputError(
            f"{checkpoint} was trained before {corpus.name} was extended: it has no tokens for {missing} new items. "
            f"Train on from it with --gin.INITIAL_CHECKPOINT={checkpoint_path}."
        )
    same_catalog = trained.get(f"catalog {corpus.name} {item_format}") == spec.catalog.fingerprint
    if not same_catalog and trained.get(f"corpus {corpus.name}") not in _sizes_before(corpus):
        terminal.warn(f"{checkpoint_path} was trained on another catalogue than that of {corpus.directory}.")


def check_start(specs: Sequence[TaskSpec], vocabulary: Vocabulary, adapters: bool, trained: Mapping[str, Any]) -> None:
    """Holds a checkpoint against a run that is to start from it; warns of what it would have to unlearn.

    Args:
      specs: of the run's tasks.
      vocabulary: of the run.
      adapters: whether nothing but adapters of it is trained.
      trained: as of `check_use`.

    Raises:
      InputError: when it was trained with another vocabulary, as its embeddings would be of other pieces.
    """
    if trained.get("vocabulary", vocabulary.fingerprint) != vocabulary.fingerprint:
        raise InputError(f"it was trained with another vocabulary than {vocabulary.path}.")
    had_tokens = any(name.startswith("catalog ") and name.endswith(" token") for name in trained)
    for spec in {spec.corpus.name: spec for spec in specs if spec.catalog.item_format == "token"}.values():
        if adapters and (not had_tokens or _num_items(spec, trained) < spec.corpus.num_items):
            terminal.warn("Adapters don't train the embeddings of item tokens: start from a model that has them.")
        if had_tokens and not _has_numbers_of(spec, trained):
            terminal.warn(
                f"INITIAL_CHECKPOINT has tokens of other items than {spec.corpus.name}: its items start as those that "
                "had their numbers."
            )
    for spec in specs:
        if _has_another_random_split(spec, trained):
            terminal.warn(
                f"INITIAL_CHECKPOINT was trained on another state of {spec.corpus.name}, whose random split of ratings "
                "is another one: what is held out now may be what it was trained on."
            )


def _has_numbers_of(spec: TaskSpec, trained: Mapping[str, Any]) -> bool:
    """Whether the items that a checkpoint knows by number have the same numbers in a task's corpus.

    An extension leaves them as they are, so what has more items may have them too.
    """
    corpus = spec.corpus
    numbering = trained.get(f"items {corpus.name}")
    if numbering is None:  # nothing trained on it, or an earlier version did, which kept the fingerprints alone
        return trained.get(f"corpus {corpus.name}") in {corpus.fingerprint, *_sizes_before(corpus)}
    count = _num_items(spec, trained)
    return count <= corpus.num_items and corpus.numbering(count) == numbering


def _num_items(spec: TaskSpec, trained: Mapping[str, Any]) -> int:
    """How many items a checkpoint knows by number."""
    corpus = spec.corpus
    if numbering := trained.get(f"items {corpus.name}"):
        return int(numbering.split()[0])
    return _sizes_before(corpus).get(trained.get(f"corpus {corpus.name}"), corpus.num_items)


def _sizes_before(corpus: Corpus) -> dict[str | None, int]:
    """How many items a corpus had before each of its extensions, by its fingerprint then."""
    befores = [extension["before"] for extension in corpus.metadata.get("extensions", [])]
    return {before["fingerprint"]: before["items"] for before in befores}


def _has_another_random_split(spec: TaskSpec, trained: Mapping[str, Any]) -> bool:
    """Whether a task is of the random 8:1:1 split, which is drawn anew with every change of a corpus."""
    state = trained.get(f"corpus {spec.corpus.name}")
    return spec.family == "rating_random" and state not in (None, spec.corpus.fingerprint)


def _in_force(bound: Mapping[str, str], macro: str) -> str | None:
    """The value of an option of tasks, set by its macro or without it."""
    value = bound.get(f"TaskOptions.{macro.lower()}", f"%{macro}")
    return bound.get(value[1:]) if value.startswith("%") else value
