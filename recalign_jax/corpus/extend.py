"""More raw data joins a corpus that is there already: `recalign prepare --extend`.

Nothing in the corpus moves. Users and items keep their numbers, an item keeps its text (unless it had none), every
interaction stays, and of the same time it stays before a new one. New users and items get the next numbers, in a
seeded random order among themselves. The corpus' own k-core, tie rule and seed apply: a new user or item enters if
it is in the k-core of old and new interactions together. What k-core drops is not kept: it doesn't count in the next
extension, unless that one has it too.
"""

import dataclasses
import pathlib
import shutil

from recalign_jax import files
from recalign_jax.corpus import datasets, prepare, storage
from recalign_jax.corpus.assemble import assemble
from recalign_jax.corpus.build import Sequences
from recalign_jax.corpus.corpus import Corpus, load_corpus
from recalign_jax.corpus.records import ItemText
from recalign_jax.corpus.sources import rejects

# What a corpus decides once.
OF_THE_CORPUS = ("k_core", "tie_break", "seed")
SIZES = ("users", "items", "interactions")


def extend(
    input_dir: pathlib.Path, directory: pathlib.Path, options: prepare.PrepareOptions, beam_options: str = ""
) -> dict[str, int]:
    """Adds a folder of raw data to the corpus `directory` and returns what was counted.

    `corpus.json` gets one more entry in `extensions`; its `counts` are those of all raw data so far. If there is
    nothing new in the folder, the corpus stays as it is.

    Args:
      input_dir: the folder of raw data; its source need not be that of the corpus.
      directory: of the corpus.
      options: those of OF_THE_CORPUS are taken from the corpus instead.
      beam_options: see `prepare.prepare`.

    Returns:
      The counts of this folder alone; `users`, `items` and `interactions` are how many came in.

    Raises:
      InputError: for bad options or data, and when another command replaced the corpus meanwhile; then it stays as it
        was.
    """
    corpus = load_corpus(directory.name, directory.parent)
    before, texts = _read(corpus)
    of_the_corpus = {name: corpus.metadata["options"][name] for name in OF_THE_CORPUS}
    options = dataclasses.replace(options, **of_the_corpus)
    earlier = corpus.metadata.get("extensions", [])
    with files.scratch_directory(directory) as scratch:
        with (
            rejects.Rejects(options.on_error, scratch / "rejected.jsonl") as reject,
            prepare.open_source(input_dir, options, beam_options, scratch) as (source, reader),
        ):
            assembled = assemble(
                reader, reject, **of_the_corpus, before=before, texts_before=texts, extensions=len(earlier) + 1
            )
            provenance = prepare.provenance(source, options)
        state = assembled.state()
        sizes = {"users": corpus.num_users, "items": corpus.num_items, "interactions": corpus.num_interactions}
        counts = assembled.counts | {size: state[size] - sizes[size] for size in SIZES}
        if is_nothing(counts):
            return counts
        total = {name: corpus.metadata["counts"].get(name, 0) + n for name, n in assembled.counts.items()}
        extension = {**provenance, "counts": counts, "before": {"fingerprint": corpus.fingerprint, **sizes}}
        metadata = {
            **corpus.metadata,
            "name": corpus.name,
            "counts": total | state,
            "extensions": [*earlier, extension],
        }
        # Not by another extension either, whose data this one knows nothing of.
        with files.atomic_directory(directory, check=corpus.check_not_replaced) as aside:
            _append([directory / "rejected.jsonl", scratch / "rejected.jsonl"], aside / "rejected.jsonl")
            storage.write(aside, metadata, assembled.sequences, assembled.texts)
    return counts


def is_nothing(counts: dict[str, int]) -> bool:
    """Returns whether an extension with these counts leaves the corpus as it is."""
    return not any(counts[name] for name in (*SIZES, "items_given_text"))


def _read(corpus: Corpus) -> tuple[Sequences, list[ItemText]]:
    item_ids, texts = datasets.read_items(corpus.directory)
    user_ids = datasets.read_user_ids(corpus.directory)
    corpus.check_not_replaced()
    sequences = Sequences(corpus.user_offsets, corpus.items, corpus.timestamps, corpus.ratings, user_ids, item_ids)
    return sequences, texts


def _append(parts: list[pathlib.Path], whole: pathlib.Path) -> None:
    """Writes the parts that exist one after the other; nothing, if none does."""
    for part in parts:
        if part.exists():
            with part.open("rb") as source, whole.open("ab") as target:
                shutil.copyfileobj(source, target)
