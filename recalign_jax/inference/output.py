"""The one file of results, JSONL or Parquet, from the JSONL of chunks; a chunk at a time is in memory."""

import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import IO

FILES = {"jsonl": "recommendations.jsonl", "parquet": "recommendations.parquet"}


def path_of(output_dir: pathlib.Path, output_format: str) -> pathlib.Path:
    """Where the results of a job are."""
    return output_dir / FILES[output_format]


def write(path: pathlib.Path, output_format: str, chunks: Iterable[pathlib.Path]) -> None:
    """Writes the rows of chunks, in order.

    Args:
      path: of the file.
      output_format: one of FILES.
      chunks: files with a JSON object a line.
    """
    if output_format == "parquet":
        _write_parquet(path, chunks)
        return
    with path.open("wb") as file:
        concatenate(file, chunks)


def concatenate(file: IO[bytes], parts: Iterable[pathlib.Path]) -> None:
    """Writes files one after the other."""
    for part in parts:
        with part.open("rb") as source:
            shutil.copyfileobj(source, file)


def _write_parquet(path: pathlib.Path, chunks: Iterable[pathlib.Path]) -> None:
    """A row group a chunk."""
    import pyarrow
    from pyarrow import parquet

    texts, numbers = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float32())
    kinds = {"user": pyarrow.string(), "items": texts, "titles": texts, "scores": numbers, "ratings": numbers}
    kinds |= {"method": pyarrow.string(), "unknown_items": texts}
    writer = None
    for chunk in chunks:
        with chunk.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if not rows:
            continue
        schema = pyarrow.schema([(name, kinds[name]) for name in rows[0]])
        writer = writer or parquet.ParquetWriter(path, schema)
        writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    if writer is not None:
        writer.close()
