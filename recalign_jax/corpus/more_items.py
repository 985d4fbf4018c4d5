"""New items from a table, for a corpus that was prepared without them."""

import pathlib
from typing import Any

from recalign_jax import terminal
from recalign_jax.corpus.corpus import Corpus, with_items
from recalign_jax.corpus.sources import reading, tables
from recalign_jax.errors import InputError


def with_table(corpus: Corpus, path: pathlib.Path) -> Corpus:
    """The corpus with those items of a table that it lacks, in the order of the table; its own stay as they are.

    Raises:
      InputError: the table can't be read, at its first bad row, or if an item without a title is new.
    """

    def reject(path: pathlib.Path, line: int, row: Any, reason: str) -> None:
        del row
        raise InputError(f"{path}, row {line}: {reason}.")

    reading.check_ending(path)
    table = tables.items_table(path)
    found = list(reading.distinct_items(path, reading.parse_table(table, reject), reject))
    new = [item for item in found if item.item_id not in corpus.item_numbers]
    for item in new:
        if not item.text.title:
            raise InputError(f"{path}: item {item.item_id!r} is new and has no title to recommend it by.")
    terminal.say(f"{len(new)} new items, beside the {corpus.num_items} of {corpus.name}.")
    return with_items(corpus, new)
