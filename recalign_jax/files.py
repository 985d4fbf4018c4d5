"""Folders of this machine, and writing there that leaves nothing half-written: write aside, then rename."""

import contextlib
import ctypes
import fcntl
import glob
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator

from recalign_jax import terminal
from recalign_jax.errors import InputError

# In the names of what is written aside: some file systems keep locks to the machine that holds them.
_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())


def local_folder(name: str, folder: str) -> pathlib.Path:
    """Returns a setting as the folder that it must be. Raises InputError for a bucket's address."""
    if "://" in folder:
        raise InputError(f"{name} is {folder}: must be a folder that this machine has or mounts, not a bucket.")
    return pathlib.Path(folder)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(folder: pathlib.Path) -> None:
    """Waits until every file and folder below `folder`, and itself, would outlast a power cut."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _sync(path)


def _remove(folder: pathlib.Path) -> None:
    """Removes what was replaced; what won't go fails nothing, for what replaces it stands already.

    On NFS a folder isn't empty as long as another machine has a file of it open.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        terminal.warn(f"{folder} was replaced and could not be removed. Nothing needs it: remove it by hand.")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], aside_in: str | os.PathLike[str] | None = None) -> Iterator[pathlib.Path]:
    """Yields a path beside `path` to write to; it takes the name `path` when the block ends well.

    On an exception the file beside it is removed and what stood at `path` stays as it was. Where the file system has
    locks, what killed writers of `path` on this machine left beside it (`.NAME.partial.*`) is removed first.

    Args:
      path: of the file.
      aside_in: a folder of the same file system to write in, where a kill may leave what was written; None for the
        folder of `path`.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if aside_in is None:
        _remove_abandoned(target)
    aside, lock = _locked(target, pathlib.Path(aside_in or target.parent), _new_file)
    try:
        yield aside
        _sync(aside)
        aside.chmod(0o644)
        os.replace(aside, target)
        _sync(target.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], check: Callable[[], None] = lambda: None) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `path`; it replaces `path` when the block ends well.

    A directory that already stands at `path` is exchanged for the new one and then deleted, so that there is no moment
    at which a reader finds half of either. Where the system can't exchange two names at once (Linux can), there is one
    between two renames at which it lies in `.NAME.old.*` beside `path`. All files are on the disk before they take the
    name. What can't be deleted of the old directory is told of and stays, under a hidden name beside `path`. Where the
    file system has locks, what writers of `path` that were killed on this machine left beside it (`.NAME.partial.*`) is
    removed first.

    Args:
      path: of the directory.
      check: called when all is written, right before the exchange; may raise.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    aside, lock = _locked(target, target.parent, tempfile.mkdtemp)
    try:
        aside.chmod(0o755)
        yield aside
        _sync_all(aside)
        check()
        if target.is_dir() and _exchanged(aside, target):
            _sync(target.parent)
            _remove(aside)
            return
        old = None
        if target.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old / target.name)
        try:
            os.rename(aside, target)
        except BaseException:
            if old is not None:
                os.rename(old / target.name, target)
            raise
        _sync(target.parent)
        if old is not None:
            _remove(old)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def scratch_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `target`, to be removed at the end, or after a kill by `atomic_directory`."""
    scratch, lock = _locked(target, target.parent, tempfile.mkdtemp)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _new_file(prefix: str, dir: pathlib.Path) -> str:
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=dir)
    os.close(descriptor)
    return name


def _locked(target: pathlib.Path, folder: pathlib.Path, make: Callable[..., str]) -> tuple[pathlib.Path, int]:
    """Makes a file or directory in `folder`; a lock on it lasts as long as the descriptor, or this process, does."""
    while True:
        aside = pathlib.Path(make(prefix=f".{target.name}.partial.{_HOST}.", dir=folder))
        try:
            descriptor = _opened(aside)
        except FileNotFoundError:
            continue  # another writer took it for abandoned before it was locked
        with contextlib.suppress(OSError):  # no locks here: then nobody else gets one, and nothing is removed
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if aside.exists():
            return aside, descriptor
        os.close(descriptor)


def _opened(aside: pathlib.Path) -> int:
    """A descriptor to lock a file or directory by; NFS locks only files that may be written."""
    return os.open(aside, os.O_RDONLY if aside.is_dir() else os.O_RDWR)


def _remove_abandoned(target: pathlib.Path) -> None:
    for abandoned in target.parent.glob(f".{glob.escape(f'{target.name}.partial.{_HOST}')}.*"):
        with contextlib.suppress(OSError):
            descriptor = _opened(abandoned)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if abandoned.is_dir():
                    shutil.rmtree(abandoned, ignore_errors=True)
                else:
                    abandoned.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _exchanged(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Exchanges two names at once; False where the system or the file system can't (renameat2 of Linux)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and not renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)
