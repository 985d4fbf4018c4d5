"""Parsing, cleaning and joining raw data on an Apache Beam runner: `recalign prepare --runner NAME`.

Each raw file is read in order by one worker, in batches of raw rows; the batches are spread over all workers, which
parse them. Items meet by id, so that of several rows the first stands. The results go into files of a folder, one
for each batch, and one process reads them back in the order of the raw files: what comes out is, record for record,
what `sources.reading` gives in one process, and so are the rows that are rejected.

The raw data and the folder must be reachable by all workers under the same path (a shared file system), and the
workers need this package installed. A batch that a runner repeats writes the same file again.
"""

import functools
import json
import pathlib
import shlex
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from recalign_jax import errors, files
from recalign_jax.corpus import build
from recalign_jax.corpus.assemble import Reader
from recalign_jax.corpus.build import Interactions
from recalign_jax.corpus.records import Interaction, Item, ItemText, Raw, Record, Reject, RowError, Source, Table
from recalign_jax.corpus.sources import reading

ROWS_A_BATCH = 20_000
_ITEM_FILES = 64  # the items of one must fit in a worker's memory
_ITEMS = "items"

Rows = list[tuple[int, Raw | RowError]]  # (line, row)
Batch = tuple[int, Rows]  # its number, and its rows
Rejected = list[tuple[int, Any, str]]  # (line, row, reason)


