"""`recalign report`: the page says what stands in the folders of runs, whatever they lack, and nothing else."""

import dataclasses
import html.parser
import importlib.metadata
import itertools
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import types
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from recalign_jax import cli
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.errors import InputError
from recalign_jax.reporting import comparisons, corpora, curves, figures, gin_text, recommendations, runs
from recalign_jax.reporting.labels import labels_of
from tests.corpora import prepare_shop

pytestmark = pytest.mark.usefixtures("fast_compilation")

USERS, ITEMS, LENGTH = 60, 40, 8
TINY = ("--gin_file", "gin_configs/models/t5_tiny.gin")
TRAIN = (
    *(*TINY, "--gin_file", "gin_configs/runs/finetune.gin", "--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token"),
    *("--gin.TRAIN_STEPS=6", "--gin.BATCH_SIZE=4", "--gin.LOG_PERIOD=2", "--gin.EVAL_PERIOD=3", "--gin.NUM_BEAMS=10"),
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 32}",
    *("--gin.InputOptions.window=64", "--gin.InputOptions.data_shards=2"),
)
SECTIONS = (
    *("summary", "metrics", "comparison", "curves", "slices", "throughput", "dataset", "prompts"),
    *("recommendations", "configuration", "versions"),
)
EVIL = "<script>alert('x')</script> & $lamp_1$"


def recalign(*arguments: str) -> None:
    assert cli.main([*arguments]) == 0


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> pathlib.Path:
    """Real runs over a small corpus: a training with two seeds, SASRec, popularity, and their evaluations."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    interactions = [
        (f"user{user}", f"thing{item}", time)
        for user in range(USERS)
        for time, item in enumerate(random.permutation(ITEMS)[:LENGTH])
    ]
    items = [{"item_id": f"thing{n}", "title": f"{EVIL} {n}"} for n in range(ITEMS)]
    prepare_shop(folder / "data", interactions, items, 120)
    data, words = ("--data_dir", str(folder / "data")), folder / "data" / "words.model"
    model_dir = folder / "runs" / "tiny" / "0"
    recalign("train", *data, *TRAIN, f"--gin.VOCABULARY={words}", f"--gin.MODEL_DIR={model_dir}")
    recalign("eval", *data, *TINY, "--gin_file", "gin_configs/runs/eval.gin", f"--gin.VOCABULARY={words}",
             "--gin.TASK_NAME=shop_retrieval_token", f"--gin.CHECKPOINT_PATH={model_dir}", "--gin.NUM_BEAMS=10",
             f"--gin.OUTPUT_DIR={model_dir}/evaluation")  # fmt: skip
    # Another seed of the same run: a copy with other figures.
    other = shutil.copytree(model_dir, folder / "runs" / "tiny" / "1")
    for name, before, after in (
        ("config.gin", "SEED = 0", "SEED = 1"),
        ("evaluation/metrics.json", r": 0\.0(?=\d)", ": 0.01"),
    ):
        text = (other / name).read_text()
        assert re.search(before, text)
        (other / name).write_text(re.sub(before, after, text))
    baseline = ("baseline", *data, "--corpus", "shop", "--family", "retrieval", "--method")
    recalign(*baseline, "popularity", "--output_dir", str(folder / "runs" / "popularity"))
    small = ("--gin.SasrecOptions.epochs=3", "--gin.SasrecOptions.width=8", "--gin.SasrecOptions.layers=1")
    sasrec = folder / "runs" / "sasrec"
    recalign(*baseline, "sasrec", *small, "--model_dir", str(sasrec / "model"), "--output_dir", str(sasrec))
    return folder


class Tree(html.parser.HTMLParser):
    """The page as an ElementTree; fails where an element isn't closed or closed twice."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text: str):
        super().__init__()
        self.root = ElementTree.Element("root")
        self._open = [self.root]
        self.feed(text)
        assert len(self._open) == 1, [element.tag for element in self._open]

    def handle_starttag(self, tag, attrs):
        element = ElementTree.SubElement(self._open[-1], tag, {name: value or "" for name, value in attrs})
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        ElementTree.SubElement(self._open[-1], tag, {name: value or "" for name, value in attrs})

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        before = self._open[-1]
        if len(before):
            before[-1].tail = (before[-1].tail or "") + data
        else:
            before.text = (before.text or "") + data


