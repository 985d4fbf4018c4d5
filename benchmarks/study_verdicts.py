"""Holds the claims of benchmarks/study_claims.py against the kept runs, user by user."""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks import study, study_records
from benchmarks.study_claims import Claim
from benchmarks.study_records import Runs, per_user
from recalign_jax.errors import InputError

CLAIMS = "claims.json"
RESAMPLES = 1000


class Judged(NamedTuple):
    """How a claim was judged: the difference (above 0 where it holds), its interval, and the seeds of both sides."""

    value: float
    low: float
    high: float
    seeds: tuple[int, int]

    @property
    def verdict(self) -> str:
        return "supported" if self.low > 0 else "contradicted" if self.high < 0 else "undecided"


def judge_all(claims: Sequence[Claim], found: dict[str, Runs], before: dict[str, Judged]) -> dict[str, Judged]:
    """How the claims are judged, by their text, from the tables that are there.

    One that was judged from more seeds before stays as it was: tables of old runs may be gone.
    """
    judged = dict(before)
    for claim in claims:
        seeds = seeds_with_tables(claim, found)
        earlier = before[claim.text].seeds if claim.text in before else (1, 1)
        if seeds[0] >= earlier[0] and seeds[1] >= earlier[1]:
            judged[claim.text] = judge(claim, found)
    return judged


def seeds_with_tables(claim: Claim, found: dict[str, Runs]) -> tuple[int, int]:
    """From how many seeds of its two sides a claim can be judged."""
    better, worse = (len(found[name].tables) if name in found else 0 for name in (claim.better, claim.worse))
    return better, worse


def of_one_seed(claim: Claim, judged: Judged) -> bool:
    """Whether a side of a claim is a row of the study with one seed (most baselines have no seed to vary)."""
    sides = zip((claim.better, claim.worse), judged.seeds, strict=True)
    return any(name in study.ROWS and count == 1 for name, count in sides)


def judge(claim: Claim, found: dict[str, Runs]) -> Judged:
    """Holds a claim against the kept runs.

    Raises:
      InputError: when the two rows were evaluated on different users.
    """
    better, worse = found[claim.better], found[claim.worse]
    if len({record["users"] for runs in (better, worse) for record in runs.records if "users" in record}) > 1:
        raise InputError(f"{claim.better} and {claim.worse} were not evaluated on the same users.")
    first, second = (
        per_user(runs, claim.family, metric)
        for runs, metric in ((better, claim.metric), (worse, claim.other_metric or claim.metric))
    )
    seeds = (len(first), len(second))
    same = claim.better == claim.worse
    if claim.metric == "rmse":  # lower is better
        value, high, low = (-end for end in difference(first, second, np.sqrt, claim.times, same))
    else:
        value, low, high = difference(first, second, np.asarray, claim.times, same)
    return Judged(value, low, high, seeds)


def difference(
    better: np.ndarray,
    worse: np.ndarray,
    finish: Callable[[np.ndarray], np.ndarray],
    times: float,
    same_models: bool = False,
) -> tuple[float, float, float]:
    """`better` less `times` `worse`, and its 95 % bootstrap interval over users and seeds.

    Users are drawn with replacement, the same ones for both sides (paired); of each side so many seeds as it has, the
    same ones where both sides are figures of the same models. The mean of n seeds drawn from n deviates from theirs by
    (n - 1) / n of the variance that it should; it is rescaled (Rao and Wu, Resampling Inference with Complex Survey
    Data, JASA 83, 1988). Of two or three seeds the interval is still short: their deviation is itself hardly known.

    Args:
      better: [seeds, users].
      worse: [seeds, users], of the same users.
      finish: what the mean over users becomes, as the root of RMSE.
      times: a factor.
      same_models: whether a seed is the same model on both sides.

    Returns:
      (difference, low, high).
    """
    random = np.random.default_rng(0)
    users = better.shape[1]
    drawn = []
    for _ in range(RESAMPLES):
        counts = np.bincount(random.integers(users, size=users), minlength=users) / users
        first, second = finish(better @ counts), finish(worse @ counts)
        of_first = random.integers(len(first), size=len(first))
        of_second = of_first if same_models else random.integers(len(second), size=len(second))
        drawn.append(_mean(first, of_first) - times * _mean(second, of_second))
    value = finish(better.mean(axis=1)).mean() - times * finish(worse.mean(axis=1)).mean()
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(value), float(low), float(high)


def _mean(seeds: np.ndarray, drawn: np.ndarray) -> float:
    """The mean of the drawn ones, with the variance of a mean of so many seeds."""
    mean = seeds.mean()
    return mean + (seeds[drawn].mean() - mean) * math.sqrt(len(seeds) / max(len(seeds) - 1, 1))


def read_judged(records: pathlib.Path) -> dict[str, Judged]:
    """What `write_judged` wrote; empty before."""
    path = records / CLAIMS
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {text: Judged(**{**one, "seeds": tuple(one["seeds"])}) for text, one in told.items()}


def write_judged(judged: dict[str, Judged], records: pathlib.Path) -> None:
    study_records.write(records / CLAIMS, {text: one._asdict() for text, one in judged.items()})
