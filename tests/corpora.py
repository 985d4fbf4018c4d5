"""Corpora for the tests, made by the same command that a user types."""

import argparse
import atexit
import contextlib
import functools
import json
import pathlib
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from recalign_jax.commands import prepare, vocab
from recalign_jax.corpus.corpus import Corpus, load_corpus
from tests.shared_data import shared


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, writing fails once a file has so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def call(command: ModuleType, data_dir: pathlib.Path, *flags: str) -> dict[str, Any]:
    """Runs a command module as the command line does and returns its JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir")
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--data_dir", str(data_dir), *flags]))


def prepared(source: str, folder: pathlib.Path, data_dir: pathlib.Path, name: str, *flags: str) -> Corpus:
    """Prepares a corpus and opens it."""
    call(prepare, data_dir, "--source", source, "--input", str(folder), "--corpus", name, *flags)
    return load_corpus(name, data_dir)


@functools.cache
def shared_corpus(name: str) -> Corpus:
    """Returns the corpus of `../shared/data/NAME`, prepared once a test process; skips where it is not here.

    Other tests read it too: copy its directory before changing anything.
    """
    folder = shared(f"data/{name}")
    data_dir = pathlib.Path(tempfile.mkdtemp(prefix="recalign_corpora_"))
    atexit.register(shutil.rmtree, data_dir, ignore_errors=True)
    return prepared("movielens" if name == "movielens_100k" else "tables", folder, data_dir, name)


def write_tables(
    folder: pathlib.Path, interactions: Sequence[Sequence[object]], items: Sequence[Mapping[str, object]] = ()
) -> pathlib.Path:
    """Writes rows (user, item, timestamp[, rating]) and items as tables; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    header = ["user_id", "item_id", "timestamp", "rating"][: len(interactions[0]) if interactions else 3]
    lines = ["\t".join(map(str, row)) for row in [header, *interactions]]
    (folder / "interactions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return folder


def prepare_shop(
    folder: pathlib.Path,
    interactions: Sequence[Sequence[object]],
    items: Sequence[Mapping[str, object]],
    vocabulary_size: int,
) -> None:
    """Makes `folder` a data directory: the corpus `shop`, its vocabulary words.model, and its tables in raw."""
    write_tables(folder / "raw", interactions, items)
    call(prepare, folder, "--source", "tables", "--input", str(folder / "raw"), "--corpus", "shop")
    output = str(folder / "words.model")
    call(vocab, folder, "--corpus", "shop", "--size", str(vocabulary_size), "--output", output)


def corpus_in_memory(
    sequences: Sequence[Sequence[int]],
    num_items: int,
    ratings: Sequence[Sequence[float]] | None = None,
    timestamps: Sequence[Sequence[int]] | None = None,
) -> Corpus:
    """A corpus without files; its timestamps are the places of the interactions unless they are given."""
    lengths = [len(sequence) for sequence in sequences]
    return Corpus(
        name="small",
        directory=pathlib.Path(),
        metadata={},
        fingerprint="",
        num_items=num_items,
        user_offsets=np.cumsum([0, *lengths]),
        items=np.concatenate(sequences).astype(np.int32),
        timestamps=np.concatenate(timestamps or [np.arange(length) for length in lengths]),
        ratings=None if ratings is None else np.concatenate(ratings).astype(np.float32),
    )


def training_part(sequence: Sequence[int]) -> Sequence[int]:
    """Leave-one-out, said another way: all but the last two of three or more."""
    return sequence[:-2] if len(sequence) >= 3 else sequence