def text_of(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def table(section: ElementTree.Element, caption: str) -> dict[str, dict[str, str]]:
    """The first table whose caption begins so: row -> column -> text."""
    [found, *_] = [t for t in section.iter("table") if text_of(t.find("caption")).startswith(caption)]
    header = [text_of(cell) for cell in found.find("thead").iter("th")]
    rows = [[text_of(cell) for cell in row] for body in found.findall("tbody") for row in body]
    return {row[0]: dict(zip(header, row, strict=False)) for row in rows}


def report(folder: pathlib.Path, *arguments: str, runs: tuple[str, ...] = ("runs",)) -> tuple[str, dict]:
    """The page as text, and its sections by id."""
    output = folder / "report.html"
    where = [str(folder / name) for name in runs]
    recalign("report", "--data_dir", str(folder / "data"), "--runs", *where, "--output", str(output), *arguments)
    text = output.read_text(encoding="utf-8")
    return text, {section.get("id"): section for section in Tree(text).root.iter("section")}


@pytest.fixture(scope="module")
def made(shop) -> tuple[str, dict]:
    return report(shop, "--plots", str(shop / "plots"))


# The whole page.


def test_sections_and_headings(made):
    text, sections = made
    assert tuple(sections) == SECTIONS
    root = Tree(text).root
    levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch("h[1-6]", e.tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    links = [link.get("href") for link in root.find(".//nav").iter("a")]
    assert links == [f"#{name}" for name in SECTIONS]
    assert root.find("html").get("lang") == "en"


def test_ids_are_unique_and_all_that_is_referred_to_is_there(made):
    root = Tree(made[0]).root
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = {link[1:] for element in root.iter() for link in [element.get("href", "")] if link.startswith("#")}
    used |= set(re.findall(r"url\(#([\w-]+)\)", made[0]))
    assert used <= set(ids)


def test_nothing_is_fetched_and_no_script_runs(made):
    text, _ = made
    root = Tree(text).root
    assert not list(root.iter("script"))
    addresses = [element.get(name) for element in root.iter() for name in ("src", "href", "srcset", "data")]
    assert {address for address in addresses if address and not address.startswith("#")} == {"data:,"}
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]


def test_text_of_others_is_escaped(made):
    text, sections = made
    assert "<script" not in text
    assert any(text_of(item).startswith(EVIL) for item in sections["recommendations"].iter("li"))


def test_the_same_bytes_again(shop, made):
    before = {path.name: path.read_bytes() for path in (shop / "plots").iterdir()}
    again, _ = report(shop, "--plots", str(shop / "plots"))
    assert again == made[0]
    assert {path.name: path.read_bytes() for path in (shop / "plots").iterdir()} == before


def test_tables_and_figures_can_be_read_without_seeing_them(made):
    root = Tree(made[0]).root
    for found in root.iter("table"):
        assert text_of(found.find("caption"))
        assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in found.iter("th"))
    drawn = list(root.iter("figure"))
    assert len(drawn) > 10
    for figure in drawn:
        assert text_of(figure.find("figcaption"))
        assert figure.find("svg").get("role") == "img"
        assert len(figure.find("svg").get("aria-label")) > 20


# The numbers.


def test_metrics_are_those_of_the_files(shop, made):
    shown = table(made[1]["metrics"], "Retrieval, shop, test")
    told = json.loads((shop / "runs" / "popularity" / "metrics.json").read_text())["retrieval"]
    for metric, name in (
        ("recall@5", "Recall@5"),
        ("ndcg@10", "NDCG@10"),
        ("recall@10_unfiltered", "Recall@10 unfiltered"),
    ):
        low, high = told["intervals"][metric]
        assert shown["popularity"][name] == f"{told[metric]:.4f} {low:.4f}\u2013{high:.4f}"
    assert shown["popularity"]["Coverage@10"] == f"{told['coverage@10']:.4f}"
    assert shown["popularity"]["Users"] == str(USERS)


