"""Streams the lines of a text file, plain or gzip, and decodes them strictly."""

import gzip
import pathlib
import zlib
from collections.abc import Iterator

from recalign_jax import errors, terminal
from recalign_jax.corpus.records import RowError

LINES_BETWEEN_PROGRESS = 4096


def lines_of(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) for each line that is not blank, from 1, showing progress through the file."""
    line = position = 0
    try:
        size = path.stat().st_size
        with (
            path.open("rb") as raw,
            gzip.open(raw) if path.suffix == ".gz" else raw as stream,
            terminal.progress(f"Reading {path.name}", size, "B") as advance,
        ):
            for line, content in enumerate(stream, start=1):
                if line == 1:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                if line % LINES_BETWEEN_PROGRESS == 0:
                    advance(raw.tell() - position)
                    position = raw.tell()
                if content.strip(b"\r\n"):
                    yield line, content
            advance(size - position)
    except (OSError, EOFError, zlib.error) as error:
        raise errors.InputError(f"{path} cannot be read after line {line}: {error}.") from None


def decode(raw: bytes, encoding: str) -> str:
    """Returns a line as text; RowError, with what can be shown of it, if it isn't in this encoding or holds NUL."""
    if b"\0" in raw:
        raise RowError("holds a NUL byte", printable(raw))
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"not {encoding.upper()}: byte {raw[error.start]:#04x} at {error.start}"
        raise RowError(reason, printable(raw)) from None


def printable(raw: bytes) -> str:
    """Returns a line as text in which bytes that are not UTF-8 stand as escapes."""
    return raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
