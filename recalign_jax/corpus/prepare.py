"""Raw data in, one corpus on disk out, or nothing at all."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import recalign_jax
from recalign_jax import errors, files
from recalign_jax.corpus import beam, build, storage
from recalign_jax.corpus.assemble import Reader, assemble
from recalign_jax.corpus.build import Interactions
from recalign_jax.corpus.records import Item, Reject, Source
from recalign_jax.corpus.sources import amazon, movielens, reading, rejects, tables, yelp

# Opens a folder of raw data. A new source is one file in `sources/` and one row here.
SOURCES: dict[str, Callable[[pathlib.Path], Source]] = {
    "tables": tables.open_folder,
    "amazon": amazon.open_folder,
    "movielens": movielens.open_folder,
    "yelp": yelp.open_folder,
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
      rating_range: the lowest and the highest rating that `tables` may hold.
      runner: the Apache Beam runner that parses the raw data; None does it in this process.
    """

    source: str
    k_core: int = 0
    tie_break: str = "file"
    seed: int = 0
    on_error: str = "fail"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    rating_range: tuple[float, float] | None = None
    runner: str | None = None


def prepare(
    input_dir: pathlib.Path, directory: pathlib.Path, options: PrepareOptions, beam_options: str = ""
) -> dict[str, int]:
    """Builds the corpus `directory` from a folder of raw data and returns what was counted.

    Args:
      input_dir: the folder of raw data.
      directory: where the corpus will lie; it replaces one that lies there.
      options: what shapes the corpus.
      beam_options: flags for the runner, as one would write them on a command line.

    Raises:
      InputError: for bad options or data; then what stood at `directory` stays as it was.
    """
    with (
        files.atomic_directory(directory) as aside,
        rejects.Rejects(options.on_error, aside / "rejected.jsonl") as reject,
        open_source(input_dir, options, beam_options, aside) as (source, reader),
    ):
        assembled = assemble(reader, reject, options.k_core, options.tie_break, options.seed)
        counts = assembled.counts | assembled.state()
        metadata = {"name": directory.name, **provenance(source, options), "counts": counts}
        storage.write(aside, metadata, assembled.sequences, assembled.texts)
    return counts


@contextlib.contextmanager
def open_source(
    input_dir: pathlib.Path, options: PrepareOptions, beam_options: str, scratch: pathlib.Path
) -> Iterator[tuple[Source, Reader]]:
    """Yields the opened folder and how to read it. With a runner the rows are parsed by then, into files that are
    removed at the end from a folder in `scratch`."""
    source = _opened(input_dir, options)
    if options.runner is None:
        yield source, Reader(functools.partial(_interactions, source), functools.partial(_items, source))
        return
    with tempfile.TemporaryDirectory(prefix="beam_", dir=scratch) as folder:
        yield source, beam.parse(source, pathlib.Path(folder), options.runner, beam_options)


def provenance(source: Source, options: PrepareOptions) -> dict[str, Any]:
    """Returns what `corpus.json` says of where data comes from: code, options, files with checksums."""
    return {
        "recalign_jax_version": recalign_jax.__version__,
        "options": dataclasses.asdict(options),
        "source_files": [_checksum(path) for path in source.files],
    }


def _opened(input_dir: pathlib.Path, options: PrepareOptions) -> Source:
    if options.source == "tables":
        return tables.open_folder(input_dir, tables.Columns(**options.columns), options.rating_range)
    flags = [f"--{name}_column" for name in options.columns] + ["--rating_range"] * (options.rating_range is not None)
    if flags:
        raise errors.InputError(f"{', '.join(flags)} can be used with --source tables only.")
    return SOURCES[options.source](input_dir)


def _interactions(source: Source, reject: Reject) -> Interactions:
    rows = itertools.chain.from_iterable(reading.parse_table(table, reject) for table in source.interactions)
    return build.collect(interaction for _, interaction in rows)


def _items(source: Source, reject: Reject) -> Iterator[Item]:
    return reading.distinct_items(source.items.path, reading.parse_table(source.items, reject), reject)


def _checksum(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
