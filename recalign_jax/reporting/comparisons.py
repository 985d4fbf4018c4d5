"""What was evaluated alike stands side by side: a row a run, its seeds together, and published figures below."""

import collections
import functools
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from recalign_jax.corpus.candidates import CANDIDATE_SEED, NUM_TEST_NEGATIVES
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.reporting.corpora import fingerprint_of
from recalign_jax.reporting.runs import Evaluation, Run
from recalign_jax.training import steering

# family -> its metrics in a table, and the one of bars and slices.
METRICS = {
    "retrieval": (
        *("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@10_unfiltered", "ndcg@10_unfiltered"),
        *("coverage@10", "popularity_bias@10"),
    ),
    "ranking": ("hr@1", "hr@5", "ndcg@5", "hr@10", "ndcg@10", "mrr@10"),
    "rating": ("rmse", "mae", "rmse_argmax", "mae_argmax"),
}
MAIN = {"retrieval": "ndcg@10", "ranking": "ndcg@10", "rating": "rmse"}
# Options of an evaluation by family. Figures of other values than these don't compare with the others.
_USUAL: dict[str, dict[str, Any]] = {
    "retrieval": {"filter_history": True},
    "ranking": {"test_negatives": NUM_TEST_NEGATIVES, "candidate_seed": CANDIDATE_SEED},
    "rating": {},
}
# Those that tell rows apart: how a model was asked.
_PROMPT = ("max_input_tokens", "history_length", "max_item_tokens", "item_fields", "neighbours", "evaluation_wording")
_ASKED = {
    "retrieval": ("num_beams", "scores", "length_penalty", *_PROMPT),
    "ranking": ("scores", "length_penalty", *_PROMPT),
    "rating": (*_PROMPT, "rating_history"),
}
_RANDOM = " of the random 8:1:1"
_OTHER_CUTOFF = re.compile(r"(recall|ndcg)@(\d+)")
_PUBLISHED_SPLITS = {"retrieval": "test", "ranking": "test", "rating": f"test{_RANDOM}"}
_PUBLISHED = pathlib.Path(__file__).parent / "published.json"


