"""Items to tell from the right one: negatives for training, and the fixed candidates of held-out users.

In training, negatives come from outside the user's training part and are blind to what is held out: a held-out item
is as likely a negative as any other, so that its absence gives nothing away. The candidates of held-out users come
from outside the user's whole history, depend on nothing but corpus, split, user and seed, and are the same for every
model and baseline.
"""

import functools
from collections.abc import Callable

import numpy as np

from recalign_jax import errors
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.holdout import SPLITS

NUM_TEST_NEGATIVES = 99  # the usual protocol: 1 + 99
CANDIDATE_SEED = 0
# Draws of a kind, before what is left is looked at as a whole, which takes time for every item of the corpus.
_MAX_ROUNDS = 8


def held_out_candidates(
    corpus: Corpus, split: str, user: int, target: int, count: int = NUM_TEST_NEGATIVES, seed: int = CANDIDATE_SEED
) -> np.ndarray:
    """Returns the target and `count` uniform negatives of a held-out user, in random order: int32 [count + 1].

    Args:
      corpus: the corpus.
      split: "validation" or "test".
      user: one of `corpus.evaluation_users`.
      target: the held-out item.
      count: fewer are returned where the user has met nearly all items.
      seed: of the candidates; another thing than the seed of a run.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, SPLITS.index(split) << 48 | user]))
    found = negatives(corpus, target, corpus.sequence(user), count, random)
    return random.permutation(np.append(found, np.int32(target)))


def negatives(
    corpus: Corpus, positive: int, met: np.ndarray, count: int, random: np.random.Generator, kind: str = "uniform"
) -> np.ndarray:
    """Draws distinct items that are neither `positive` nor among `met`.

    Args:
      corpus: the corpus.
      positive: the item to tell them from.
      met: items of the user, any number of times.
      count: fewer are returned where the corpus has no more.
      random: what to draw from.
      kind: "uniform"; "popularity": in proportion to occurrences in training; "category": of the last category of
        `positive`. Where too few are of the kind, the rest is uniform. InputError if it is another one.

    Returns:
      int32 [count].
    """
    errors.check_choice("NEGATIVES", kind, NEGATIVES)
    taken = {positive, *met.tolist()}
    found: list[int] = []
    # A small category soon has no more to give.
    rounds = [draw for draw in dict.fromkeys((NEGATIVES[kind], _uniform)) for _ in range(_MAX_ROUNDS)]
    # Uniform ones of a small corpus are drawn from what is left, below.
    if kind != "uniform" or corpus.num_items - len(taken) > 4 * count:
        for draw in rounds:
            for item in draw(corpus, positive, 2 * (count - len(found)), random).tolist():
                if item not in taken and len(found) < count:
                    taken.add(item)
                    found.append(item)
            if len(found) == count:
                break
    if len(found) < count:
        left = np.setdiff1d(np.arange(corpus.num_items), np.fromiter(taken, np.int64, len(taken)))
        found += random.permutation(left)[: count - len(found)].tolist()
    return np.asarray(found, np.int32)


def _uniform(corpus: Corpus, positive: int, size: int, random: np.random.Generator) -> np.ndarray:
    del positive
    return random.integers(corpus.num_items, size=size)


def _by_popularity(corpus: Corpus, positive: int, size: int, random: np.random.Generator) -> np.ndarray:
    del positive
    up_to = _cumulative_popularity(corpus)
    return np.searchsorted(up_to, random.integers(up_to[-1], size=size), side="right")


def _of_category(corpus: Corpus, positive: int, size: int, random: np.random.Generator) -> np.ndarray:
    category_of, members = _categories(corpus)
    return random.choice(members[category_of[positive]], size=size)


# Kind of negatives -> (corpus, positive, size, random) -> items with repetitions, int [size].
NEGATIVES: dict[str, Callable[[Corpus, int, int, np.random.Generator], np.ndarray]] = {
    "uniform": _uniform,
    "popularity": _by_popularity,
    "category": _of_category,
}


@functools.lru_cache(maxsize=8)
def _cumulative_popularity(corpus: Corpus) -> np.ndarray:
    return np.cumsum(corpus.training_popularity)


@functools.lru_cache(maxsize=8)
def _categories(corpus: Corpus) -> tuple[np.ndarray, list[np.ndarray]]:
    """Number of the last category of each item, [I], and the items of each; items without one share one."""
    names = [(text.categories or ("",))[-1] for text in map(corpus.item_text, range(corpus.num_items))]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    category_of = np.fromiter((numbers[name] for name in names), np.int64, len(names))
    order = np.argsort(category_of, kind="stable")
    return category_of, np.split(order, np.searchsorted(category_of[order], np.arange(1, len(numbers))))
