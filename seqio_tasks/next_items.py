"""Retrieval, ranking, BPR and rating: what a user did after a history."""

import numpy as np

from recalign_jax.corpus import candidates
from recalign_jax.corpus.catalog import EOS_ID
from seqio_tasks import examples, writing
from seqio_tasks.examples import Query, RatedQuery
from seqio_tasks.specs import TaskSpec
from seqio_tasks.writing import Limits, Sample


def num_next(spec: TaskSpec, split: str) -> int:
    return examples.num_next_items(spec.corpus, split, spec.options.prefix_augmentation)


def retrieval(spec: TaskSpec, split: str, index: int, random: np.random.Generator, limits: Limits) -> Sample:
    query = examples.next_item(spec.corpus, split, index, spec.options.prefix_augmentation)
    wording = writing.draw_wording(spec, split, random)
    inputs = writing.history_prompt(spec, wording, query.history, query.user, limits.inputs)
    return Sample(inputs, writing.target(spec, [query.target]))


def choice(spec: TaskSpec, split: str, index: int, random: np.random.Generator, limits: Limits) -> Sample:
    """The next item among candidates; the target is that item. BPR has one candidate beside it."""
    corpus, options = spec.corpus, spec.options
    query = examples.next_item(corpus, split, index, options.prefix_augmentation)
    wording = writing.draw_wording(spec, split, random)
    if split == "train":
        met = corpus.training_sequence(query.user)
        count = 1 if spec.family == "bpr" else options.ranking_candidates - 1
        found = candidates.negatives(corpus, query.target, met, count, random, options.negatives)
        chosen = np.append(np.int32(query.target), found)
        fitting = num_shown(spec, wording, query, chosen, limits.inputs)
        chosen = random.permutation(chosen[: max(fitting, 1)])
    else:
        count = 1 if spec.family == "bpr" else options.test_negatives
        chosen = candidates.held_out_candidates(corpus, split, query.user, query.target, count, options.candidate_seed)
    inputs = choice_prompt(spec, wording, query, chosen, limits.inputs)
    return Sample(inputs, writing.target(spec, [query.target]))


def choice_prompt(spec: TaskSpec, wording: int, query: Query, items: np.ndarray, limit: int) -> np.ndarray:
    """The question which of the candidates comes next, with the first ones that fit: int32 [L]."""
    shown = [spec.displays.of(item) for item in items]
    history = writing.displays(spec, query.history)
    others = writing.neighbours(spec, query.history, query.user)
    return writing.prompt(spec, wording, history, limit, candidates=shown, neighbours=others)


def num_shown(spec: TaskSpec, wording: int, query: Query, items: np.ndarray, limit: int) -> int:
    """How many of the candidates `choice_prompt` has room for."""
    shown = [spec.displays.of(item) for item in items]
    return writing.num_candidates(spec, wording, writing.displays(spec, query.history), limit, shown)


def shows(spec: TaskSpec, wording: int, query: Query, items: np.ndarray, limit: int) -> tuple[bool, bool]:
    """Whether `choice_prompt` shows all candidates, and the whole history."""
    candidates, history = [spec.displays.of(item) for item in items], writing.displays(spec, query.history)
    others = writing.neighbours(spec, query.history, query.user)
    shown, of_candidates, _ = writing.fitting(spec, wording, history, limit, candidates, neighbours=others)
    return len(of_candidates) == len(candidates), len(shown) == len(history)


def shortest_retrieval(spec: TaskSpec) -> dict[str, int]:
    return {"inputs": writing.question_size(spec) + spec.displays.longest, "targets": int(spec.catalog.lengths.max())}


def shortest_choice(spec: TaskSpec) -> dict[str, int]:
    two = 2 * spec.displays.longest + len(writing.words_of(spec).separator)
    return {
        "inputs": writing.question_size(spec) + spec.displays.longest + two,
        "targets": int(spec.catalog.lengths.max()),
    }


def num_rating(spec: TaskSpec, split: str) -> int:
    if spec.family == "rating_random":
        return len(examples.random_part(spec.corpus, split))
    return num_next(spec, split)


def rating(spec: TaskSpec, split: str, index: int, random: np.random.Generator, limits: Limits) -> Sample:
    """The rating of an item after a history of rated items; the target is the number as text."""
    if spec.family == "rating_random":
        query = examples.random_rating(spec.corpus, split, index)
    else:
        query = examples.next_rating(spec.corpus, split, index, spec.options.prefix_augmentation)
    inputs = rating_prompt(spec, writing.draw_wording(spec, split, random), query, limits.inputs)
    return Sample(inputs, np.append(writing.rating_tokens(spec.vocabulary, query.rating), np.int32(EOS_ID)))


def rating_prompt(spec: TaskSpec, wording: int, query: RatedQuery, limit: int) -> np.ndarray:
    """The question how an item is rated: int32 [L]."""
    words = spec.vocabulary
    history = writing.displays(spec, query.history)
    if spec.options.rating_history:
        ratings = query.ratings[-len(history) :].tolist() if history else []
        history = [
            np.concatenate([item, writing.rated(words), writing.rating_tokens(words, rating)])
            for item, rating in zip(history, ratings, strict=True)
        ]
    return writing.prompt(spec, wording, history, limit, item=spec.displays.of(query.target))


def shortest_rating(spec: TaskSpec) -> dict[str, int]:
    assert spec.corpus.ratings is not None
    value = max(
        len(writing.rating_tokens(spec.vocabulary, rating)) for rating in np.unique(spec.corpus.ratings).tolist()
    )
    item = spec.displays.longest + len(writing.rated(spec.vocabulary)) + value
    return {"inputs": writing.question_size(spec) + item + spec.displays.longest, "targets": value + 1}
