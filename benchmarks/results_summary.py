"""The tables of README.md: docs/results.md in short, from the same records and verdicts."""

import re
from collections.abc import Sequence

from benchmarks import study, study_verdicts
from benchmarks.study_claims import CONVENTIONAL, CORPORA, Claim, claims
from benchmarks.study_records import Runs, spread
from benchmarks.study_verdicts import Judged
from recalign_jax.errors import InputError

BEGIN, END = "<!-- written by benchmarks/results.py -->", "<!-- up to here -->"
MARKS = {"supported": "▲ ", "contradicted": "▼ ", "undecided": ""}
FORMATS = {"token": "tokens", "title": "titles"}


def render(found: dict[str, Runs], judged: dict[str, Judged]) -> str:
    """Retrieval, ranking, rating and choices as Markdown tables; a figure that isn't there is left empty."""
    names = ("popularity", "item-kNN", "BPR-MF", "SASRec")
    retrieval, ranking = [], []
    for corpus, title in CORPORA.items():
        beside = [f"amazon_{corpus}/{method}" for method in CONVENTIONAL]
        for item_format, items in FORMATS.items():
            rows = [f"{corpus}_{item_format}_{mixture}" for mixture in study.MIXTURES]
            retrieval.append((f"{title}, items as {items}", [*rows, *beside]))
            if (corpus, item_format) == ("beauty", "token"):
                for (alone, aligned), changed in ((study.LONG, ""), (study.LONG_DROPOUT, ", dropout .2")):
                    label = f"the same, {_steps(found, (alone, aligned))} steps{changed}"
                    retrieval.append((label, [alone, "", "", aligned, *beside]))
        ranking.append((title, [f"{corpus}_token_ranking", f"{corpus}_token_ranking_aligned", *beside]))
        if corpus == "beauty":
            ranking.append(("the same, trained among 100 candidates", [*study.RANKING_100, *beside]))
    rating = ["movielens_token_rating", "movielens_token_rating_aligned"]
    rating += ["movielens/mf_rating_biases", "movielens/mf_rating"]
    added = ("+ MIM", "+ MLM", "+ MIM + MLM")
    parts = [
        _table(("NDCG@10 of retrieval", "alone", *added, *names), "retrieval", "ndcg@10", retrieval, found, judged),
        _table(("NDCG@10 of ranking", "alone", "+ BPR", *names), "ranking", "ndcg@10", ranking, found, judged),
        _table(
            ("RMSE of rating", "alone", "+ BPR", "biases alone", "biased MF"),
            *("rating", "rmse", [("MovieLens-100K", rating)], found, judged),
        ),
        _choices(found, judged),
    ]
    return "\n\n".join(part for part in parts if part)


def replaced(readme: str, tables: str) -> str:
    """README with other tables between the two comments. Raises InputError when they aren't there."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise InputError(f"README has no place for the tables: one line {BEGIN!r}, and below it one line {END!r}.")
    return f"{readme[: readme.index(BEGIN)]}{BEGIN}\n\n{tables}\n\n{readme[readme.index(END) :]}"


def _table(
    header: Sequence[str],
    family: str,
    metric: str,
    lines: Sequence[tuple[str, Sequence[str]]],
    found: dict[str, Runs],
    judged: dict[str, Judged],
) -> str:
    """A line a corpus; what stands beside a task alone is marked by how it compares with that."""
    told = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for label, (alone, *others) in lines:
        if alone not in found:
            continue
        cells = [_figure(found, alone, family, metric)]
        for name in others:
            claim = next((claim for claim in claims() if (claim.better, claim.worse) == (name, alone)), None)
            cells.append(_mark(claim, judged) + _figure(found, name, family, metric))
        told.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(told) if len(told) > 2 else ""


def _choices(found: dict[str, Runs], judged: dict[str, Judged]) -> str:
    """Both sides of every claim about a choice."""
    told = ["| Choice, on Beauty (NDCG@10) | with it | without | |", "|---|---|---|---|"]
    for claim in (claim for claim in claims() if claim.choice and claim.text in judged):
        metrics = (claim.metric, claim.other_metric or claim.metric)
        first, second = (
            _figure(found, name, claim.family, metric)
            for name, metric in zip((claim.better, claim.worse), metrics, strict=True)
        )
        one = judged[claim.text]
        verdict = one.verdict + (", one seed" if study_verdicts.of_one_seed(claim, one) else "")
        told.append(f"| {claim.text.removesuffix(' (Beauty)')} | {first} | {second} | {verdict} |")
    return "\n".join(told) if len(told) > 2 else ""


def _steps(found: dict[str, Runs], rows: Sequence[str]) -> str:
    steps = {record["steps"] for name in rows if name in found for record in found[name].records}
    return " or ".join(f"{count:,}" for count in sorted(steps))


def _figure(found: dict[str, Runs], name: str, family: str, metric: str) -> str:
    value = spread(found[name], family, metric) if name in found else None
    return "" if value is None else re.sub(r"\b0\.", ".", str(value))


def _mark(claim: Claim | None, judged: dict[str, Judged]) -> str:
    return MARKS[judged[claim.text].verdict] if claim and claim.text in judged else ""
