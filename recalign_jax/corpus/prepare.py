"""Raw data in, one corpus on disk out, or nothing at all."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import recalign_jax
from recalign_jax import errors, files
from recalign_jax.corpus import build, storage
from recalign_jax.corpus.build import Interactions
from recalign_jax.corpus.records import Interaction, Item, ItemText, Reject, Source
from recalign_jax.corpus.sources import movielens, rejects, tables

# Opens a folder of raw data. A new source is one file in `sources/` and one row here.
SOURCES: dict[str, Callable[[pathlib.Path, Reject], Source]] = {
    "tables": tables.open_folder,
    "movielens": movielens.open_folder,
}


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What shapes a corpus; it goes into `corpus.json`.

    Attributes:
      source: one of SOURCES.
      k_core: keep only users and items with at least so many interactions; 0 keeps all, also items without any.
      tie_break: one of build.TIE_BREAKS, the order of a user's interactions with equal timestamps.
      seed: of the numbering of users and items, and of shuffled ties.
      on_error: one of rejects.ON_ERROR.
      columns: names of the columns of `tables`, by what they hold; those left out have their usual names.
    """

    source: str
    k_core: int = 0
    tie_break: str = "file"
    seed: int = 0
    on_error: str = "fail"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)


def prepare(input_dir: pathlib.Path, directory: pathlib.Path, options: PrepareOptions) -> tuple[dict[str, int], int]:
    """Builds the corpus `directory` from a folder of raw data.

    Returns:
      (counts of what was read, left out and kept; number of rejected rows).

    Raises:
      InputError: for bad options or data; then what stood at `directory` stays as it was.
    """
    with (
        files.atomic_directory(directory) as aside,
        rejects.Rejects(options.on_error, aside / "rejected.jsonl") as reject,
    ):
        source = _open(input_dir, options, reject)
        log, counts = _read_interactions(source.interactions, reject, options.k_core)
        texts, item_counts = _read_items(source.items, reject, log, options.k_core)
        sequences = build.sequences(log, texts, options.tie_break, options.seed)
        counts |= item_counts
        counts |= {"users": len(sequences.user_ids), "items": len(sequences.item_ids)}
        metadata = {
            "name": directory.name,
            "recalign_jax_version": recalign_jax.__version__,
            "options": dataclasses.asdict(options),
            "source_files": [_checksum(path) for path in source.files],
            "counts": counts,
        }
        storage.write(aside, metadata, sequences, [texts.get(item, ItemText()) for item in sequences.item_ids])
    return counts, reject.count


def _open(input_dir: pathlib.Path, options: PrepareOptions, reject: Reject) -> Source:
    open_folder = SOURCES[options.source]
    if options.columns:
        if options.source != "tables":
            flags = ", ".join(f"--{name}_column" for name in options.columns)
            raise errors.InputError(f"{flags} can be used with --source tables only.")
        open_folder = functools.partial(tables.open_folder, columns=tables.Columns(**options.columns))
    return open_folder(input_dir, reject)


def _read_interactions(
    stream: Iterable[Interaction], reject: rejects.Rejects, k: int
) -> tuple[Interactions, dict[str, int]]:
    """Returns the interactions to keep, and the counts of all that were read."""
    log = build.collect(stream)
    accepted = len(log.users)
    log = log.take(build.first_of_each_pair(log.users, log.items, log.timestamps))
    distinct = len(log.users)
    log = log.take(build.k_core(log.users, log.items, k))
    counts = {
        "interactions_read": accepted + reject.count,
        "interactions_rejected": reject.count,
        "interactions_repeated": accepted - distinct,
        "interactions_dropped_by_k_core": distinct - len(log.users),
        "interactions": len(log.users),
    }
    if not counts["interactions"]:
        reason = f" The last bad row: {reject.last}" if reject.last else ""
        raise errors.InputError(
            f"No interaction is left: {counts['interactions_read']} rows read, {reject.count} of them bad, "
            f"{counts['interactions_dropped_by_k_core']} dropped by --k_core {k}.{reason}"
        )
    return log, counts


def _read_items(
    stream: Iterable[Item], reject: rejects.Rejects, log: Interactions, k: int
) -> tuple[dict[str, ItemText], dict[str, int]]:
    """Returns the text of the items to keep (with a k-core: of those met), and the counts of all that were read."""
    rejected_before = reject.count
    met = {log.item_ids[number] for number in np.unique(log.items)}
    texts = {}
    accepted = 0
    for item in stream:
        accepted += 1
        if k == 0 or item.item_id in met:
            texts[item.item_id] = item.text
    rejected = reject.count - rejected_before
    return texts, {
        "items_read": accepted + rejected,
        "items_rejected": rejected,
        "items_dropped_by_k_core": accepted - len(texts),
        "items_never_met": len(texts.keys() - met),
        "items_not_in_table": len(met - texts.keys()),
    }


def _checksum(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
