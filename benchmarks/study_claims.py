"""What docs/results.md puts side by side, and the claims that it holds against the runs of benchmarks/study.py."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import study


class Table(NamedTuple):
    """What stands side by side: rows of the study, and baselines by their folders CORPUS/ROW; a note says how."""

    title: str
    family: str
    rows: Sequence[str]
    baselines: Sequence[str] = ()
    note: str = ""


class Claim(NamedTuple):
    """That `better` is better than `worse`; each a row of the study, or a baseline as CORPUS/ROW.

    Attributes:
      text: what is claimed.
      family: of the metrics.
      better: whose figure should be higher; of RMSE lower.
      worse: the other.
      metric: of `better`.
      other_metric: of `worse`, if it is another one.
      times: `better` should be above so many times `worse`.
      caveat: what a reader should know of how it came about.
      choice: whether it is about a choice of the method, not about a task.
    """

    text: str
    family: str
    better: str
    worse: str
    metric: str = "ndcg@10"
    other_metric: str | None = None
    times: float = 1.0
    caveat: str = ""
    choice: bool = False


CORPORA = {"beauty": "Beauty", "toys": "Toys"}
CONVENTIONAL = ("popularity", "itemknn", "bprmf", "sasrec")
TASKS = {"retrieval_mim": "MIM", "retrieval_mlm": "MLM", "retrieval_aligned": "MIM + MLM"}


OF_TOKENS = (
    "In format `token` a row has 64 places for the input, and what is too long is cut to whole items: nearly every MLM "
    "sample has the text of one item, so it says nothing of which items go together. MIM isn't cut."
)
OF_DROPOUT = "Dropout is .1, and .2 in rows that end with `dropout`."
OF_RANKING = (
    "Evaluations choose among 100 candidates. Training chooses among 10 (RANKING_CANDIDATES), but for rows that "
    "end with `100`; nothing of it was tuned."
)
OF_FORMATS = (
    "At equal tokens a format with longer prompts is trained on fewer examples, and models of format `token` have one "
    "more embedding an item: formats differ in more than how an item is written."
)


def tables() -> list[Table]:
    """The tables, in the order of the page."""
    found = []
    for corpus, title in CORPORA.items():
        rows = [f"{corpus}_{item_format}_{mixture}" for item_format in ("token", "title") for mixture in study.MIXTURES]
        found.append(Table(f"Retrieval on {title}", "retrieval", rows, _baselines(f"amazon_{corpus}"), OF_TOKENS))
    title = "Retrieval on Beauty, trained for longer"
    rows = [*study.LONG, *study.LONG_DROPOUT]
    found.append(Table(title, "retrieval", rows, _baselines("amazon_beauty"), f"{OF_DROPOUT} {OF_TOKENS}"))
    shuffled = ("beauty_shuffled_token_retrieval_aligned",)
    title = "Retrieval on Beauty, equal timestamps shuffled"
    found.append(Table(title, "retrieval", shuffled, _baselines("amazon_beauty_shuffled")))
    for corpus, title in CORPORA.items():
        rows = [f"{corpus}_token_{mixture}" for mixture in ("ranking", "ranking_aligned")]
        rows += study.RANKING_100 if corpus == "beauty" else []
        found.append(Table(f"Ranking on {title}", "ranking", rows, _baselines(f"amazon_{corpus}"), OF_RANKING))
    rows = [f"movielens_token_{mixture}" for mixture in ("rating", "rating_aligned")]
    rated = ("movielens/mf_rating", "movielens/mf_rating_biases")
    found.append(Table("Rating on MovieLens-100K", "rating", rows, rated))
    choices = ("beauty_token_retrieval", "beauty_title_retrieval", "beauty_token_retrieval_aligned", *study.CHOICES)
    found.append(Table("Choices, on Beauty", "retrieval", choices, note=OF_FORMATS))
    return found


def _baselines(corpus: str) -> list[str]:
    return [f"{corpus}/{method}" for method in CONVENTIONAL]


def claims() -> list[Claim]:
    """What the method says, or would have to show, in the order of the page."""
    found = []
    for corpus, title in CORPORA.items():
        for item_format in ("token", "title"):
            alone = f"{corpus}_{item_format}_retrieval"
            for mixture, added in TASKS.items():
                text = f"{added} beside retrieval helps retrieval ({title}, {item_format})"
                cut = item_format == "token" and "MLM" in added
                caveat = "MLM of one item's text at a time" if cut else ""
                better = f"{corpus}_{item_format}_{mixture}"
                found.append(Claim(text, "retrieval", better, alone, caveat=caveat))
        for method, name in (("sasrec", "SASRec"), ("itemknn", "item-kNN")):
            text = f"The aligned model is above {name} ({title}, token)"
            aligned = f"{corpus}_token_retrieval_aligned"
            found.append(Claim(text, "retrieval", aligned, f"amazon_{corpus}/{method}"))
        if corpus == "beauty":
            for trained, (alone, aligned) in (
                ("Trained for longer", study.LONG),
                ("Trained for longer with more dropout", study.LONG_DROPOUT),
            ):
                for method, name in (("sasrec", "SASRec"), ("itemknn", "item-kNN")):
                    text = f"{trained}, the aligned model is above {name} ({title}, token)"
                    found.append(Claim(text, "retrieval", aligned, f"amazon_{corpus}/{method}"))
                text = f"{trained}, MIM + MLM beside retrieval helps retrieval ({title}, token)"
                found.append(Claim(text, "retrieval", aligned, alone))
        text = f"With titles the aligned model has more than twice the recall of popularity ({title})"
        aligned, popular = f"{corpus}_title_retrieval_aligned", f"amazon_{corpus}/popularity"
        found.append(Claim(text, "retrieval", aligned, popular, "recall@10", times=2.0))
    text = "MLM of the text of several items beside retrieval helps retrieval (Beauty, token)"
    found.append(Claim(text, "retrieval", study.MLM_WIDE, "beauty_token_retrieval", choice=True))
    for corpus, title in CORPORA.items():
        alone, aligned = f"{corpus}_token_ranking", f"{corpus}_token_ranking_aligned"
        found.append(Claim(f"BPR beside ranking helps ranking ({title})", "ranking", aligned, alone))
        text = f"Ranking + BPR is above SASRec ({title})"
        found.append(Claim(text, "ranking", aligned, f"amazon_{corpus}/sasrec"))
    text = "Training on as many candidates as are evaluated helps ranking (Beauty)"
    alone, aligned = study.RANKING_100
    found.append(Claim(text, "ranking", alone, "beauty_token_ranking", choice=True))
    text = "BPR beside ranking, trained on as many candidates as are evaluated, helps ranking (Beauty)"
    found.append(Claim(text, "ranking", aligned, alone))
    text = "Ranking + BPR, trained on as many candidates as are evaluated, is above SASRec (Beauty)"
    found.append(Claim(text, "ranking", aligned, "amazon_beauty/sasrec"))
    alone, aligned = "movielens_token_rating", "movielens_token_rating_aligned"
    found.append(Claim("BPR beside rating helps rating", "rating", aligned, alone, "rmse"))
    for name, row, caveat in (
        ("Rating alone", alone, "added when its first seed was known"),
        ("Rating + BPR", aligned, ""),
    ):
        text = f"{name} has a lower error than biased MF"
        found.append(Claim(text, "rating", row, "movielens/mf_rating", "rmse", caveat=caveat))
    plain = "beauty_token_retrieval"
    for text, better, worse in (
        ("Items as tokens are better than titles, at the same tokens", plain, "beauty_title_retrieval"),
        ("Items as tokens are better than digits, at the same tokens", plain, "beauty_id_retrieval"),
        ("Histories of 20 items are better than of 10", plain, f"{plain}_history_10"),
        ("Histories of 20 items are better than of 5", plain, f"{plain}_history_5"),
        ("Every prefix of a history as an example is better than the longest", plain, f"{plain}_no_prefixes"),
        ("Neighbours in the prompt help", f"{plain}_neighbours", plain),
        ("Mixing in proportion is better than equally", f"{plain}_aligned", f"{plain}_aligned_equal"),
    ):
        found.append(Claim(text, "retrieval", better, worse, choice=True))
    text = "Leaving the items of the history out helps"
    found.append(Claim(text, "retrieval", plain, plain, other_metric="ndcg@10_unfiltered", choice=True))
    return found
