"""The files of a corpus: how they are written, and read without TensorFlow.

    corpus.json      name, sources with checksums, options, counts, fingerprint, versions; `extensions`: the same of
                     each folder that was added later, and what the corpus was before
    arrays/*.npy     the sequences as flat integer arrays: memory-mapped, they are what training reads
    items/, users/   TFDS datasets in array_record files, one split `full`, record i is item (user) i
    rejected.jsonl   rows left out, with --on_error skip

Item text and source ids stand in the TFDS datasets alone. The sequences stand in both forms: `users` is for
programs that know TFDS and nothing of us, and a record a user could not be memory-mapped.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recalign_jax import errors
from recalign_jax.corpus import datasets
from recalign_jax.corpus.build import Sequences
from recalign_jax.corpus.records import ItemText

FORMAT_VERSION = 1


def write(
    directory: pathlib.Path, metadata: Mapping[str, Any], sequences: Sequences, texts: Sequence[ItemText]
) -> None:
    """Writes all files of a corpus, its fingerprint among them, into an empty directory.

    Args:
      directory: should be the one that `files.atomic_directory` yields.
      metadata: what `corpus.json` holds besides the fingerprint and the format version.
      sequences: the numbered interactions.
      texts: the text of each item, [I].

    Raises:
      RunError: when it can't be written.
    """
    arrays = {"user_offsets": sequences.offsets, "items": sequences.items, "timestamps": sequences.timestamps}
    if sequences.ratings is not None:
        arrays["ratings"] = sequences.ratings
    fingerprint = _fingerprint(arrays, sequences.item_ids, texts)
    complete = {**metadata, "fingerprint": fingerprint, "format_version": FORMAT_VERSION}
    try:
        (directory / "arrays").mkdir()
        for name, values in arrays.items():
            np.save(directory / "arrays" / f"{name}.npy", values)
        datasets.write_items(directory / "items", metadata["name"], sequences.item_ids, texts)
        datasets.write_users(directory / "users", metadata["name"], sequences)
        (directory / "corpus.json").write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:  # array_record has the latter for all that the system says
        reason = str(error).split(";")[0]
        raise errors.RunError(f"{directory} can't be written ({reason}). See that there is room.") from error


def read_metadata(directory: pathlib.Path) -> dict[str, Any]:
    """Returns `corpus.json`. Raises InputError if it is not there, damaged, or of another format version."""
    path = directory / "corpus.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise errors.InputError(f"{path} cannot be read ({error!r}). Prepare the corpus again.") from None
    if version != FORMAT_VERSION:
        raise errors.InputError(f"{path}: format version {version}, expected {FORMAT_VERSION}. Prepare it again.")
    return metadata


def read_array(directory: pathlib.Path, name: str) -> np.ndarray:
    """Returns a memory-mapped, read-only array of a corpus. Raises InputError if it cannot be read."""
    path = directory / "arrays" / f"{name}.npy"
    try:
        # A plain view of the map: slicing `np.memmap` itself is several times slower.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise errors.InputError(f"{path} cannot be read ({error}). Prepare the corpus again.") from None


def _fingerprint(arrays: Mapping[str, np.ndarray], item_ids: Sequence[str], texts: Sequence[ItemText]) -> str:
    digest = hashlib.sha256()
    for name, values in arrays.items():
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    for item_id, text in zip(item_ids, texts, strict=True):
        price = None if text.price is None else datasets.price_of_record(text.price)
        fields = [item_id, text.title, text.categories, text.brand, price, sorted(text.extra.items())]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()