def parse(source: Source, folder: pathlib.Path, runner: str, options: str = "") -> Reader:
    """Parses all tables of a source into files in an empty folder; returns how to read them.

    Args:
      source: the opened raw data.
      folder: on a file system that the workers share.
      runner: a name that Beam knows: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, ...
      options: flags for it, as one would write them on a command line.

    Raises:
      InputError: Apache Beam isn't installed, or knows no such runner.
      RunError: the pipeline failed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        message = "--runner needs Apache Beam: `pip install -e '.[beam]'`. Without --runner it isn't needed."
        raise errors.InputError(message) from None
    try:
        pipeline = apache_beam.Pipeline(runner=runner, options=PipelineOptions(shlex.split(options)))
    except ValueError as error:
        raise errors.InputError(f"--runner {runner}: {error}") from None

    def batches(name: str, table: Table[Any]) -> Any:
        """A collection of the batches of a table, spread over the workers."""
        return (
            pipeline
            | f"Table {name}" >> apache_beam.Create([name])
            | f"Read {name}" >> apache_beam.FlatMap(functools.partial(_batches, folder, table))
            | f"Spread {name}" >> apache_beam.Reshuffle()
        )

    for number, table in enumerate(source.interactions):
        name = _name(number)
        write = functools.partial(_write_interactions, folder, name, table)
        _ = batches(name, table) | f"Parse {name}" >> apache_beam.Map(write)
    _ = (
        batches(_ITEMS, source.items)
        | "Parse items" >> apache_beam.FlatMap(functools.partial(_keyed_items, folder, source.items))
        | "Items of an id meet" >> apache_beam.GroupByKey()
        | "Keep the first of each id" >> apache_beam.Map(functools.partial(_write_items, folder, source.items))
    )
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:
        raise errors.RunError(f"The Beam pipeline failed on {runner}: {error}") from error
    read = functools.partial(_read_interactions, source, folder)
    return Reader(read, functools.partial(_read_items, source, folder))


def _name(number: int) -> str:
    return f"interactions-{number:02}"


# What the workers do.


def _batches(folder: pathlib.Path, table: Table[Any], name: str) -> Iterator[Batch]:
    number, batch = 0, []
    try:
        for row in table.rows():
            batch.append(row)
            if len(batch) == ROWS_A_BATCH:
                yield number, batch
                number, batch = number + 1, []
    except errors.InputError as error:
        # An error of a worker would reach nobody as what it is. What stands before it in the file comes first.
        with files.atomic_file(folder / f"{name}.failed") as path:
            path.write_text(error.message, encoding="utf-8")
    if batch:
        yield number, batch


def _write_interactions(folder: pathlib.Path, name: str, table: Table[Interaction], batch: Batch) -> None:
    number, rows = batch
    rejected: Rejected = []
    log = build.collect(interaction for _, interaction in _parsed(table, rows, rejected))
    arrays: dict[str, Any] = {
        field: np.frombuffer("\0".join(values).encode(), np.uint8) if isinstance(values, list) else values
        for field, values in log._asdict().items()
        if values is not None
    }
    with files.atomic_file(folder / f"{name}-{number:08}.npz", aside_in=folder) as path, path.open("wb") as file:
        np.savez(file, **arrays)
    _write_json(folder / f"{name}-{number:08}.rejected", rejected)


def _keyed_items(folder: pathlib.Path, table: Table[Item], batch: Batch) -> Iterator[tuple[int, tuple[int, Item]]]:
    number, rows = batch
    rejected: Rejected = []
    for line, item in _parsed(table, rows, rejected):
        yield zlib.crc32(item.item_id.encode()) % _ITEM_FILES, (line, item)
    _write_json(folder / f"{_ITEMS}-{number:08}.rejected", rejected)


def _write_items(folder: pathlib.Path, table: Table[Item], group: tuple[int, Iterable[tuple[int, Item]]]) -> None:
    number, items = group
    rejected: Rejected = []
    in_order = sorted(items, key=lambda entry: entry[0])
    distinct = reading.distinct_items(table.path, in_order, _rejecting(rejected))
    rows = [(item_id, t.title, t.categories, t.brand, t.price, dict(t.extra)) for item_id, t in distinct]
    _write_json(folder / f"{_ITEMS}-{number:02}.json", rows)
    _write_json(folder / f"{_ITEMS}-again-{number:02}.rejected", rejected)


def _parsed(table: Table[Record], rows: Rows, rejected: Rejected) -> Iterator[tuple[int, Record]]:
    return reading.parse_table(table._replace(rows=lambda: iter(rows)), _rejecting(rejected))


def _rejecting(rejected: Rejected) -> Reject:
    return lambda path, line, row, reason: rejected.append((line, row, reason))


def _write_json(target: pathlib.Path, rows: Sequence[Any]) -> None:
    with files.atomic_file(target, aside_in=target.parent) as path:
        path.write_text(json.dumps(rows, default=str), encoding="utf-8")


# What the one process reads.


def _read_interactions(source: Source, folder: pathlib.Path, reject: Reject) -> Interactions:
    """Returns all interactions that `parse` wrote, in the order of the raw files; bad rows go to `reject`."""
    return build.join(
        part
        for number, table in enumerate(source.interactions)
        for part in _parts(folder, _name(number), table, reject)
    )


def _read_items(source: Source, folder: pathlib.Path, reject: Reject) -> Iterator[Item]:
    """Yields each item that `parse` wrote once; bad rows, and items that are there twice, go to `reject`."""
    rejected = [entry for path in folder.glob(f"{_ITEMS}-*.rejected") for entry in _read_json(path)]
    _replay(source.items.path, sorted(rejected, key=lambda entry: entry[0]), reject)
    _check_complete(folder, _ITEMS)
    for path in sorted(folder.glob(f"{_ITEMS}-*.json")):
        for item_id, title, categories, brand, price, extra in _read_json(path):
            yield Item(item_id, ItemText(title, tuple(categories), brand, price, extra))


def _parts(folder: pathlib.Path, name: str, table: Table[Any], reject: Reject) -> Iterator[Interactions]:
    for path in sorted(folder.glob(f"{name}-*.npz")):
        _replay(table.path, _read_json(path.with_suffix(".rejected")), reject)
        with np.load(path, allow_pickle=False) as arrays:
            ids = {kind: arrays[kind].tobytes().decode().split("\0") for kind in ("user_ids", "item_ids")}
            yield Interactions(
                users=arrays["users"],
                items=arrays["items"],
                timestamps=arrays["timestamps"],
                ratings=arrays.get("ratings"),
                **(ids if len(arrays["users"]) else {"user_ids": [], "item_ids": []}),
            )
    _check_complete(folder, name)


def _replay(path: pathlib.Path, rejected: Iterable[tuple[int, Any, str]], reject: Reject) -> None:
    for line, row, reason in rejected:
        reject(path, line, row, reason)


def _check_complete(folder: pathlib.Path, name: str) -> None:
    failed = folder / f"{name}.failed"
    if failed.exists():
        raise errors.InputError(failed.read_text(encoding="utf-8"))


def _read_json(path: pathlib.Path) -> list[Any]:
    return json.loads(path.read_text(encoding="utf-8"))