class Cell(NamedTuple):
    """A figure with what is known of its spread: a 95 % interval over users, or the deviation over seeds."""

    value: float
    interval: tuple[float, float] | None = None
    deviation: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Of the interval, or a deviation below and above."""
        if self.deviation is None:
            return self.interval
        return self.value - self.deviation, self.value + self.deviation


class Row(NamedTuple):
    """What one run, or the seeds of one, reached.

    Attributes:
      label: of the run.
      detail: what else is to say, as the number of seeds or a source.
      cells: by metric; what isn't known is missing.
      users: on how many it was evaluated; None of a published row.
      slices: fact -> part -> (cell of the main metric, users).
      evaluation: where it stands, of several seeds the first one's; None of a published row.
    """

    label: str
    detail: str
    cells: dict[str, Cell]
    users: int | None
    slices: dict[str, dict[str, tuple[Cell, int]]]
    evaluation: Evaluation | None


class Comparison(NamedTuple):
    """Rows of one family on one split of a corpus ("" where nothing says which).

    `part` says what keeps them from being compared with others of these: fewer users, another corpus of that name,
    lists that the history stays in, other candidates; "" of the others.
    """

    corpus: str
    split: str
    family: str
    part: str
    metrics: tuple[str, ...]
    rows: list[Row]
    published: list[Row]

    @property
    def main(self) -> str:
        return MAIN[self.family]

    def best(self, metric: str) -> float | None:
        """The best value of a metric among our rows; None if there is no better, or nothing to compare."""
        values = [row.cells[metric].value for row in self.rows if metric in row.cells]
        if len(values) < 2 or metric.startswith(("coverage", "popularity")):
            return None
        return min(values) if lower_is_better(metric) else max(values)


def lower_is_better(metric: str) -> bool:
    return bool(steering.LOWER_IS_BETTER.search(metric))


def compare(
    evaluations: Sequence[Evaluation],
    labels: dict[Run | Evaluation, str],
    corpus_of: Callable[[Run | Evaluation], str],
    corpora: dict[str, Corpus],
) -> list[Comparison]:
    """Puts evaluations of one corpus, split and family together, the seeds of a run in one row, the best row first.

    Of several evaluations of one run each has a row of its own, and so have seeds that were asked differently. What
    doesn't compare with the others stands by itself, see `Comparison.part`.
    """
    placed: dict[tuple[str, str, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        for family in METRICS:
            if evaluation.told.get(family, {}).get(MAIN[family]) is not None:
                placed.setdefault((corpus_of(evaluation), _split(evaluation, family), family), []).append(evaluation)
    grouped: dict[tuple[str, str, str, str], list[Evaluation]] = {}
    for (corpus, split, family), members in placed.items():
        for part, comparable in _comparable(members, corpus, family, corpora.get(corpus)).items():
            grouped[corpus, split, family, part] = comparable
    order = list(METRICS)
    found = []
    for corpus, split, family, part in sorted(grouped, key=lambda key: (*key[:2], order.index(key[2]), key[3])):
        members, main = grouped[corpus, split, family, part], MAIN[family]
        rows = [_row(label, detail, seeds, family) for label, detail, seeds in _groups(members, labels, family)]
        sign = 1 if lower_is_better(main) else -1
        rows.sort(key=lambda row: (sign * row.cells[main].value, row.label))
        whole = split == _PUBLISHED_SPLITS[family] and not part
        published = _published(corpora.get(corpus), family) if whole else []
        known = {metric for row in (*rows, *published) for metric in row.cells}
        shown = tuple(metric for metric in (*METRICS[family], *_at_other_cutoffs(known)) if metric in known)
        found.append(Comparison(corpus, split, family, part, shown, rows, published))
    return found


def _comparable(
    members: Sequence[Evaluation], name: str, family: str, corpus: Corpus | None
) -> dict[str, list[Evaluation]]:
    """Evaluations on one split of a corpus, by what keeps them from being compared with others: `Comparison.part`."""
    fingerprints = {fingerprint for member in members if (fingerprint := fingerprint_of(member, name))}
    expected = {corpus.fingerprint} if corpus else fingerprints if len(fingerprints) == 1 else set()
    apart: dict[str, list[Evaluation]] = {}
    for member in members:
        fingerprint = fingerprint_of(member, name)
        other = f"corpus {fingerprint[:8]}" if fingerprint and fingerprint not in expected else ""
        apart.setdefault(", ".join(filter(None, (other, *_unusual(member, family)))), []).append(member)
    found: dict[str, list[Evaluation]] = {}
    for reason, alike in apart.items():
        most = max(_users(member, family) for member in alike)
        if corpus and "corpus " not in reason and not _split(alike[0], family).endswith(_RANDOM):
            most = max(most, len(corpus.evaluation_users))
        for member in alike:
            count = _users(member, family)
            fewer = f"{count:,} users" if 0 < count < most else ""
            found.setdefault(", ".join(filter(None, (reason, fewer))), []).append(member)
    return found


def _unusual(evaluation: Evaluation, family: str) -> Iterator[str]:
    """In what it is not as evaluations are."""
    for name, usual in _USUAL[family].items():
        value = _options(evaluation).get(name, usual)
        if value != usual:
            yield "history not filtered" if name == "filter_history" else f"{name} {value}"


def _options(evaluation: Evaluation) -> dict[str, Any]:
    """How it was made; empty where nothing says it."""
    return evaluation.told.get("options", {})


def _groups(
    members: Sequence[Evaluation], labels: dict[Run | Evaluation, str], family: str
) -> list[tuple[str, str, list[Evaluation]]]:
    """(label, what tells it from others of this label, the evaluations of a row).

    One with a run twice is split: the same again is no other seed.
    """
    of_all = [_options(member) for member in members]
    values = {name: {repr(options[name]) for options in of_all if name in options} for name in _ASKED[family]}
    varying = [name for name, different in values.items() if len(different) > 1]
    by_label: dict[tuple[str, str, str], list[Evaluation]] = {}
    for member in members:
        asked = ", ".join(f"{name} {_options(member)[name]}" for name in varying if name in _options(member))
        if any(values.values()) and not _options(member) and "method" not in member.told:
            asked = "options not recorded"
        by_label.setdefault((labels[member.run or member], _place(member), asked), []).append(member)
    found = []
    places = collections.Counter(label for label, _ in {(label, place) for label, place, _ in by_label})
    for (label, place, asked), group in by_label.items():
        detail = ", ".join(filter(None, (place if places[label] > 1 else "", asked)))
        if len({member.run for member in group}) == len(group):
            found.append((label, detail, group))
        else:
            found += [(label, ", ".join(filter(None, (member.name, asked))), [member]) for member in group]
    return found


def _split(evaluation: Evaluation, family: str) -> str:
    """The split; a random one of ratings isn't that of leave-one-out."""
    random = any("_rating_random" in task for task in evaluation.told.get("tasks", ()))
    return evaluation.told.get("split", "") + (_RANDOM if family == "rating" and random else "")