def test_seeds_are_one_row_with_their_deviation(shop, made):
    shown = table(made[1]["metrics"], "Retrieval, shop, test")
    assert len(shown) == 3
    values = [
        json.loads((shop / "runs" / "tiny" / seed / "evaluation" / "metrics.json").read_text())["retrieval"]["ndcg@10"]
        for seed in "01"
    ]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert shown["tiny 2 seeds"]["NDCG@10"] == f"{mean:.4f} ± {deviation:.4f}"
    told = [figure.find("svg").get("aria-label") for figure in made[1]["comparison"].iter("figure")]
    assert len(told) == 1
    assert f"tiny (2 seeds) {mean:.4f}" in told[0]


def test_runs_of_other_settings_are_no_seeds(shop, tmp_path):
    shutil.copytree(shop / "runs" / "tiny", tmp_path / "tiny")
    config = tmp_path / "tiny" / "1" / "config.gin"
    config.write_text(config.read_text().replace("LEARNING_RATE = ", "LEARNING_RATE = 1"))
    trained, evaluations = runs.find([str(tmp_path)])
    found = labels_of(trained, evaluations, lambda one: "shop")
    assert sorted(found.values()) == ["0", "1"]
    config.write_text((tmp_path / "tiny" / "0" / "config.gin").read_text())  # the same run again
    trained, evaluations = runs.find([str(tmp_path)])
    assert sorted(labels_of(trained, evaluations, lambda one: "shop").values()) == ["0", "1"]


def test_seeds_of_different_runs_in_one_folder_are_told_apart(shop, tmp_path):
    """Their paths have the same parts in common, and no seed of one is a seed of the other."""
    for name in ("narrow_s0", "narrow_s1", "wide_s0", "wide_s1"):
        run = shutil.copytree(shop / "runs" / "tiny" / name[-1], tmp_path / "study" / "tiny" / name)
        if name.startswith("wide"):
            config = (run / "config.gin").read_text()
            (run / "config.gin").write_text(config.replace("LEARNING_RATE = ", "LEARNING_RATE = 1"))
    trained, evaluations = runs.find([str(tmp_path)])
    found = labels_of(trained, evaluations, lambda one: "shop")
    assert sorted(found.values()) == 2 * ["narrow_s0, narrow_s1"] + 2 * ["wide_s0, wide_s1"]
    [comparison] = comparisons.compare(evaluations, found, lambda one: "shop", {})
    assert [row.detail for row in comparison.rows] == 2 * ["2 seeds"]


def compared(folder: pathlib.Path, other: pathlib.Path, change: dict) -> list[comparisons.Comparison]:
    """Comparisons of a copy of the shop's runs where the second seed's evaluation says something else."""
    shutil.copytree(folder / "runs", other / "runs")
    path = other / "runs" / "tiny" / "1" / "evaluation" / "metrics.json"
    told = json.loads(path.read_text())
    for name, values in change.items():
        told[name] = told[name] | values if isinstance(values, dict) else values
    path.write_text(json.dumps(told))
    trained, evaluations = runs.find([str(other / "runs")])
    found = labels_of(trained, evaluations, lambda one: "shop")
    return comparisons.compare(evaluations, found, lambda one: "shop", {"shop": load_corpus("shop", folder / "data")})


