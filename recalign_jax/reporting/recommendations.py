"""What sample users were recommended, next to what they took."""

from typing import NamedTuple

from recalign_jax.corpus import catalog
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.reporting.comparisons import Comparison, Row
from recalign_jax.reporting.corpora import user_rows

HITS, MISSES = 3, 3
_HISTORY = 10


class Recommended(NamedTuple):
    """A user whose next item is known.

    Attributes:
      user: id of the source.
      history: titles of the newest items, oldest first.
      more: how many older ones there are.
      target: title of the next item.
      rank: of the target; None where it isn't among the items.
      items: (title, whether it is the target) of what was recommended, best first.
      others: (label, rank or None) in other rows.
    """

    user: str
    history: list[str]
    more: int
    target: str
    rank: int | None
    items: list[tuple[str, bool]]
    others: list[tuple[str, int | None]]


def shown_row(comparison: Comparison) -> Row:
    """Whose lists are shown: of the language model's rows the best one, else the best of all."""
    models = [row for row in comparison.rows if row.evaluation and "method" not in row.evaluation.told]
    return [*models, *comparison.rows][0]


def sample_users(comparison: Comparison, corpus: Corpus) -> list[Recommended]:
    """The first users whose target is among the recommended items, and the first for whom it isn't.

    Users are numbered at random, so the first ones are a random sample. Empty where the rows of users are missing.
    """
    row = shown_row(comparison)
    if row.evaluation is None:
        return []
    found = user_rows(row.evaluation, "retrieval", ("user", "target", "rank", "items"))
    hits = [n for n, one in enumerate(found) if one["rank"] is not None][:HITS]
    misses = [n for n, one in enumerate(found) if one["rank"] is None][:MISSES]
    others = [
        (other.label, {one["user"]: one["rank"] for one in user_rows(other.evaluation, "retrieval", ("user", "rank"))})
        for other in comparison.rows
        if other.evaluation is not None and other is not row
    ]

    def title(source_id: str) -> str:
        return catalog.title_text(corpus, corpus.item_numbers[source_id])

    chosen = []
    for n in (*hits, *misses):
        one = found[n]
        history = corpus.history(int(corpus.evaluation_users[n]), comparison.split)
        chosen.append(
            Recommended(
                user=one["user"],
                history=[catalog.title_text(corpus, int(item)) for item in history[-_HISTORY:]],
                more=max(len(history) - _HISTORY, 0),
                target=title(one["target"]),
                rank=one["rank"],
                items=[(title(item), item == one["target"]) for item in one["items"]],
                others=[(label, ranks[one["user"]]) for label, ranks in others if one["user"] in ranks],
            )
        )
    return chosen
