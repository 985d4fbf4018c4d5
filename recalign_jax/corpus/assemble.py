"""The one way from raw records to a corpus, whoever parsed them and whatever was there before."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recalign_jax import errors, terminal
from recalign_jax.corpus import build
from recalign_jax.corpus.build import Interactions, Sequences
from recalign_jax.corpus.records import Item, ItemText, Reject
from recalign_jax.corpus.sources import rejects

_NO_TEXT = ItemText()
_ANOTHER_UNIT = 100  # so many times as large: no years between two deliveries make that


class Reader(NamedTuple):
    """How an opened source is read. Both may be called once, interactions first; bad rows go to the argument."""

    interactions: Callable[[Reject], Interactions]
    items: Callable[[Reject], Iterator[Item]]  # each item once


class Assembled(NamedTuple):
    """A corpus before it is written.

    Attributes:
      sequences: users, items and interactions.
      texts: the text of each item, [I].
      counts: of the raw rows, by what became of them.
    """

    sequences: Sequences
    texts: list[ItemText]
    counts: dict[str, int]

    def state(self) -> dict[str, int]:
        """Returns the counts of what the corpus holds."""
        occurrences = np.bincount(self.sequences.items, minlength=len(self.texts))
        return {
            "interactions": len(self.sequences.items),
            "users": len(self.sequences.user_ids),
            "items": len(self.sequences.item_ids),
            "items_never_met": int((occurrences == 0).sum()),
            "items_without_text": sum(text.is_empty for text in self.texts),
        }


def assemble(
    reader: Reader,
    reject: rejects.Rejects,
    k_core: int,
    tie_break: str,
    seed: int,
    before: Sequences = build.EMPTY,
    texts_before: Sequence[ItemText] = (),
    extensions: int = 0,
) -> Assembled:
    """Reads all raw data and joins it with the corpus that was there before.

    Args:
      reader: how the raw data is read.
      reject: takes the bad rows.
      k_core: keep users and items with at least so many interactions; 0 keeps all, also items without any.
      tie_break: one of build.TIE_BREAKS.
      seed: not negative.
      before: the corpus so far, all of which stays.
      texts_before: the text of its items, [I]; an item without any text gets that of the raw data.
      extensions: see `build.sequences`.

    Raises:
      InputError: no interaction is left, or only those of the corpus or only the new ones have ratings.
    """
    known = len(before.items)
    log = reader.interactions(reject)
    rejected, accepted = reject.count, len(log.users)
    if known:
        log = _after(before, log)
    log = log.take(build.first_of_each_pair(log.users, log.items, log.timestamps, known))
    distinct = len(log.users) - known
    # What is in the corpus is a k-core, so it is part of the largest one.
    log = log.take(build.k_core(log.users, log.items, k_core))
    counts = {
        "interactions_read": accepted + rejected,
        "interactions_rejected": rejected,
        "interactions_repeated": accepted - distinct,
        "interactions_dropped_by_k_core": known + distinct - len(log.users),
    }
    if not len(log.users):
        reason = f" The last bad row: {reject.last}" if reject.last else ""
        dropped = f", {distinct} dropped by --k_core {k_core}" if k_core else ""
        raise errors.InputError(
            f"No interaction is left: {accepted + rejected} rows read, {rejected} of them bad{dropped}.{reason}"
        )
    met = {log.item_ids[number] for number in np.unique(log.items)}
    texts, new_texts, item_counts = _join_items(
        reader.items(reject), before.item_ids, texts_before, met if k_core else None
    )
    counts["items_read"] = sum(item_counts.values()) + len(new_texts) + reject.count - rejected
    counts["items_rejected"] = reject.count - rejected
    sequences = build.sequences(log, new_texts, tie_break, seed, before, extensions)
    texts += [new_texts.get(item_id, _NO_TEXT) for item_id in sequences.item_ids[len(texts) :]]
    return Assembled(sequences, texts, counts | item_counts)


def _after(before: Sequences, log: Interactions) -> Interactions:
    if len(log.users) and (before.ratings is None) != (log.ratings is None):
        difference = "has no ratings, but" if before.ratings is None else "has ratings, and"
        such = "have some: leave that column out" if before.ratings is None else "have none"
        raise errors.InputError(f"The corpus {difference} the new interactions {such}.")
    _warn_of_another_unit(before.timestamps, log.timestamps)
    return build.join([build.log_of(before), log])


def _warn_of_another_unit(before: np.ndarray, new: np.ndarray) -> None:
    """Dumps keep their own unit of time, seconds or milliseconds, and the order of interactions is by these numbers."""
    if not len(new):
        return
    known, added = float(np.median(before)), float(np.median(new))
    if min(known, added) > 0 and not 1 / _ANOTHER_UNIT < added / known < _ANOTHER_UNIT:
        terminal.warn(
            f"The new timestamps are around {added:.3g}, those of the corpus around {known:.3g}. If one of them are "
            f"milliseconds and the others seconds, all of one come before all of the others: convert them first."
        )


def _join_items(
    items: Iterator[Item], ids_before: list[str], texts_before: Sequence[ItemText], wanted: set[str] | None
) -> tuple[list[ItemText], dict[str, ItemText], dict[str, int]]:
    """Returns the text of the items before, [I], that of the wanted new ones (None: all), and the counts of others."""
    known = {item_id: number for number, item_id in enumerate(ids_before)}
    texts, new_texts = list(texts_before), {}
    counts = {"items_dropped_by_k_core": 0}
    if known:
        counts |= {"items_known": 0, "items_given_text": 0}
    for item_id, text in items:
        if item_id in known and texts[known[item_id]].is_empty and not text.is_empty:
            texts[known[item_id]] = dataclasses.replace(text, extra={**texts[known[item_id]].extra, **text.extra})
            counts["items_given_text"] += 1
        elif item_id in known:
            counts["items_known"] += 1
        elif wanted is None or item_id in wanted:
            new_texts[item_id] = text
        else:
            counts["items_dropped_by_k_core"] += 1
    return texts, new_texts, counts