def test_other_cutoffs_are_shown(shop, tmp_path):
    """Of a single run, too: the seeds that lack them have none."""
    more = {"ndcg@100": 0.3, "ndcg@20": 0.2, "recall@20": 0.4, "mrr@20": 0.1, "recall@20_unfiltered": 0.1}
    [comparison] = compared(shop, tmp_path, {"retrieval": more, "options": {"num_beams": 100}})
    assert comparison.metrics[-3:] == ("recall@20", "ndcg@20", "ndcg@100")
    shown = [row for row in comparison.rows if "recall@20" in row.cells]
    assert [row.cells["recall@20"].value for row in shown] == [0.4]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"retrieval": {"users": 10, "ndcg@10": 0.99}}, "10 users"),
        ({"retrieval": {"ndcg@10": 0.99}, "options": {"filter_history": False}}, "history not filtered"),
        ({"retrieval": {"ndcg@10": 0.99}, "fingerprint": "0123456789abcdef"}, "corpus 01234567"),
    ],
)
def test_what_does_not_compare_stands_by_itself(shop, tmp_path, change, part):
    """Fewer users, lists that the history stays in, and another corpus of that name are no seeds of the others."""
    whole, apart = compared(shop, tmp_path, change)
    assert (whole.family, whole.part, apart.family, apart.part) == ("retrieval", "", "retrieval", part)
    assert [(row.label, row.cells["ndcg@10"].value) for row in apart.rows] == [("tiny", 0.99)]
    assert {row.label for row in whole.rows} == {"tiny", "popularity", "sasrec"}
    assert whole.best("ndcg@10") < 0.99
    assert all("seeds" not in row.detail for row in (*whole.rows, *apart.rows))


def made_up(**told) -> runs.Evaluation:
    """An evaluation of retrieval and ranking, without a run."""
    figures = {"retrieval": {"ndcg@10": 0.1, "users": 60}, "ranking": {"ndcg@10": 0.2, "users": 60}}
    return runs.Evaluation(pathlib.Path("a"), "a", {"split": "test", "fingerprint": "f"} | figures | told, None)


def rows_of(*evaluations: runs.Evaluation, corpus=None) -> dict[tuple[str, str], list[str]]:
    """(family, part) -> details of its rows, of evaluations that are called alike."""
    found = comparisons.compare(
        evaluations, dict.fromkeys(evaluations, "model"), lambda one: "shop", {"shop": corpus} if corpus else {}
    )
    return {(one.family, one.part): sorted(row.detail for row in one.rows) for one in found}


def test_other_candidates_are_no_seeds():
    usual, fewer = {"test_negatives": 99, "candidate_seed": 0}, {"test_negatives": 9, "candidate_seed": 0}
    found = rows_of(made_up(options=usual), made_up(options=fewer), made_up(method="popularity"))
    assert {key for key in found if key[0] == "ranking"} == {("ranking", ""), ("ranking", "test_negatives 9")}
    assert {key for key in found if key[0] == "retrieval"} == {("retrieval", "")}


def test_options_that_a_family_does_not_use_do_not_split_its_seeds():
    narrow, wide, older = ({"options": {"num_beams": 20}}, {"options": {"num_beams": 50}}, {})
    found = rows_of(made_up(**narrow), made_up(**wide), made_up(**older))
    retrieval = found["retrieval", ""]
    assert [detail.split(", a")[0] for detail in retrieval] == ["num_beams 20", "num_beams 50", "options not recorded"]
    assert all("num_beams" not in detail for detail in found["ranking", ""])
    worded = rows_of(*(made_up(options={"evaluation_wording": word}) for word in ("seen", "held_out")))
    assert all("evaluation_wording" in detail for details in worded.values() for detail in details)


def test_fewer_users_than_the_corpus_has_are_fewer(shop):
    """Also where none was evaluated on more: published figures are of all."""
    corpus = load_corpus("shop", shop / "data")
    few = made_up(retrieval={"ndcg@10": 0.1, "users": 10}, fingerprint=corpus.fingerprint)
    assert ("retrieval", "10 users") in rows_of(few, corpus=corpus)


def test_a_baseline_of_two_families_has_its_seeds_in_each():
    found = [
        runs.Run(pathlib.Path(family, str(seed)), f"{family}/{seed}", [], "a", {}, identity, {})
        for family in ("rating", "rating_random")
        for seed in (0, 1)
        for identity in [{"method": "mf", "seed": seed, "family": family}]
    ]
    called = labels_of(found, [], lambda one: "shop")
    assert [called[run] for run in found] == ["mf (rating)", "mf (rating)", "mf (rating_random)", "mf (rating_random)"]