def _users(evaluation: Evaluation, family: str) -> int:
    """On how many it was evaluated; 0 where nothing says it."""
    return evaluation.told.get(family, {}).get("users", 0)


def _place(evaluation: Evaluation) -> str:
    """Where an evaluation lies in its run's folder, which tells several of one run apart; else ""."""
    if evaluation.run is None or evaluation.run.folder not in evaluation.folder.parents:
        return ""
    return str(evaluation.folder.relative_to(evaluation.run.folder))


def _row(label: str, detail: str, members: Sequence[Evaluation], family: str) -> Row:
    summaries = [member.told[family] for member in members]
    details = [detail, f"{len(members)} seeds" if len(members) > 1 else ""]
    steps = sorted({member.told["step"] for member in members if "step" in member.told})
    if len(members) == 1 or len(steps) > 1:
        details += [f"step {step:,}" for step in steps]
    names = (*METRICS[family], *(_at_other_cutoffs(summaries[0]) if family == "retrieval" else ()))
    cells = {metric: cell for metric in names if (cell := _cell(summaries, metric))}
    slices: dict[str, dict[str, tuple[Cell, int]]] = {}
    for fact, parts in summaries[0].get("slices", {}).items():
        for name, part in parts.items():
            of_all = [summary.get("slices", {}).get(fact, {}).get(name, {}) for summary in summaries]
            if cell := _cell(of_all, MAIN[family]):
                slices.setdefault(fact, {})[name] = (cell, part["users"])
    return Row(label, ", ".join(filter(None, details)), cells, summaries[0].get("users"), slices, members[0])


def _at_other_cutoffs(names: Iterable[str]) -> list[str]:
    """Recall and NDCG of retrieval that CUTOFFS asked for beside the usual ones, the shortest lists first."""
    found = [match for name in names if name not in METRICS["retrieval"] and (match := _OTHER_CUTOFF.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[2]), match[1] != "recall"))]


def _cell(summaries: Sequence[dict[str, Any]], metric: str) -> Cell | None:
    values = [summary[metric] for summary in summaries if summary.get(metric) is not None]
    if len(values) < len(summaries):
        return None
    if len(values) > 1:
        return Cell(statistics.mean(values), deviation=statistics.stdev(values))
    interval = summaries[0].get("intervals", {}).get(metric)
    return Cell(values[0], interval and tuple(interval))


@functools.cache
def _papers() -> dict[str, Any]:
    return json.loads(_PUBLISHED.read_text(encoding="utf-8"))


def sources(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """The papers that published rows are from, by how they are quoted."""
    quoted = {row.detail for comparison in comparisons for row in comparison.published}
    return [(name, title) for name, title in _papers()["sources"].items() if name in quoted]


def _published(corpus: Corpus | None, family: str) -> list[Row]:
    """Published rows for a corpus that is the one of the papers: by its name, users and items."""
    about = _papers()["corpora"].get(corpus.name, {}) if corpus else {}
    if corpus is None or (about.get("users"), about.get("items")) != (corpus.num_users, corpus.num_items):
        return []
    table = about.get(family, {"rows": []})
    return [
        Row(name, source, cells, None, {}, None)
        for name, source, values in table["rows"]
        if (cells := {m: Cell(v) for m, v in zip(table["metrics"], values, strict=True) if v is not None})
    ]
