"""The words of the prompts: all text that stands around the items of a sample.

A template is a tuple of literals and placeholders. White space stands between its parts and around the separator,
so that a prompt's tokens are the tokens of its parts, one after the other.
"""

HISTORY = "{history}"
# Between items; a token of its own needs nothing to tell it from its neighbours.
ITEM_SEPARATORS = {"title": ";", "token": ""}
MASKED_ITEM = "[masked item]"

TEMPLATES = {
    "retrieval": ("A user chose , in order :", HISTORY, ". Next item ?"),
    "mim": ("A user chose , in order :", HISTORY, ". Masked items ?"),
}


def literals() -> list[str]:
    """Every literal text that a vocabulary must be able to write."""
    parts = {part for template in TEMPLATES.values() for part in template if part != HISTORY}
    return [*sorted(parts), *filter(None, ITEM_SEPARATORS.values()), MASKED_ITEM]