def test_seeds_in_folders_without_a_common_name_are_called_by_all(tmp_path):
    found = [runs.Run(tmp_path / name, name, [], "a", {"SEED": n}, {}, {}) for n, name in enumerate(("s0", "s1"))]
    found = [dataclasses.replace(run, identity={"seed": n}) for n, run in enumerate(found)]
    assert set(labels_of(found, [], lambda one: "shop").values()) == {"s0, s1"}


def test_many_different_ratings_are_shown_in_bins(shop):
    corpus = load_corpus("shop", shop / "data")
    ratings = np.linspace(0, 10, corpus.num_interactions, dtype=np.float32)
    [panel] = [p for p in curves.of_corpus(dataclasses.replace(corpus, ratings=ratings)) if p.name == "ratings_shop"]
    assert "0 to 1: " in panel.description
    assert panel.description.count(" to ") == 10


def test_an_evaluation_that_does_not_say_its_split_is_of_no_corpus(shop):
    corpus = load_corpus("shop", shop / "data")
    _, evaluations = runs.find([str(shop / "runs")])
    fitting = [one for one in evaluations if corpora.is_of(one, corpus)]
    assert fitting
    told = {name: value for name, value in fitting[0].told.items() if name != "split"}
    assert not corpora.is_of(dataclasses.replace(fitting[0], told=told), corpus)


def test_prompts_are_not_shown_of_another_corpus(shop):
    [run, *_] = [run for run in runs.find([str(shop / "runs")])[0] if run.kind == "train"]
    found = {"shop": load_corpus("shop", shop / "data")}
    assert corpora.prompts(run, str(shop / "data"), found)
    other = dataclasses.replace(run, identity=run.identity | {"corpus shop": "0123"})
    with pytest.raises(InputError, match="Corpus shop can't be had as it was"):
        corpora.prompts(other, str(shop / "data"), found)


def test_lists_of_another_corpus_are_not_shown(shop, tmp_path):
    """Its users and targets can be the same, and its items others."""
    shutil.copytree(shop / "runs", tmp_path / "runs")
    shutil.copytree(shop / "data", tmp_path / "data")
    for path in (tmp_path / "runs").rglob("metrics.json"):
        if "popularity" not in str(path):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0123456789"}))
    _, sections = report(tmp_path)
    shown = text_of(sections["recommendations"])
    assert "corpus 01234567" not in shown
    assert len(list(sections["recommendations"].iter("mark"))) > 3  # popularity's


def test_seeds_that_were_decoded_differently_are_rows_of_their_own(shop, tmp_path):
    [comparison] = compared(shop, tmp_path, {"options": {"num_beams": 50}})
    details = {row.detail for row in comparison.rows if row.label == "tiny"}
    assert details == {"num_beams 10, step 6", "num_beams 50, step 6"}
    assert all("num_beams" not in row.detail for row in comparison.rows if row.label != "tiny")


def test_two_evaluations_of_one_run_that_lie_elsewhere_are_no_seeds(shop, tmp_path):
    run = shutil.copytree(shop / "runs" / "tiny" / "0", tmp_path / "tiny")
    for name, step in (("early", 3), ("late", 6), ("tiny/late", 6)):  # one lies in the run's folder
        folder = shutil.copytree(run / "evaluation", tmp_path / name)
        told = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(told | {"step": step, "model_dir": str(run)}))
    shutil.rmtree(run / "evaluation")
    trained, evaluations = runs.find([str(tmp_path)])
    found = labels_of(trained, evaluations, lambda one: "shop")
    [comparison] = comparisons.compare(evaluations, found, lambda one: "shop", {})
    assert sorted((row.label, row.detail) for row in comparison.rows) == [
        ("tiny", "early, step 3"),
        ("tiny", "late, step 6"),
        ("tiny", "late, step 6"),
    ]
    assert all(row.cells["ndcg@10"].deviation is None for row in comparison.rows)


