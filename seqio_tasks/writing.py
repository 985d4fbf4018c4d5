"""Tokens of prompts and targets: templates filled with items, and whole items dropped until a prompt fits."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.corpus.neighbours import neighbours_of
from recalign_jax.corpus.records import rating_text
from seqio_tasks import prompts
from seqio_tasks.prompts import CANDIDATES, HISTORY, ITEM
from seqio_tasks.specs import TaskSpec
from seqio_tasks.vocabulary import Vocabulary

NO_LIMIT = 2**31


class Sample(NamedTuple):
    """Token ids of the encoder's input [L] and of the target [T], int32, end of sequence included."""

    inputs: np.ndarray
    targets: np.ndarray


class Limits(NamedTuple):
    """Most tokens of a sample, end of sequence counted."""

    inputs: int
    targets: int


NO_LIMITS = Limits(NO_LIMIT, NO_LIMIT)
_END = np.asarray([EOS_ID], np.int32)


@dataclasses.dataclass(frozen=True)
class Words:
    """Tokens of the literal text.

    Attributes:
      templates: of each family its wordings, with tokens in place of the literals.
      sizes: tokens of the literals of each wording, end of sequence counted.
      separator: between items.
      masked_item: in place of an item.
      neighbours: before the neighbours, if there are any.
    """

    templates: Mapping[str, Sequence[tuple[np.ndarray | str, ...]]]
    sizes: Mapping[str, Sequence[int]]
    separator: np.ndarray
    masked_item: np.ndarray
    neighbours: np.ndarray


@functools.lru_cache(maxsize=8)
def _words(vocabulary: Vocabulary, separator: str) -> Words:
    templates = {
        family: [
            tuple(part if part in prompts.PLACEHOLDERS else _tokens(vocabulary, part) for part in wording)
            for wording in wordings
        ]
        for family, wordings in prompts.TEMPLATES.items()
    }
    sizes = {
        family: [1 + sum(len(part) for part in wording if not isinstance(part, str)) for wording in wordings]
        for family, wordings in templates.items()
    }
    literals = (_tokens(vocabulary, text) for text in (separator, prompts.MASKED_ITEM, prompts.NEIGHBOURS))
    return Words(templates, sizes, *literals)


def words_of(spec: TaskSpec) -> Words:
    """The literal text of a task's prompts in its vocabulary."""
    return _words(spec.vocabulary, prompts.separator(spec.catalog.item_format, bool(spec.fields)))


@functools.lru_cache(maxsize=4096)
def rating_tokens(vocabulary: Vocabulary, rating: float) -> np.ndarray:
    """A rating as the model writes it, as "4" or "3.5", without end of sequence."""
    return _tokens(vocabulary, rating_text(rating))


@functools.lru_cache(maxsize=8)
def rated(vocabulary: Vocabulary) -> np.ndarray:
    """What stands between an item of a history and its rating."""
    return _tokens(vocabulary, prompts.RATED)


def _tokens(vocabulary: Vocabulary, text: str) -> np.ndarray:
    return np.asarray(vocabulary.encode([text])[0], np.int32)


