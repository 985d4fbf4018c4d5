"""The catalogue: every item as a sequence of tokens, which history, target and trie share.

An item format says how an item is written (`ITEM_FORMATS`, one entry each):

  title   the title, tokenized once. An item without one is written as its brand and its most specific category,
          or, lacking those, as "item" and its number.
  token   one vocabulary entry of its own.

Templates put white space around items, so that joining the pieces gives what tokenizing the joined text gives.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recalign_jax import errors
from recalign_jax.corpus.corpus import Corpus

PAD_ID, EOS_ID = 0, 1
MAX_ITEM_TOKENS = 48
_NO_BRAND = ("", "unknown")

Encode = Callable[[list[str]], list[list[int]]]


class ItemTokens(NamedTuple):
    """What an item format gives for each item, [I] lists each, without end-of-sequence and not yet capped."""

    targets: Sequence[Sequence[int]]  # what the model must write
    displays: Sequence[Sequence[int]]  # how the item stands in a history


@dataclass(frozen=True, eq=False)
class Catalog:
    """The items of a corpus in one item format.

    Attributes:
      item_format: one of ITEM_FORMATS.
      tokens: int32 [I, T], target sequences that end with EOS_ID, padded with PAD_ID.
      lengths: int32 [I], of the target sequences, with EOS_ID.
      piece_tokens: int32 [P], the display tokens of all items one after the other; see `pieces`.
      piece_offsets: int64 [I + 1], where each item starts in `piece_tokens`.
      popularity: int64 [I], occurrences in the training parts; among items of one sequence the more popular
        comes first.
      num_collisions: the number of items whose target sequence another item has, too.
      fingerprint: of the item format, the target and the display tokens.
    """

    item_format: str
    tokens: np.ndarray
    lengths: np.ndarray
    piece_tokens: np.ndarray
    piece_offsets: np.ndarray
    popularity: np.ndarray
    num_collisions: int
    fingerprint: str

    @property
    def num_items(self) -> int:
        return len(self.lengths)

    def pieces(self, item: int) -> np.ndarray:
        """Returns the tokens that stand for an item in a history, without end-of-sequence: int32 view."""
        return self.piece_tokens[self.piece_offsets[item] : self.piece_offsets[item + 1]]


def build_catalog(
    corpus: Corpus,
    item_format: str,
    encode: Encode,
    first_item_token: int,
    max_item_tokens: int = MAX_ITEM_TOKENS,
) -> Catalog:
    """Writes every item of a corpus as tokens.

    Args:
      corpus: the corpus.
      item_format: one of ITEM_FORMATS; InputError if it is another.
      encode: tokenizes texts, without end-of-sequence.
      first_item_token: the token of item 0 in format `token`; item i has `first_item_token + i`.
      max_item_tokens: longer sequences are cut to this length, the end-of-sequence kept.
    """
    if item_format not in ITEM_FORMATS:
        hint = errors.did_you_mean(item_format, ITEM_FORMATS)
        raise errors.InputError(f"No item format {item_format!r}; there are {', '.join(ITEM_FORMATS)}.{hint}")
    targets, displays = ITEM_FORMATS[item_format](corpus, encode, first_item_token)
    cap = max_item_tokens - 1
    flat, offsets = _ragged([target[:cap] for target in targets])
    lengths = np.diff(offsets)
    tokens = np.full((len(targets), int(lengths.max()) + 1), PAD_ID, np.int32)  # [I, T]
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    tokens[np.arange(len(targets)), lengths] = EOS_ID
    piece_tokens, piece_offsets = _ragged([display[:cap] for display in displays])
    _, sharers = np.unique(tokens, axis=0, return_counts=True)
    return Catalog(
        item_format=item_format,
        tokens=tokens,
        lengths=(lengths + 1).astype(np.int32),
        piece_tokens=piece_tokens,
        piece_offsets=piece_offsets,
        popularity=corpus.training_popularity,
        num_collisions=int(sharers[sharers > 1].sum()),
        fingerprint=_fingerprint(item_format, tokens, piece_tokens, piece_offsets),
    )


def title_text(corpus: Corpus, item: int) -> str:
    """Returns the title of an item; without one "BRAND CATEGORY", of which the category is the last of its list
    and a brand "Unknown" is none; without these "item NUMBER"."""
    text = corpus.item_text(item)
    if text.title:
        return text.title
    brand = "" if text.brand.lower() in _NO_BRAND else text.brand
    return " ".join([brand, *text.categories[-1:]]).strip() or _number_text(item)


def _number_text(item: int) -> str:
    return f"item {item}"


def _title_tokens(corpus: Corpus, encode: Encode, first_item_token: int) -> ItemTokens:
    del first_item_token
    pieces = encode([title_text(corpus, item) for item in range(corpus.num_items)])
    # A title can consist of characters that the tokenizer drops.
    pieces = [tokens or encode([_number_text(item)])[0] for item, tokens in enumerate(pieces)]
    return ItemTokens(pieces, pieces)


def _own_tokens(corpus: Corpus, encode: Encode, first_item_token: int) -> ItemTokens:
    del encode
    pieces = [[first_item_token + item] for item in range(corpus.num_items)]
    return ItemTokens(pieces, pieces)


ITEM_FORMATS: dict[str, Callable[[Corpus, Encode, int], ItemTokens]] = {"title": _title_tokens, "token": _own_tokens}


def _ragged(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows one after the other, int32 [P], and where each starts, int64 [I + 1]."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.fromiter((token for row in rows for token in row), np.int32, offsets[-1]), offsets


def _fingerprint(item_format: str, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(item_format.encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