def test_runs_and_the_best_of_them(shop, made):
    shown = table(made[1]["summary"], "Runs")
    assert {"tiny tiny/0", "tiny tiny/1", "sasrec sasrec/model", "popularity"} == set(shown)
    assert shown["tiny tiny/1"]["Seed"] == "1"
    assert shown["tiny tiny/0"]["Done"] == "6 of 6 steps"
    best = json.loads((shop / "runs" / "sasrec" / "model" / "best.json").read_text())
    assert shown["sasrec sasrec/model"]["Best on validation"] == f"{best['value']:.4f} NDCG@10, epoch {best['step']}"


def test_curves_hold_the_logged_values(shop, made):
    records = [json.loads(line) for line in (shop / "runs" / "tiny" / "0" / "metrics.jsonl").read_text().splitlines()]
    named = {f.get("id"): f.find("svg").get("aria-label") for f in made[1]["curves"].iter("figure")}
    assert f"tiny from {records[0]['loss']:.4g} to {records[-1]['loss']:.4g}" in named["training_loss"]
    assert {"training_loss_shop_mim_token", "validation_loss", "validation_ndcg_10", "training_loss_epochs"} <= set(
        named
    )
    assert "validation_z_loss" not in named


def test_slices_are_those_of_the_files(shop, made):
    told = json.loads((shop / "runs" / "popularity" / "metrics.json").read_text())["retrieval"]["slices"]
    shown = table(made[1]["slices"], "NDCG@10 of popularity")
    for fact, parts in told.items():
        for name, part in parts.items():
            row = shown[f"{fact.replace('_', ' ')} {name}"]
            assert row["NDCG@10"].startswith(f"{part['ndcg@10']:.4f} ")
            assert row["Users"] == str(part["users"])


def test_throughput_is_the_median(shop, made):
    records = [json.loads(line) for line in (shop / "runs" / "tiny" / "0" / "metrics.jsonl").read_text().splitlines()]
    median = statistics.median(record["packing_efficiency"] for record in records)
    assert table(made[1]["throughput"], "Medians")["tiny tiny/0"]["Packing efficiency"] == f"{median:.4g}"


def test_the_dataset_is_counted(made):
    shown = table(made[1]["dataset"], "shop")
    assert shown["interactions"]["Value"] == str(USERS * LENGTH)
    told = [figure.find("svg").get("aria-label") for figure in made[1]["dataset"].iter("figure")]
    assert f"8-15: {USERS}." in told[0]


def test_prompts_are_samples_of_every_task(made):
    shown = text_of(made[1]["prompts"])
    for family in ("retrieval", "mim", "mlm"):
        assert f"shop_{family}_token" in shown
    assert len(list(made[1]["prompts"].iter("dl"))) == 6
    assert "[masked item]" in shown
    assert re.search(r"Targets, 2 tokens <item_\d+>", shown)


def test_recommendations_are_the_lists_of_the_evaluation(shop):
    trained, evaluations = runs.find([str(shop / "runs")])
    corpus = load_corpus("shop", shop / "data")
    found = labels_of(trained, evaluations, lambda one: "shop")
    [comparison] = comparisons.compare(evaluations, found, lambda one: "shop", {"shop": corpus})
    row = recommendations.shown_row(comparison)
    people = recommendations.sample_users(comparison, corpus)
    assert [person.rank is not None for person in people] == [True] * 3 + [False] * 3
    users = {corpus.user_source_id(user): int(user) for user in corpus.evaluation_users}
    number = {f"{EVIL} {n}": f"thing{n}" for n in range(ITEMS)}
    from pyarrow import parquet

    rows = {one["user"]: one for one in parquet.read_table(row.evaluation.folder / "retrieval.parquet").to_pylist()}
    for person in people:
        assert [number[title] for title, _ in person.items] == rows[person.user]["items"]
        assert [n for n, (_, hit) in enumerate(person.items, 1) if hit] == ([person.rank] if person.rank else [])
        *history, target = [corpus.item_source_id(item) for item in corpus.sequence(users[person.user])]
        assert [number[title] for title in person.history] == history
        assert number[person.target] == target


