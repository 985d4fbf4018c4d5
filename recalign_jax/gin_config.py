"""gin in T5X's way: files, then `--gin.NAME=value` bindings, with errors a person can act on.

`NAME` is a macro that a gin file defines (`TRAIN_STEPS`) or a parameter of a configurable
(`T5Config.dropout_rate`). A value that is no Python literal, macro (`%X`), reference (`@x`) or container of these
is taken as a string, so no nested quotes are needed: `--gin.MODEL_DIR=/tmp/run`.
"""

import argparse
import ast
import os
import pathlib
import re
import sys
import tokenize
from collections.abc import Sequence

import gin
from gin import resource_reader

from recalign_jax.errors import InputError, did_you_mean

# Where gin_configs/ is: in the checkout, or in an installation without one where setup.py puts it.
_CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
PROJECT_ROOT = _CHECKOUT if (_CHECKOUT / "gin_configs").is_dir() else pathlib.Path(sys.prefix)
_BINDING = re.compile(r"^([\w./]+) = (.*)$", re.MULTILINE)
_INCLUDE = re.compile(r"^include '(.+)'", re.MULTILINE)
_UNDEFINED_MACRO = re.compile(r"No bindings specified for '(.+)/gin\.macro'")
_GIN_ERRORS = (ValueError, TypeError, SyntaxError, AttributeError, OSError, ImportError, tokenize.TokenError)

gin.add_config_file_search_path(str(PROJECT_ROOT))
# gin would look for a file as data of a package, too, and before that path; it fails where its folder is no package.
gin.config._FILE_READERS[:] = [
    reader for reader in gin.config._FILE_READERS if reader[0] is not resource_reader.system_path_reader
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--gin_file` (several) and documents `--gin.NAME=value`, which `bindings_of` picks up."""
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="a gin file; may be repeated")
    parser.epilog = "--gin.NAME=value overrides a macro or a parameter, as --gin.VOCABULARY=PATH"


def bindings_of(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Reads `--gin.NAME=value` and `--gin.NAME value` from what the argument parser left over.

    Raises:
      InputError: for anything else among `arguments`.
    """
    bindings, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--gin."):
            raise InputError(f"Unknown argument {argument!r}. Bindings have the form --gin.NAME=value.")
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"--gin.{name} needs a value: --gin.{name}=value.")
            value = rest.pop(0)
        bindings.append((name.strip(), value))
    return bindings


def parse(gin_files: Sequence[str], bindings: Sequence[tuple[str, str]]) -> None:
    """Clears gin, then reads the files in order and the bindings on top.

    Files are looked up as given and then from the project's root, as are the files they include.

    Raises:
      InputError: for a missing file, a gin error in a file, or a name that nothing defines.
    """
    gin.clear_config(clear_constants=True)
    for file in gin_files:
        if not _exists(file):
            raise InputError(
                f"gin file {file} is neither here nor below {PROJECT_ROOT}.{did_you_mean(file, known_files())}"
            )
        try:
            gin.parse_config_file(file, skip_unknown=False)
        except _GIN_ERRORS as error:
            raise InputError(f"gin file {file}: {_one_line(error)}") from error
    for name, value in bindings:
        _bind(name, value)
    try:
        # The checks of finalize without its lock: tasks that are imported later may bring configurables of their own.
        with gin.unlock_config():
            gin.finalize()
    except _GIN_ERRORS as error:
        undefined = _UNDEFINED_MACRO.match(str(error))
        message = _unknown(undefined[1], "it is used, but nothing defines it") if undefined else _one_line(error)
        raise InputError(message) from error


def known_files() -> list[str]:
    """The gin files of the project, relative to its root."""
    return sorted(str(path.relative_to(PROJECT_ROOT)) for path in (PROJECT_ROOT / "gin_configs").rglob("*.gin"))


def model_files(gin_files: Sequence[str]) -> list[str]:
    """Those of the files, and of what they include, that lie in a folder `models`."""
    found: list[str] = []
    for file in gin_files:
        path = pathlib.Path(file) if pathlib.Path(file).is_file() else PROJECT_ROOT / file
        if path.parent.name == "models":
            found.append(file)
        else:
            found += model_files(_INCLUDE.findall(path.read_text(encoding="utf-8")))
    return found


def required(name: str, value: object, example: str) -> str:
    """Returns the value of a macro that has no default, as text; raises InputError when it was not given.

    Empty text is what a shell makes of a variable that isn't set.
    """
    if value is None or value == "":
        raise InputError(f"{name} is needed: --gin.{name}={example}.")
    return str(value)  # a folder may be called 2024


def snapshot() -> dict[str, str]:
    """All macros and parameters now bound, with their values as text."""
    return dict(_BINDING.findall(gin.config_str(max_line_length=10**6)))


def _exists(file: str) -> bool:
    return pathlib.Path(file).is_file() or (PROJECT_ROOT / file).is_file()


def names() -> list[str]:
    """The names now bound: macros (`TRAIN_STEPS`) and parameters (`T5Config.dropout_rate`)."""
    return list(snapshot())


def _bind(name: str, value: str) -> None:
    is_macro = "." not in name
    if is_macro and name not in names():
        raise InputError(_unknown(name, "no gin file given defines it"))
    before = gin.query_parameter(f"%{name}") if is_macro else None
    try:
        gin.parse_config(f"{name} = {_literal(value, may_be_name=is_macro and isinstance(before, (str, type(None))))}")
    except _GIN_ERRORS as error:
        hint = "" if name in names() else did_you_mean(name, names())
        raise InputError(f"--gin.{name}={value}: {_one_line(error)}{hint}") from error
    if is_macro and not _same_kind(before, gin.query_parameter(f"%{name}")):
        raise InputError(f"--gin.{name}={value}: not a value of the kind that it replaces, {before!r}.")


def _same_kind(before: object, after: object) -> bool:
    """Whether a value may replace another: a number a number, a mapping a mapping; None and references anything."""
    kinds = ((bool, int, float), (dict,))
    kind = next((kind for kind in kinds if isinstance(before, kind)), None)
    return kind is None or isinstance(after, (*kind, type(None), gin.config.ConfigurableReference))


def _unknown(name: str, why: str) -> str:
    macros = [known for known in names() if "." not in known]
    return (
        f"Unknown gin name {name!r}: {why}.{did_you_mean(name, macros)} "
        f"Defined: {', '.join(macros) or 'none (give a --gin_file)'}."
    )


def _literal(value: str, may_be_name: bool) -> str:
    """A value as gin reads it; one that may be the name of a folder is a number only where it looks like that one."""
    text = value.strip()
    if text.startswith(("@", "%", "{", "[", "(")):
        return text
    if text.startswith("~"):  # a shell leaves it alone behind `--gin.NAME=`
        return repr(os.path.expanduser(text))
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return repr(value)
    # To Python the folder 2026_11_22 is the number 20261122, and 2026.10 is 2026.1.
    if may_be_name and isinstance(literal, (int, float, complex)) and str(literal) != text:
        return repr(value)
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
