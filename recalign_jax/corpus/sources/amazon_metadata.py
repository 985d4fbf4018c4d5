"""The items of the Amazon dumps. What pages of the shop left in them is dropped, by these rules:

- A title, brand or category that is a script (`<script`, `aPageStart`, `getTime(`) or a style sheet is no text: empty.
- Of other texts HTML tags go; entities are resolved as everywhere.
- A price of text is its number (`$12.99`), of a range the lower end. Text that isn't a price is none.
- Categories stand in the order of the dump, each once: of all paths in 2014, where an item may have several. An item
  of 2023 without any has its main category.
"""

import ast
import json
import re
from typing import Any

from recalign_jax.corpus import records
from recalign_jax.corpus.records import Item, ItemText, RowError
from recalign_jax.corpus.sources import reading
from recalign_jax.corpus.sources.lines import decode

# Python takes up to 500 bytes a byte of a literal. The longest published lines are far shorter.
_MAX_LITERAL_BYTES = 512 << 10
_TAG = re.compile(
    r"</?(?:a|b|big|br|center|div|em|font|h[1-6]|hr|i|img|input|li|ol|p|small|span|strong|sub|sup|t[dhr]|u|ul)\b[^<>]*>",
    re.IGNORECASE,
)
_PAGE_SOURCE = re.compile(r"<script|<style|aPageStart|getTime\(|^\s*[.#@][\w-][^{}]*\{", re.IGNORECASE)
_AMOUNT = r"\$?\s*([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)"
_PRICE = re.compile(rf"\s*(?:from\s+)?{_AMOUNT}\s*(?:-\s*{_AMOUNT}\s*)?", re.IGNORECASE)
_MOST_DIGITS = 30  # more are no price; float32 has 38


def item(row: reading.Row) -> Item:
    """Returns an item of 2014 (`categories`: paths) or 2018 (`category`: one path). Raises RowError."""
    column = "category" if "category" in row else "categories"
    return _item(row, "asin", "brand", column, row.get(column))


def item_2023(row: reading.Row) -> Item:
    """Returns an item of 2023. Raises RowError."""
    return _item(row, "parent_asin", "store", "categories", row.get("categories") or row.get("main_category"))


def object_or_literal(raw: bytes) -> reading.Row:
    """Returns the dictionary of a line: a JSON object or, if its first key is in single quotes, a Python literal.

    Raises:
      RowError: it is neither.
    """
    if not raw.lstrip().startswith(b"{'"):
        return reading.json_object(raw)
    if len(raw) > _MAX_LITERAL_BYTES:
        raise RowError(f"is a Python literal of more than {_MAX_LITERAL_BYTES >> 10} KiB")
    line = decode(raw, "utf-8").strip()
    try:
        row = _literal(line)
        if "\\" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise RowError(f"not a Python literal: {error}") from None
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise RowError(f"not a dictionary of named fields but {records.shown(row)}")
    return row


def _literal(line: str) -> Any:
    # Without escapes and double quotes it is JSON but for the quotes (and for None, True and False): much faster.
    if '"' not in line and "\\" not in line:
        try:
            return json.loads(line.replace("'", '"'))
        except ValueError:
            pass
    return ast.literal_eval(line)


def _item(row: reading.Row, id_column: str, brand_column: str, categories_column: str, categories: object) -> Item:
    text = ItemText(
        title=_text(row.get("title"), "title"),
        categories=_categories(categories, categories_column),
        brand=_text(row.get(brand_column), brand_column),
        price=_price(row.get("price")),
    )
    return Item(records.identifier(records.get(row, id_column), id_column), text)


def _text(value: object, column: str) -> str:
    if isinstance(value, str) and ("<" in value or "{" in value or "getTime" in value or "aPageStart" in value):
        value = "" if _PAGE_SOURCE.search(value) else _TAG.sub(" ", value)
    return records.text(value, column)


def _categories(value: object, column: str) -> tuple[str, ...]:
    if not value:
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        raise RowError(f"{column} must be a list of texts, not {records.shown(value)}")
    names = [name for path in paths for name in (path if isinstance(path, list) else [path])]
    cleaned = (_text(name, f"each of {column}") for name in names)
    return tuple(dict.fromkeys(name for name in cleaned if name))


def _price(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        match = _PRICE.fullmatch(value) if len(value) < 100 else None
        if match is None or len(match[1]) > _MOST_DIGITS:
            return None
        value = match[1].replace(",", "")
    return records.number(value, "price")
