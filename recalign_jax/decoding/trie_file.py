"""A trie on disk, so that a nightly job over a large catalogue needn't build it again."""

import dataclasses
import json
import os
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from recalign_jax import terminal
from recalign_jax.decoding.trie import Trie
from recalign_jax.files import atomic_file

_ABOUT = "about"  # beside the arrays: the static fields and the fingerprint, as JSON


def save(trie: Trie, path: str | os.PathLike[str], fingerprint: str) -> None:
    """Writes a trie as one .npz file, whole or not at all.

    Args:
      trie: the catalogue.
      path: of the file.
      fingerprint: of what the trie was built from; `load` compares it.
    """
    values = {field.name: getattr(trie, field.name) for field in dataclasses.fields(trie)}
    about = {name: value for name, value in values.items() if isinstance(value, int)} | {"fingerprint": fingerprint}
    arrays = {name: np.asarray(value) for name, value in values.items() if name not in about}
    with atomic_file(path) as aside, aside.open("wb") as file:
        np.savez(file, **{_ABOUT: np.array(json.dumps(about))}, **arrays)  # type: ignore[arg-type]


def load(path: str | os.PathLike[str], fingerprint: str) -> Trie | None:
    """Reads a trie that `save` wrote.

    Returns:
      The trie; None if there is no such file, it is of something with another fingerprint, or (with a warning) it is
      damaged: then it is built again.
    """
    names = {field.name for field in dataclasses.fields(Trie)}
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file[_ABOUT]))
            if about.pop("fingerprint") != fingerprint:
                return None
            # Each array has a checksum, which reading it compares.
            arrays: dict[str, Any] = {name: jnp.asarray(file[name]) for name in names - set(about)}
            return Trie(**about, **arrays)
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, OSError) as error:
        terminal.warn(f"{os.fspath(path)} is no trie, or damaged ({error}): it is built again.")
        return None
