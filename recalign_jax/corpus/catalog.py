"""The catalogue: every item as a sequence of tokens, which history, target and trie share.

An item format says how an item is written (`ITEM_FORMATS`, one entry each):

  title   the title, tokenized once. An item without one is written as its brand and the last of its
          categories, or, lacking those, as "item" and its number.
  id      the digits of its number, one after the other. Numbers are a seeded random permutation, so they say nothing.
  token   one vocabulary entry of its own.

Where it stands in a history, fields of its text (`FIELDS`) may follow, as ", brand : Acme".
Templates put white space around items, so that joining the pieces gives what tokenizing the joined text gives.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recalign_jax import errors
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.records import ItemText

PAD_ID, EOS_ID = 0, 1
MAX_ITEM_TOKENS = 48
_NO_BRAND = ("", "unknown")

Encode = Callable[[list[str]], list[list[int]]]


class Pieces(NamedTuple):
    """Tokens of every item, one item after the other, without end-of-sequence."""

    tokens: np.ndarray  # int32 [P]
    offsets: np.ndarray  # int64 [I + 1], where each item starts

    def of(self, item: int) -> np.ndarray:
        """Returns the tokens of an item: int32 view."""
        return self.tokens[self.offsets[item] : self.offsets[item + 1]]

    @property
    def longest(self) -> int:
        return int(np.diff(self.offsets).max(initial=0))


@dataclass(frozen=True, eq=False)
class Catalog:
    """The items of a corpus in one item format.

    Attributes:
      item_format: one of ITEM_FORMATS.
      tokens: int32 [I, T], target sequences that end with EOS_ID, padded with PAD_ID.
      lengths: int32 [I], of the target sequences, with EOS_ID.
      displays: how each item stands in a history.
      popularity: int64 [I], occurrences in the training parts; among items of one sequence the more popular
        comes first.
      num_collisions: the number of items whose target sequence another item has, too.
      fingerprint: of the item format, the target and the display tokens.
    """

    item_format: str
    tokens: np.ndarray
    lengths: np.ndarray
    displays: Pieces
    popularity: np.ndarray
    num_collisions: int
    fingerprint: str

    @property
    def num_items(self) -> int:
        return len(self.lengths)


def build_catalog(
    corpus: Corpus,
    item_format: str,
    encode: Encode,
    first_item_token: int,
    max_item_tokens: int = MAX_ITEM_TOKENS,
    fields: Sequence[str] = (),
) -> Catalog:
    """Writes every item of a corpus as tokens.

    Args:
      corpus: the corpus.
      item_format: one of ITEM_FORMATS; InputError if it is another.
      encode: tokenizes texts, without end-of-sequence.
      first_item_token: the token of item 0 in format `token`; item i has `first_item_token + i`.
      max_item_tokens: longer sequences are cut to this length, the end-of-sequence kept.
      fields: of FIELDS, what follows an item in a history.
    """
    targets = _targets(corpus, item_format, encode, first_item_token)
    flat, offsets = _ragged(targets, max_item_tokens - 1)
    lengths = np.diff(offsets)
    tokens = np.full((len(targets), int(lengths.max()) + 1), PAD_ID, np.int32)  # [I, T]
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    tokens[np.arange(len(targets)), lengths] = EOS_ID
    displays = _with_fields(corpus, item_format, targets, fields, encode, max_item_tokens - 1)
    _, sharers = np.unique(tokens, axis=0, return_counts=True)
    return Catalog(
        item_format=item_format,
        tokens=tokens,
        lengths=(lengths + 1).astype(np.int32),
        displays=displays,
        popularity=corpus.training_popularity,
        num_collisions=int(sharers[sharers > 1].sum()),
        fingerprint=_fingerprint(item_format, tokens, *displays),
    )


def item_pieces(
    corpus: Corpus,
    item_format: str,
    encode: Encode,
    first_item_token: int,
    fields: Sequence[str],
    max_item_tokens: int = MAX_ITEM_TOKENS,
) -> Pieces:
    """Writes every item of a corpus as it stands in a history; the arguments are those of `build_catalog`."""
    targets = _targets(corpus, item_format, encode, first_item_token)
    return _with_fields(corpus, item_format, targets, fields, encode, max_item_tokens - 1)


def _targets(corpus: Corpus, item_format: str, encode: Encode, first_item_token: int) -> Sequence[Sequence[int]]:
    if item_format not in ITEM_FORMATS:
        hint = errors.did_you_mean(item_format, ITEM_FORMATS)
        raise errors.InputError(f"No item format {item_format!r}; there are {', '.join(ITEM_FORMATS)}.{hint}")
    return ITEM_FORMATS[item_format](corpus, encode, first_item_token)


def _with_fields(
    corpus: Corpus,
    item_format: str,
    targets: Sequence[Sequence[int]],
    fields: Sequence[str],
    encode: Encode,
    longest: int,
) -> Pieces:
    """Appends the text of the fields to each item's own tokens, and cuts what is longer than `longest`."""
    shown = [name for name in fields if (item_format, name) != ("title", "title")]
    if not shown:
        return _ragged(targets, longest)
    texts = ["".join(_field_text(corpus.item_text(item), name) for name in shown) for item in range(corpus.num_items)]
    return _ragged([[*own, *more] for own, more in zip(targets, encode(texts), strict=True)], longest)