def test_published_rows_stand_beside_their_corpus_only(shop):
    beauty = types.SimpleNamespace(name="amazon_beauty", num_users=22363, num_items=12101)
    [row] = [row for row in comparisons._published(beauty, "retrieval") if row.label == "TIGER"]
    assert row.cells["ndcg@10"].value == 0.0384
    assert "Rajput" in row.detail
    assert comparisons._published(types.SimpleNamespace(**vars(beauty) | {"num_users": 22364}), "retrieval") == []
    assert comparisons._published(load_corpus("shop", shop / "data"), "retrieval") == []


def test_plots_are_files_of_their_own(shop, made):
    names = {path.stem for path in (shop / "plots").glob("*.svg")}
    assert names == {path.stem for path in (shop / "plots").glob("*.png")}
    assert names == {figure.get("id") for figure in Tree(made[0]).root.iter("figure")}
    for path in (shop / "plots").glob("*.svg"):
        text = path.read_text()
        assert "var(" not in text
        assert "fill: #ffffff" in text  # its own ground
        ElementTree.fromstring(text)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (shop / "plots").glob("*.png"))


# What is missing or damaged.


def test_versions_are_those_of_the_runs_too(made):
    _, sections = made
    assert f"jax {importlib.metadata.version('jax')}" in text_of(sections["versions"])


def test_without_the_corpus_the_page_says_so(shop, tmp_path):
    shutil.copytree(shop / "runs", tmp_path / "runs")
    _, sections = report(tmp_path)
    assert tuple(sections) == SECTIONS
    assert "No corpus 'shop'" in text_of(sections["dataset"])
    assert "Left out" in text_of(sections["prompts"])
    assert "Left out" in text_of(sections["recommendations"])
    assert "tiny 2 seeds" in table(sections["metrics"], "Retrieval, shop, test")  # the checkpoints name the corpus


def test_another_corpus_of_that_name_is_not_shown(shop, tmp_path):
    shutil.copytree(shop / "runs", tmp_path / "runs")
    shutil.copytree(shop / "data", tmp_path / "data")
    metadata = tmp_path / "data" / "shop" / "corpus.json"
    metadata.write_text(metadata.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    _, sections = report(tmp_path)
    assert "is none of those that" in text_of(sections["dataset"])
    assert not list(sections["recommendations"].iter("li"))


def test_an_evaluation_alone(shop, tmp_path):
    shutil.copytree(shop / "runs" / "popularity", tmp_path / "runs")
    shutil.copytree(shop / "data", tmp_path / "data")
    _, sections = report(tmp_path)
    assert "popularity" in table(sections["metrics"], "Retrieval, shop, test")
    [path] = (tmp_path / "runs").rglob("metrics.json")
    told = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in told.items() if name != "corpus"}))
    _, sections = report(tmp_path)
    assert "The corpus is not recorded" in text_of(sections["metrics"])
    assert "Left out" in text_of(sections["curves"])
    _, sections = report(tmp_path, "--corpus", "shop")
    assert "popularity" in table(sections["metrics"], "Retrieval, shop, test")
    assert len(list(sections["recommendations"].iter("mark"))) > 3


def test_a_run_that_is_being_written(shop, tmp_path):
    shutil.copytree(shop / "runs" / "tiny" / "0", tmp_path / "runs", ignore=shutil.ignore_patterns("evaluation"))
    log = tmp_path / "runs" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + lines[1] + lines[2][:40])
    shutil.copytree(shop / "data", tmp_path / "data")
    _, sections = report(tmp_path)
    [row] = table(sections["summary"], "Runs").values()
    assert (row["State"], row["Done"]) == ("not finished", f"{json.loads(lines[1])['step']} of 6 steps")
    assert "No evaluation was found" in text_of(sections["summary"])


