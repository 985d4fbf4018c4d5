"""Metrics of full-catalogue rankings next to ranx: recall, hr, ndcg, mrr and map @5 and @10, of 100,000 users.

    python benchmarks/metrics.py

Random scores of 12,101 items a user are cut to the best `--depth` items, and one item a user is relevant. From those
arrays to ten means there are three ways, which take turns in one process after a round that isn't counted (both sides
compile): ours; ranx' Qrels and Run, made from dictionaries; and arrays handed to ranx as they are, which its
`evaluate` takes as well if they are sorted and every list is full. ranx keeps no scores in the run.

Prints one JSON line: `ratio` (ranx' seconds, structures built and evaluated, over ours), `ratio_evaluate_only` (its
structures are there already), `ratio_arrays`, and `ratio_from_scores`, where each side also finds the best items itself
(ours with `jax.lax.top_k`, the other with numpy, then the faster way of ranx). Medians over rounds; the ranking is
timed once. `largest_difference` is between any two of the three ways, `estimates_seconds` is for the ten means with
their bootstrap intervals. Aim: a ratio of at least 10. Needs ranx.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import ranx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from recalign_jax import metrics

KS = (5, 10)
NAMES = [f"{metric}@{k}" for metric in ("recall", "hit_rate", "ndcg", "mrr", "map") for k in KS]  # as ranx has them
USERS_AT_ONCE = 1000  # whose scores are in memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000, help=f"a multiple of {USERS_AT_ONCE:,}")
    parser.add_argument("--items", type=int, default=12_101, help="size of the catalogue")
    parser.add_argument("--depth", type=int, default=10, help="length of a list")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(compare(args.users, args.items, args.depth, args.rounds)))


def compare(users: int, items: int, depth: int, rounds: int) -> dict[str, Any]:
    """Runs all ways in turns and returns what is printed."""
    lists, scores, ranking = rank(users, items, depth)
    rng = np.random.default_rng(1)
    # Half of the targets are somewhere in their user's list.
    places = rng.integers(0, 2 * depth, users)
    listed = lists[np.arange(users), np.minimum(places, depth - 1)]
    targets = np.where(places < depth, listed, rng.integers(0, items, users)).astype(np.int32)

    seconds: dict[str, list[float]] = {name: [] for name in ("ours", "build", "evaluate", "arrays", "estimates")}

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        seconds[name].append(time.perf_counter() - began)
        return result

    for _ in range(rounds + 1):
        ours = timed("ours", our_means, lists, targets)
        qrels, run = timed("build", structures, lists, scores, targets)
        theirs = timed("evaluate", ranx_means, qrels, run)
        from_arrays = timed("arrays", lambda: ranx_means(*stacked(lists, scores, targets)))
        timed("estimates", metrics.estimates, metrics.retrieval_values(lists, targets, KS))
    ways = np.stack([ours, theirs, from_arrays])
    middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    both = middle["build"] + middle["evaluate"]
    fastest = ranking["numpy"] + min(both, middle["arrays"])
    return {
        "ratio": round(both / middle["ours"], 2),
        "ratio_evaluate_only": round(middle["evaluate"] / middle["ours"], 2),
        "ratio_arrays": round(middle["arrays"] / middle["ours"], 2),
        "ratio_from_scores": round(fastest / (ranking["ours"] + middle["ours"]), 2),
        "ours_seconds": round(middle["ours"], 4),
        "ranx_seconds": round(both, 3),
        "ranx_evaluate_seconds": round(middle["evaluate"], 3),
        "ranx_arrays_seconds": round(middle["arrays"], 4),
        "ranking_seconds": {name: round(value, 2) for name, value in ranking.items()},
        "estimates_seconds": round(middle["estimates"], 3),
        "largest_difference": float(np.ptp(ways, axis=0).max()),
        "users": users,
        "items": items,
        "depth": depth,
        "rounds": rounds,
    }


def rank(users: int, items: int, depth: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The best items of each user, best first, and their scores, [N, K] both; and what ranking takes on either side."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(16, items)).astype(np.float32)
    top_k = jax.jit(lambda scores: jax.lax.top_k(scores, depth))
    seconds = {"ours": 0.0, "numpy": 0.0}
    parts = []
    at_once = min(users, USERS_AT_ONCE)
    for _ in range(users // at_once):
        scores = rng.normal(size=(at_once, 16)).astype(np.float32) @ factors  # [at_once, I]
        if not parts:
            top_k(scores)  # compiles
        began = time.perf_counter()
        parts.append(jax.device_get(top_k(scores)))
        middle = time.perf_counter()
        best = np.argpartition(scores, -depth, axis=1)[:, -depth:]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        np.take_along_axis(best, order, axis=1)
        seconds["ours"] += middle - began
        seconds["numpy"] += time.perf_counter() - middle
    scores, lists = (np.concatenate(part) for part in zip(*parts, strict=True))
    return lists, scores, seconds


def our_means(lists: np.ndarray, targets: np.ndarray) -> list[float]:
    values = metrics.retrieval_values(lists, targets, KS)
    return [np.asarray(values[name.replace("hit_rate", "hr")], np.float64).mean() for name in NAMES]


def structures(lists: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[ranx.Qrels, ranx.Run]:
    """ranx' own: names of users and items are strings."""
    users = [str(user) for user in range(len(targets))]
    qrels = {user: {target: 1} for user, target in zip(users, targets.astype(str).tolist(), strict=True)}
    rows = zip(users, lists.astype(str).tolist(), scores.tolist(), strict=True)
    run = {user: dict(zip(names, values, strict=True)) for user, names, values in rows}
    return ranx.Qrels(qrels), ranx.Run(run)


def stacked(lists: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of item and score: float64 [N, 1, 2] and [N, K, 2]."""
    relevant = np.stack([targets, np.ones_like(targets)], axis=-1)[:, None]
    return relevant.astype(np.float64), np.stack([lists, scores], axis=-1, dtype=np.float64)


def ranx_means(qrels: ranx.Qrels | np.ndarray, run: ranx.Run | np.ndarray) -> list[float]:
    means = ranx.evaluate(qrels, run, NAMES, save_results_in_run=False)
    return [means[name] for name in NAMES]


if __name__ == "__main__":
    main()