def _field_text(text: ItemText, name: str) -> str:
    value = FIELDS[name](text)
    return f" , {name} : {value}" if value else ""


def title_text(corpus: Corpus, item: int) -> str:
    """Returns the title of an item; without one "BRAND CATEGORY", of which the category is the last of its list
    and a brand "Unknown" is none; without these "item NUMBER"."""
    text = corpus.item_text(item)
    if text.title:
        return text.title
    return " ".join([_brand(text), *text.categories[-1:]]).strip() or _number_text(item)


def _brand(text: ItemText) -> str:
    return "" if text.brand.lower() in _NO_BRAND else text.brand


# What may follow an item in a history, by name. The last category is the most specific one where the source orders
# them so, as Amazon does; of MovieLens and Yelp it is one of several of the same rank.
FIELDS: dict[str, Callable[[ItemText], str]] = {
    "title": lambda text: text.title,
    "brand": _brand,
    "category": lambda text: text.categories[-1] if text.categories else "",
    "categories": lambda text: " , ".join(text.categories),
}


def _number_text(item: int) -> str:
    return f"item {item}"


def _title_tokens(corpus: Corpus, encode: Encode, first_item_token: int) -> list[list[int]]:
    del first_item_token
    tokens = encode([title_text(corpus, item) for item in range(corpus.num_items)])
    # A title can consist of characters that the tokenizer drops.
    return [own or encode([_number_text(item)])[0] for item, own in enumerate(tokens)]


def _digit_tokens(corpus: Corpus, encode: Encode, first_item_token: int) -> list[list[int]]:
    del first_item_token
    return encode([" ".join(str(item)) for item in range(corpus.num_items)])


def _own_tokens(corpus: Corpus, encode: Encode, first_item_token: int) -> list[list[int]]:
    del encode
    return [[first_item_token + item] for item in range(corpus.num_items)]


# What the model writes for each item, without end-of-sequence and not yet capped.
ITEM_FORMATS: dict[str, Callable[[Corpus, Encode, int], list[list[int]]]] = {
    "title": _title_tokens,
    "id": _digit_tokens,
    "token": _own_tokens,
}


def _ragged(rows: Sequence[Sequence[int]], longest: int) -> Pieces:
    """Returns rows, each cut to at most `longest`, one after the other."""
    rows = [row[:longest] for row in rows]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return Pieces(np.fromiter((token for row in rows for token in row), np.int32, offsets[-1]), offsets)


def _fingerprint(item_format: str, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(item_format.encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