@pytest.mark.parametrize(
    "damage",
    ["empty log", "no config", "broken config", "undecodable config", "broken metrics", "broken parquet", "no gin"],
)
def test_a_damaged_run_still_has_a_page(shop, tmp_path, damage):
    shutil.copytree(shop / "runs" / "tiny" / "0", tmp_path / "runs")
    shutil.copytree(shop / "data", tmp_path / "data")
    file, content = {
        "empty log": ("metrics.jsonl", b""),
        "no config": ("config.gin", None),
        "broken config": ("config.gin", b"TRAIN_STEPS = (\n"),
        "undecodable config": ("config.gin", b"\xff"),
        "broken metrics": ("evaluation/metrics.json", b'{"retrieval": {'),
        "broken parquet": ("evaluation/retrieval.parquet", b"PAR1"),
        "no gin": ("config.gin", b"train.mixture_or_task_name = 'shop_all'\n"),
    }[damage]
    if content is None:
        (tmp_path / "runs" / file).unlink()
    else:
        (tmp_path / "runs" / file).write_bytes(content)
    _, sections = report(tmp_path)
    assert tuple(sections) == SECTIONS
    assert ("Left out" in text_of(sections["metrics"])) == (damage == "broken metrics")


def test_folders_without_runs_are_refused(tmp_path, capsys):
    for folder, what in ((tmp_path, "Nothing to show in"), (tmp_path / "none", "is no folder")):
        assert cli.main(["report", "--runs", str(folder), "--output", str(tmp_path / "report.html")]) == 2
        assert what in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


# Parts.


def test_gin_text():
    text = "import a.b\nA = 3\nB = {'x': (1, 'y')}\nC.d = %A\nC.e = @f()\nscope/C.g = \\\n    'long'\n"
    assert gin_text.values(text) == {"A": 3, "B": {"x": (1, "y")}, "C.d": 3, "C.e": "@f()", "C.g": "long"}
    assert gin_text.parameters(gin_text.values(text), "C") == {"d": 3, "e": "@f()", "g": "long"}
    assert gin_text.values("A = (") == {}


def test_thinning_keeps_the_extremes():
    random = np.random.default_rng(0)
    y = random.normal(size=10_000)
    y[[77, 5_000]] = 50, -50
    kept = figures._extremes(y)
    assert len(kept) <= figures._MAX_POINTS + 1
    assert {77, 5_000, 9_999} <= set(kept)
    assert np.array_equal(kept, np.sort(kept))
    assert np.array_equal(figures._extremes(y[:10]), np.arange(10))


def test_metric_names():
    assert curves.metric_name("ndcg@10_unfiltered") == "NDCG@10 unfiltered"
    assert curves.metric_name("rmse_argmax") == "RMSE argmax"
    assert curves.logged_title("validation_loss/shop_mim") == "Validation loss, shop_mim"
    assert curves.logged_title("validation_shop_ranking_hr@10") == "Validation HR@10, shop_ranking"


def test_an_svg_has_no_colours_of_its_own_in_the_page():
    series = [figures.Series(f"run {n}", n, [1, 2], [1.0, 2.0]) for n in range(9)]
    panel = figures.Panel("name", "title", "description", figures.lines(series, "steps", from_zero=False))
    assert not re.search(r"#[0-9a-f]{6}", figures.inline_svg(panel))


# In a browser.


@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(shop, made, tmp_path, width):
    """Nothing is wider than the window but what scrolls in its own box, and nothing is logged as an error."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium: apt-get install chromium")
    # A window of headless Chromium is never narrower than 500: the page is put into a frame.
    (tmp_path / "report.html").write_text(made[0], encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe src=report.html width={width} height=800 onload="let d = contentDocument.documentElement;'
        "document.title = [d.scrollWidth, d.clientWidth, contentDocument.querySelectorAll('figure').length]\"></iframe>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    command = [
        browser,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path}/frame.html",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    wide, window, drawn = map(int, re.search(r"<title>(\d+),(\d+),(\d+)</title>", result.stdout).groups())
    assert wide <= window
    assert drawn == len(list(Tree(made[0]).root.iter("figure")))
    assert "CONSOLE" not in result.stderr
