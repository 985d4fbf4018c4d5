"""Errors that are meant for the person at the terminal.

The command line prints the message alone (no traceback). A message says what is wrong, where (file and
line if there is one) and what to do about it.
"""

import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any


class RecalignError(Exception):
    """Base of the errors whose message is all that a user needs to see."""

    exit_status = 1

    def __init__(self, message: str):
        super().__init__(message)
        # gin appends "In call to configurable ..." to str(error); this is the message without that.
        self.message = message


class InputError(RecalignError):
    """Bad input: a file, a flag, a gin binding or a name. Exit status 2."""

    exit_status = 2


class RunError(RecalignError):
    """A run that started well and failed. Exit status 1."""


class Preempted(RecalignError):
    """A run that was told to leave (SIGTERM) and goes on with the same command. Exit status 75, EX_TEMPFAIL."""

    exit_status = 75
    nothing_to_save = "SIGTERM: left with nothing to save. The same command goes on."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known name nearest to `name` (gin hands anything), or an empty string."""
    by_folded = {one.casefold(): one for one in known}
    nearest = difflib.get_close_matches(str(name).casefold(), by_folded, n=1, cutoff=0.5)
    return f" Did you mean {by_folded[nearest[0]]!r}?" if nearest else ""


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises InputError when the value of a setting is none of those known."""
    known = list(known)
    if value not in known:
        raise InputError(f"{name} is {value!r}, not one of {', '.join(known)}.{did_you_mean(value, known)}")


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    dict: ((dict,), "a mapping"),
    tuple: ((tuple, list), "several values, as (1, 2)"),
    Sequence: ((tuple, list), "several values, as ('a', 'b')"),
    types.NoneType: ((types.NoneType,), "None"),
}


def check_kinds(options: Any) -> None:
    """Holds the fields of a dataclass against their annotations: settings come from gin, which takes any value.

    Text may be anything but None: a folder may be called 2024.

    Raises:
      InputError: names the field, its value and what it must be.
    """
    for name, annotation in typing.get_type_hints(type(options)).items():
        value = getattr(options, name)
        parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        kinds = [typing.get_origin(part) or part for part in parts]
        if any(kind not in _KINDS for kind in kinds) and value is not None:
            continue
        known = [_KINDS[kind] for kind in kinds if kind in _KINDS]
        allowed = tuple(one for types_of, _ in known for one in types_of)
        # Python counts True among the whole numbers.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            what = " or ".join(told for _, told in known) or "given"
            raise InputError(f"{type(options).__name__}.{name} is {value!r}: must be {what}.")


def check_least(options: Any, least: float, *names: str) -> None:
    """Raises InputError when one of the named fields of a dataclass is below `least`, or NaN."""
    for name in names:
        value = getattr(options, name)
        if not value >= least:
            raise InputError(f"{type(options).__name__}.{name} is {value}: must be at least {least}.")


def check_number(name: str, value: Any, whole: bool = False) -> None:
    """Raises InputError when the value of a setting isn't a finite number, or a whole one, of at least 0."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    told = "a whole number" if whole else "a number"
    if not is_number or value < 0 or (whole and value % 1):
        raise InputError(f"{name} is {value!r}: must be {told} of at least 0.")
