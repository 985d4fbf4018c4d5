"""The words of the prompts: all text that stands around the items of a sample.

A template is a tuple of literals and placeholders. White space stands between its parts and around the separator,
so that a prompt's tokens are the tokens of its parts, one after the other.
"""

# What the placeholders stand for: a list of items each (of MLM, of their text with spans left out).
HISTORY, CANDIDATES, ITEM = "{history}", "{candidates}", "{item}"
PLACEHOLDERS = (HISTORY, CANDIDATES, ITEM)
SEPARATOR = ";"
MASKED_ITEM = "[masked item]"
RATED = ", rated"
NEIGHBOURS = ". Others with these also chose :"

_CHOSE = "A user chose , in order :"

# Of each family the last wording is held out: no training sample has it, unless a family has no other.
TEMPLATES: dict[str, tuple[tuple[str, ...], ...]] = {
    "retrieval": (
        (_CHOSE, HISTORY, ". Next item ?"),
        ("Items so far :", HISTORY, ". What comes next ?"),
        ("History :", HISTORY, ". The next item is"),
        ("In order of time :", HISTORY, ". Which item follows ?"),
    ),
    "ranking": (
        (_CHOSE, HISTORY, ". Choose one :", CANDIDATES, "."),
        ("Items so far :", HISTORY, ". Which comes next :", CANDIDATES, "?"),
        ("History :", HISTORY, ". Candidates :", CANDIDATES, ". Best one ?"),
        ("In order of time :", HISTORY, ". One of these follows :", CANDIDATES, "."),
    ),
    "rating": (
        ("A user rated , in order :", HISTORY, ". Rating of", ITEM, "?"),
        ("Rated so far :", HISTORY, ". How many stars for", ITEM, "?"),
        ("History :", HISTORY, ". Rate", ITEM, "."),
        ("In order of time :", HISTORY, ". What would", ITEM, "be rated ?"),
    ),
    "mim": (
        (_CHOSE, HISTORY, ". Masked items ?"),
        ("Items so far :", HISTORY, ". Which are masked ?"),
        ("History :", HISTORY, ". The masked items are"),
        ("In order of time :", HISTORY, ". Name what is masked ."),
    ),
    "mlm": (
        (_CHOSE, HISTORY, ". Missing words ?"),
        ("Items so far :", HISTORY, ". Which words are missing ?"),
        ("Fill in :", HISTORY, "."),
        ("In order of time :", HISTORY, ". Name what is missing ."),
    ),
    "bpr": (
        (_CHOSE, HISTORY, ". Which is preferred :", CANDIDATES, "?"),
        ("Items so far :", HISTORY, ". Which fits better :", CANDIDATES, "?"),
        ("History :", HISTORY, ". Prefer :", CANDIDATES, "?"),
        ("In order of time :", HISTORY, ". One of two follows :", CANDIDATES, "."),
    ),
}


def separator(item_format: str, with_fields: bool) -> str:
    """What stands between items; a token of its own without text needs nothing to tell it from its neighbours."""
    return "" if item_format == "token" and not with_fields else SEPARATOR


def literals() -> list[str]:
    """Every literal text that a vocabulary must be able to write."""
    parts = {
        part
        for wordings in TEMPLATES.values()
        for template in wordings
        for part in template
        if part not in PLACEHOLDERS
    }
    return [*sorted(parts), SEPARATOR, MASKED_ITEM, RATED, NEIGHBOURS]
