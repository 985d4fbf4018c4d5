"""The values in the text of a config.gin, without importing or binding anything."""

import tokenize
from typing import Any, NamedTuple

from gin import config_parser


class _Macro(NamedTuple):
    name: str


class _Names(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        return f"@{scoped_configurable_name}" + ("()" if evaluate else "")

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


def values(text: str) -> dict[str, Any]:
    """Macros (`TRAIN_STEPS`) and parameters (`TrainOptions.train_steps`) by name; empty if the text is no gin.

    A parameter that is a macro has the macro's value; a reference is its text, as `@make_schedule()`.
    """
    found: dict[str, Any] = {}
    try:
        for statement in config_parser.ConfigParser(text, _Names()):
            if isinstance(statement, config_parser.BindingStatement):
                name = ".".join(filter(None, (statement.selector, statement.arg_name)))
                found[name] = statement.value
    except (SyntaxError, ValueError, tokenize.TokenError):
        return {}
    return {name: found.get(value.name) if isinstance(value, _Macro) else value for name, value in found.items()}


def parameters(of: dict[str, Any], configurable: str) -> dict[str, Any]:
    """The parameters of one configurable, as `TaskOptions`, by their own names."""
    return {name.partition(".")[2]: value for name, value in of.items() if name.startswith(f"{configurable}.")}
