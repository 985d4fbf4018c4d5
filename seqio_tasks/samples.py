"""A sample is a pure function of (task, split, index, epoch, seed), in numpy over pre-tokenized pieces.

No sample depends on the one before it, so the trainer finds sample n of a run by arithmetic, and SeqIO maps
over indices. Which interaction belongs to which split is `corpus.holdout`'s to say.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recalign_jax.corpus import holdout
from recalign_jax.corpus.corpus import Corpus
from seqio_tasks import prompts
from seqio_tasks.specs import TaskSpec
from seqio_tasks.vocabulary import EOS_ID, Vocabulary

SPLITS = ("train", "validation", "test")


class Sample(NamedTuple):
    """Token ids of the encoder's input [L] and of the target [T], int32, end of sequence included."""

    inputs: np.ndarray
    targets: np.ndarray


class Query(NamedTuple):
    """A retrieval example before it is written: what the user had, and what came next."""

    user: int
    history: np.ndarray  # item numbers, oldest first, not cut
    target: int


# Ranks items for queries, none of which is answered with the items excluded for it. Yields parts in any order:
# (which queries [b], items int32 [b, top_k] padded with -1, scores float32 [b, top_k]).
Ranked = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
Recommend = Callable[[Sequence[Query], Sequence[np.ndarray]], Ranked]


def num_examples(spec: TaskSpec, split: str) -> int:
    """Number of examples of a split; one epoch of training."""
    return _FAMILIES[spec.family].num_examples(spec.corpus, split)


class Limits(NamedTuple):
    """Most tokens of a sample, end of sequence counted."""

    inputs: int
    targets: int


NO_LIMITS = Limits(2**31, 2**31)


def render(spec: TaskSpec, split: str, index: int, epoch: int = 0, seed: int = 0, limits: Limits = NO_LIMITS) -> Sample:
    """Writes one example.

    Args:
      spec: the task.
      split: one of SPLITS.
      index: 0 .. num_examples - 1.
      epoch: changes the random parts of training examples; held-out examples are the same in all.
      seed: of the run.
      limits: whole oldest items are dropped, and fewer items masked, until the sample fits.

    Returns:
      The tokens. They exceed `limits` only where these are below `shortest_row`.
    """
    family = zlib.crc32(spec.family.encode())  # families don't share their draws
    where = (seed & 0xFFFFFFFF, epoch << 32 | index) if split == "train" else (SPLITS.index(split) << 32, index)
    random = np.random.Generator(np.random.Philox(key=[where[0] ^ family << 32, where[1]]))
    return _FAMILIES[spec.family].render(spec, split, index, random, limits)


def shortest_row(spec: TaskSpec) -> dict[str, int]:
    """Tokens that a row must hold so that the question, one item, and its answer always fit."""
    words, item = _words(spec), int(spec.catalog.lengths.max())
    question = len(words.before[spec.family]) + len(words.after[spec.family])
    return {"inputs": question + max(item, len(words.masked_item)), "targets": item}


def retrieval_query(corpus: Corpus, split: str, index: int) -> Query:
    """The user, history and target of example `index` of a retrieval split."""
    if split == "train":
        first_of_user = _training_pairs(corpus)
        user = int(np.searchsorted(first_of_user, index, side="right")) - 1
        position = index - int(first_of_user[user]) + 1
    else:
        user = int(corpus.evaluation_users[index])
        position = int(holdout.target_positions(corpus.lengths[user], split))
    sequence = corpus.sequence(user)
    return Query(user, sequence[:position], int(sequence[position]))


@functools.lru_cache(maxsize=8)
def _training_pairs(corpus: Corpus) -> np.ndarray:
    """First training example of each user, [U + 1]: every prefix of the training part predicts its next item."""
    return np.concatenate([[0], np.cumsum(np.maximum(corpus.training_lengths - 1, 0))])


@functools.lru_cache(maxsize=8)
def _mim_users(corpus: Corpus) -> np.ndarray:
    """Users with at least two training items: an item and what to tell it from."""
    return np.flatnonzero(corpus.training_lengths >= 2)


def _num_retrieval(corpus: Corpus, split: str) -> int:
    return int(_training_pairs(corpus)[-1]) if split == "train" else len(corpus.evaluation_users)


def _num_mim(corpus: Corpus, split: str) -> int:
    return len(_mim_users(corpus)) if split == "train" else len(corpus.evaluation_users)


def _retrieval(spec: TaskSpec, split: str, index: int, random: np.random.Generator, limits: Limits) -> Sample:
    del random  # a retrieval example has no random part
    query = retrieval_query(spec.corpus, split, index)
    return Sample(write_history(spec, query.history, limits.inputs), _target(spec, [query.target]))


def write_history(spec: TaskSpec, history: np.ndarray, limit: int = NO_LIMITS.inputs) -> np.ndarray:
    """The retrieval prompt for any history of item numbers, oldest first: int32 [L], with end of sequence."""
    words = _words(spec)
    items = [spec.catalog.pieces(item) for item in history[-spec.options.history_length :]]
    dropped = _num_dropped(words, "retrieval", np.asarray([len(item) for item in items], np.int64), limit)
    return _write(words, "retrieval", items[dropped:])


