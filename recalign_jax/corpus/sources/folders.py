"""Finds the files of a source in the folder that `--input` names."""

import pathlib
from collections.abc import Sequence

from recalign_jax import errors


def check(folder: pathlib.Path) -> None:
    """Raises InputError if this is not a folder."""
    if not folder.is_dir():
        raise errors.InputError(f"{folder} is not a folder. Give the folder that holds the raw data with --input.")


def names_in(folder: pathlib.Path) -> str:
    """Returns the first names in a folder, for a message."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"


def one_of(folder: pathlib.Path, names: Sequence[str], what: str) -> pathlib.Path:
    """Returns the one file of these names that the folder holds.

    Raises:
      InputError: there is none, or more than one; `what` names it in the message.
    """
    check(folder)
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise errors.InputError(f"{folder} holds {', '.join(path.name for path in found)}. Leave only one of them.")
    expected = f"Expected one of: {', '.join(names)}." if len(names) > 1 else f"Expected {names[0]}."
    raise errors.InputError(f"{folder} holds no {what}. {expected} Found: {names_in(folder)}.")


def plain_or_gzip(folder: pathlib.Path, name: str, what: str) -> pathlib.Path:
    """Returns the file of this name or, compressed, of this name and `.gz`. Raises InputError as `one_of`."""
    return one_of(folder, (name, f"{name}.gz"), what)