def prompt(
    spec: TaskSpec,
    wording: int,
    history: Sequence[np.ndarray],
    limit: int,
    *,
    candidates: Sequence[np.ndarray] = (),
    item: np.ndarray | None = None,
    neighbours: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Fills a wording of a task's family: tokens int32 [L], with end of sequence.

    Args:
      spec: the task.
      wording: its number in `prompts.TEMPLATES`.
      history: tokens of each item, oldest first.
      limit: whole oldest items of the history are dropped until the prompt has at most so many tokens; the newest
        stays. If that is not enough, candidates and neighbours are dropped from the end.
      candidates: tokens of each candidate.
      item: tokens of the item that is asked about.
      neighbours: tokens of each neighbour, written behind the history if there are any.
    """
    words = words_of(spec)
    history, candidates, neighbours = fitting(spec, wording, history, limit, candidates, item, neighbours)
    slots = {HISTORY: history, CANDIDATES: candidates, ITEM: [] if item is None else [item]}
    parts = []
    for part in words.templates[spec.wordings][wording]:
        if not isinstance(part, str):
            parts.append(part)
            continue
        parts += joined(words, slots[part])
        if part == HISTORY and neighbours:
            parts += [words.neighbours, *joined(words, neighbours)]
    return np.concatenate([*parts, _END])


def fitting(
    spec: TaskSpec,
    wording: int,
    history: Sequence[np.ndarray],
    limit: int,
    candidates: Sequence[np.ndarray] = (),
    item: np.ndarray | None = None,
    neighbours: Sequence[np.ndarray] = (),
) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray], Sequence[np.ndarray]]:
    """What `prompt`, whose arguments these are, has room for: of history, candidates and neighbours."""
    words = words_of(spec)
    room = limit - words.sizes[spec.wordings][wording] - (0 if item is None else len(item))
    newest = len(history[-1]) if history else 0
    candidates = candidates[: num_candidates(spec, wording, history, limit, candidates)]
    room -= _joined_size(words, candidates)
    neighbours = neighbours[: _num_fitting(words, neighbours, room - newest - len(words.neighbours))]
    if neighbours:
        room -= _joined_size(words, neighbours) + len(words.neighbours)
    history = history[num_dropped(words, [len(tokens) for tokens in history], room) :]
    return history, candidates, neighbours


def num_candidates(
    spec: TaskSpec, wording: int, history: Sequence[np.ndarray], limit: int, candidates: Sequence[np.ndarray]
) -> int:
    """How many of the first candidates fit beside the newest item of the history; the arguments are `prompt`'s."""
    words = words_of(spec)
    newest = len(history[-1]) if history else 0
    return _num_fitting(words, candidates, limit - words.sizes[spec.wordings][wording] - newest)


def held_out_wording(spec: TaskSpec) -> int:
    """The wording of held-out examples and of inference: the first one, or the one that no training sample has."""
    return 0 if spec.options.evaluation_wording == "seen" else len(prompts.TEMPLATES[spec.wordings]) - 1


def draw_wording(spec: TaskSpec, split: str, random: np.random.Generator) -> int:
    """The wording of an example; that of a held-out one isn't drawn."""
    if split != "train":
        return held_out_wording(spec)
    return int(random.integers(min(spec.options.training_wordings, len(prompts.TEMPLATES[spec.wordings]) - 1)))


def question_size(spec: TaskSpec) -> int:
    """Tokens of the longest question of a task, end of sequence counted."""
    return max(words_of(spec).sizes[spec.wordings])


def history_prompt(spec: TaskSpec, wording: int, history: np.ndarray, user: int, limit: int) -> np.ndarray:
    """The retrieval prompt for item numbers, oldest first: int32 [L], with end of sequence."""
    return prompt(spec, wording, displays(spec, history), limit, neighbours=neighbours(spec, history, user))


def displays(spec: TaskSpec, items: np.ndarray) -> list[np.ndarray]:
    """The newest items of a history as the prompt shows them."""
    return [spec.displays.of(item) for item in items[-spec.options.history_length :]]


def neighbours(spec: TaskSpec, history: np.ndarray, user: int) -> list[np.ndarray]:
    """Collaborative neighbours of a history as the prompt shows them; none unless the options ask for some."""
    count = spec.options.neighbours
    if not count:
        return []
    found = neighbours_of(spec.corpus, history[-spec.options.history_length :], count, user)
    return [spec.displays.of(item) for item in found if item not in history]


def target(spec: TaskSpec, items: Iterable[int]) -> np.ndarray:
    """Target tokens: one item is its catalogue sequence; several are joined by the separator."""
    catalog = spec.catalog
    sequences = [catalog.tokens[item][: catalog.lengths[item] - 1] for item in items]
    return np.concatenate([*joined(words_of(spec), sequences), _END])


def num_dropped(words: Words, lengths: Sequence[int], room: int) -> int:
    """How many of the oldest items must go for the rest to fit; the newest always stays."""
    with_newer = np.cumsum(np.asarray(lengths, np.int64)[::-1] + len(words.separator))[::-1] - len(words.separator)
    return min(int((with_newer > room).sum()), max(len(lengths) - 1, 0))


def joined(words: Words, items: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Items with the separator between them."""
    return [part for item in items for part in (words.separator, item)][1:]


def _num_fitting(words: Words, items: Sequence[np.ndarray], room: int) -> int:
    """How many of the first items fit."""
    sizes = np.cumsum([len(item) + len(words.separator) for item in items]) - len(words.separator)
    return int((sizes <= room).sum())


def _joined_size(words: Words, items: Sequence[np.ndarray]) -> int:
    return sum(map(len, items)) + len(words.separator) * max(len(items) - 1, 0)
