"""Streams the lines of a text file, plain or gzip, and decodes them strictly."""

import contextlib
import gzip
import io
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from recalign_jax import errors, terminal
from recalign_jax.corpus.records import RowError

# Longer lines are no rows but damage, and are not held in memory.
MAX_LINE_BYTES = 2 << 20
_SHOWN_BYTES = 1000
_LINES_BETWEEN_PROGRESS = 4096


def lines_of(path: pathlib.Path, watched: bool = True) -> Iterator[tuple[int, bytes | RowError]]:
    """Yields (number, line) for each line that is not blank, from 1.

    Args:
      path: a text file; gzip if its name ends in `.gz`.
      watched: show progress through the file.

    Raises:
      InputError: the file cannot be read, or is not gzip.
    """
    line = position = 0
    try:
        size = path.stat().st_size
        with (
            path.open("rb") as raw,
            _unpacked(path, raw) as stream,
            _progress(path, size, watched) as advance,
        ):
            for line, content in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), start=1):
                if line == 1:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                if line % _LINES_BETWEEN_PROGRESS == 0:
                    advance(raw.tell() - position)
                    position = raw.tell()
                if len(content) == MAX_LINE_BYTES and not content.endswith(b"\n"):
                    _skip_line(stream)
                    reason = f"is a line of more than {MAX_LINE_BYTES >> 20} MiB"
                    yield line, RowError(reason, printable(content[:_SHOWN_BYTES]))
                elif content.strip(b"\r\n"):
                    yield line, content
            advance(size - position)
    except (OSError, EOFError, zlib.error) as error:
        reached = f" after line {line}" if line else ""
        raise errors.InputError(f"{path} cannot be read{reached}: {error}.") from None


def decode(raw: bytes, encoding: str) -> str:
    """Returns a line as text; RowError if it isn't in this encoding or holds NUL."""
    if b"\0" in raw:
        raise RowError("holds a NUL byte")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"not {encoding.upper()}: byte {raw[error.start]:#04x} at {error.start}"
        raise RowError(reason) from None


def printable(raw: bytes) -> str:
    """Returns a line as text in which bytes that are not UTF-8 stand as escapes."""
    return raw.decode("utf-8", "backslashreplace").rstrip("\r\n")


def _unpacked(path: pathlib.Path, raw: IO[bytes]) -> IO[bytes]:
    # GzipFile reads lines in Python; BufferedReader does it in C.
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 17) if path.suffix == ".gz" else raw


def _progress(path: pathlib.Path, size: int, watched: bool) -> contextlib.AbstractContextManager[Callable[..., None]]:
    return terminal.progress(f"Reading {path.name}", size, "B") if watched else contextlib.nullcontext(lambda n: None)


def _skip_line(stream: IO[bytes]) -> None:
    while (part := stream.readline(MAX_LINE_BYTES)) and not part.endswith(b"\n"):
        pass