def _mim(spec: TaskSpec, split: str, index: int, random: np.random.Generator, limits: Limits) -> Sample:
    """A window of the user's items with some masked; the targets are the masked items in order.

    Held-out splits always mask their own target item, the newest of the window, so that their loss is of an
    item that no training sample holds.
    """
    corpus, options = spec.corpus, spec.options
    if split == "train":
        user = int(_mim_users(corpus)[index])
        end = int(corpus.training_lengths[user])
    else:
        user = int(corpus.evaluation_users[index])
        end = int(holdout.target_positions(corpus.lengths[user], split)) + 1
    length = min(end, options.history_length)
    # Any window of the training part may be drawn; the newest one holds the held-out target.
    start = int(random.integers(end - length + 1)) if split == "train" else end - length
    window = corpus.sequence(user)[start : start + length]
    masked = random.random(length) < options.mim_mask_rate
    if split != "train":
        masked[-1] = True
    elif not masked.any():
        masked[random.integers(length)] = True
    elif masked.all() and length > 1:
        masked[random.integers(length)] = False

    words = _words(spec)
    masked = _fitting_masks(spec, window, masked, limits.targets)
    items = [spec.catalog.pieces(item) for item in window]
    lengths = np.where(masked, len(words.masked_item), [len(item) for item in items])
    lengths[-1] = max(len(words.masked_item), len(items[-1]))  # it may yet be masked
    kept = slice(_num_dropped(words, "mim", lengths, limits.inputs), None)
    window, masked, items = window[kept], masked[kept], items[kept]
    if not masked.any():
        masked[-1] = True  # the masked items were all among those that had to go
    items = [words.masked_item if hide else item for item, hide in zip(items, masked, strict=True)]
    return Sample(_write(words, "mim", items), _target(spec, window[masked]))


def _fitting_masks(spec: TaskSpec, window: np.ndarray, masked: np.ndarray, limit: int) -> np.ndarray:
    """Unmasks the oldest of the masked items until what remains can be answered in `limit` tokens."""
    lengths = np.where(masked, spec.catalog.lengths[window] - 1 + len(_words(spec).separator), 0)
    # The last separator is none, the end of sequence is one token.
    from_newest = np.cumsum(lengths[::-1])[::-1] - len(_words(spec).separator) + 1
    fitting = masked & (from_newest <= limit)
    fitting[np.flatnonzero(masked)[-1]] = True
    return fitting


@dataclasses.dataclass(frozen=True)
class _Words:
    """Tokens of the literal text, by template: what stands before the items and after them."""

    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    separator: np.ndarray
    masked_item: np.ndarray


@functools.lru_cache(maxsize=8)
def _words_of(vocabulary: Vocabulary, separator: str) -> _Words:
    def tokens(text: str) -> np.ndarray:
        return np.asarray(vocabulary.encode([text])[0], np.int32)

    end = np.asarray([EOS_ID], np.int32)
    before, after = {}, {}
    for family, template in prompts.TEMPLATES.items():
        place = template.index(prompts.HISTORY)
        before[family] = np.concatenate([tokens(part) for part in template[:place]])
        after[family] = np.concatenate([*(tokens(part) for part in template[place + 1 :]), end])
    return _Words(before, after, tokens(separator), tokens(prompts.MASKED_ITEM))


def _words(spec: TaskSpec) -> _Words:
    return _words_of(spec.vocabulary, prompts.ITEM_SEPARATORS[spec.catalog.item_format])


def _num_dropped(words: _Words, family: str, lengths: np.ndarray, limit: int) -> int:
    """How many of the oldest items must go for the prompt to fit; the newest item always stays.

    `lengths` are the tokens of each item as it will be written, oldest first.
    """
    question = len(words.before[family]) + len(words.after[family]) - len(words.separator)
    with_newer = np.cumsum((lengths + len(words.separator))[::-1])[::-1] + question
    return min(int((with_newer > limit).sum()), max(len(lengths) - 1, 0))


def _write(words: _Words, family: str, items: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([words.before[family], *_joined(words, items), words.after[family]])


def _joined(words: _Words, items: list[np.ndarray]) -> list[np.ndarray]:
    return [part for item in items for part in (words.separator, item)][1:]


def _target(spec: TaskSpec, items: Iterable[int]) -> np.ndarray:
    """Target tokens: one item is its catalogue sequence; several are joined by the separator."""
    catalog, words = spec.catalog, _words(spec)
    sequences = [catalog.tokens[item][: catalog.lengths[item] - 1] for item in items]
    return np.concatenate([*_joined(words, sequences), np.asarray([EOS_ID], np.int32)])


class _Family(NamedTuple):
    num_examples: Callable[[Corpus, str], int]
    render: Callable[[TaskSpec, str, int, np.random.Generator, Limits], Sample]


_FAMILIES = {"retrieval": _Family(_num_retrieval, _retrieval), "mim": _Family(_num_mim, _mim)}
