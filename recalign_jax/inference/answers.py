"""From requests to rows of output: ranked items with titles and scores, and ratings where they are asked for.

A request without a history has nothing that a model could go by: it gets the most popular items, and its row says so.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from recalign_jax.corpus.catalog import title_text
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.decoding.retrieve import padded, power_of_two
from recalign_jax.inference.rows import Request
from seqio_tasks.examples import PredictRatings, RatedQuery, Recommend, ScoreCandidates

MODEL, POPULARITY = "model", "popularity"
Row = dict[str, Any]


class Models(NamedTuple):
    """What answers.

    Attributes:
      recommend: over the catalogue, for requests without candidates.
      score: over candidates, for requests with some; None where there are none.
      rate: predicts the ratings of what is answered; None to leave them out.
    """

    recommend: Recommend | None
    score: ScoreCandidates | None
    rate: PredictRatings | None


class Answer(NamedTuple):
    """Items of a request, best first, with their scores."""

    items: np.ndarray  # int32 [k]
    scores: np.ndarray  # float [k]
    method: str


def answer(
    corpus: Corpus,
    models: Models,
    requests: Sequence[Request],
    permitted: np.ndarray | None,
    top_k: int,
    filter_history: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Row]:
    """Answers requests.

    Args:
      corpus: what the requests are of.
      models: what answers them.
      requests: all with candidates or all without.
      permitted: what may be recommended, int32 ascending, as `models.recommend` knows it; None for all.
      top_k: most items of an answer without candidates.
      filter_history: leave out what the user already has, unless it is a candidate.
      advance: told how many more are answered.

    Returns:
      A row a request, in order: `user`, `items` (ids of the source), `titles`, `scores` (log-likelihoods, of
      `popularity` the logarithm of (occurrences in training + 1) / (their sum + I)), `ratings` if they are predicted,
      `method` and `unknown_items`.
    """
    answers: list[Answer | None] = [None] * len(requests)
    # Ratings are most of the work where they are asked for: requests count when theirs are there.
    advance_answered = advance if models.rate is None else lambda count: None
    with_history = [number for number, request in enumerate(requests) if len(request.query.history)]
    queries = [requests[number].query for number in with_history]
    if models.score is not None:
        _rank(models.score, requests, with_history, answers, advance_answered)
    elif models.recommend is not None:
        nothing = np.zeros(0, np.int32)
        excluded = [query.history if filter_history else nothing for query in queries]
        for chosen, items, scores in models.recommend(queries, excluded) if queries else ():
            for number, ranked, score in zip(chosen, items, scores, strict=True):
                answers[with_history[number]] = Answer(ranked[ranked >= 0], score[ranked >= 0], MODEL)
            advance_answered(len(chosen))
    without_history = [number for number, given in enumerate(answers) if given is None]
    if without_history and models.score is None:
        everything = np.arange(corpus.num_items, dtype=np.int32) if permitted is None else permitted
        most_popular = _by_popularity(corpus, everything, top_k)
    for number in without_history:
        candidates = requests[number].candidates
        answers[number] = most_popular if models.score is None else _by_popularity(corpus, candidates, len(candidates))
        advance_answered(1)
    found = [given for given in answers if given is not None]
    ratings = None if models.rate is None else _ratings(models.rate, requests, found, advance)
    return [
        _row(corpus, request, given, None if ratings is None else ratings[number])
        for number, (request, given) in enumerate(zip(requests, found, strict=True))
    ]


def _by_popularity(corpus: Corpus, items: np.ndarray, top_k: int) -> Answer:
    """The most popular of some items; of equal ones those that come first."""
    popularity = corpus.training_popularity
    best = items[np.argsort(-popularity[items], kind="stable")[:top_k]]
    likelihoods = np.log((popularity[best] + 1) / (popularity.sum() + corpus.num_items))
    return Answer(best, likelihoods, POPULARITY)


def _rank(
    score: ScoreCandidates,
    requests: Sequence[Request],
    with_history: Sequence[int],
    answers: list[Answer | None],
    advance: Callable[[int], None],
) -> None:
    """Orders the candidates; requests with about as many go together, since all of a call are padded to the most."""
    widths = {number: power_of_two(len(requests[number].candidates)) for number in with_history}
    for width in sorted(set(widths.values())):
        some = [number for number in with_history if widths[number] == width]
        candidates = padded([requests[number].candidates for number in some], len(some), width, fill=-1)
        for chosen, scores in score([requests[number].query for number in some], candidates):
            for index, values in zip(chosen, scores, strict=True):
                items = requests[some[index]].candidates
                order = np.argsort(-values[: len(items)], kind="stable")
                answers[some[index]] = Answer(items[order], values[order], MODEL)
            advance(len(chosen))


def _ratings(
    rate: PredictRatings, requests: Sequence[Request], answers: Sequence[Answer], advance: Callable[[int], None]
) -> list[np.ndarray]:
    """The expected ratings of all items of all answers."""
    pairs = [
        RatedQuery(
            request.query.user,
            request.query.history,
            np.zeros(len(request.query.history), np.float32) if request.ratings is None else request.ratings,
            int(item),
            float("nan"),
        )
        for request, given in zip(requests, answers, strict=True)
        for item in given.items
    ]
    values = np.zeros(len(pairs), np.float32)
    rated = told = 0
    for chosen, expected, _ in rate(pairs) if pairs else ():
        values[chosen] = expected
        rated += len(chosen)
        advance(len(requests) * rated // len(pairs) - told)
        told = len(requests) * rated // len(pairs)
    advance(len(requests) - told)
    return np.split(values, np.cumsum([len(given.items) for given in answers])[:-1])


def _row(corpus: Corpus, request: Request, given: Answer, ratings: np.ndarray | None) -> Row:
    row = {
        "user": request.user,
        "items": [corpus.item_source_id(item) for item in given.items],
        "titles": [title_text(corpus, int(item)) for item in given.items],
        "scores": _rounded(given.scores),
    }
    if ratings is not None:
        row["ratings"] = _rounded(ratings)
    return row | {"method": given.method, "unknown_items": list(request.unknown)}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
