"""The evaluators: prompts are those of the tasks, scores those of every sequence by itself, and numbers add up."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pyarrow import parquet

from recalign_jax import partitioning, recommender
from recalign_jax.checkpoint.locations import read_best
from recalign_jax.commands import baseline, common, eval, train
from recalign_jax.errors import InputError, RunError
from recalign_jax.evaluation import ranking, rating, report, results, retrieval
from recalign_jax.evaluation.results import EvaluationOptions, Result
from recalign_jax.evaluation.slices import PARTS, slices
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.recommender import DecodingOptions
from recalign_jax.training.steering import best_evaluation, write_best
from seqio_tasks import examples, samples, specs, writing
from seqio_tasks.specs import TaskOptions
from seqio_tasks.writing import Limits
from tests.corpora import call, prepared, write_tables
from tests.reference_scores import sequence_scores

pytestmark = pytest.mark.usefixtures("fast_compilation")

ALL = EvaluationOptions()
USERS = 11  # one batch and a part of one
DECODING = DecodingOptions(num_beams=20, batch_size=8, max_input_tokens=128)
NEGATIVES = 40  # a user of the shop who met more than 20 of its 60 items has fewer


@pytest.fixture(scope="module")
def make_spec(shop_corpus, shop_words):
    def make(family: str, item_format: str = "title", **options):
        return specs.make_spec(shop_corpus, family, item_format, shop_words, TaskOptions(**options))

    return make


@pytest.fixture(scope="module")
def model(make_spec):
    """A model of random parameters."""
    config = T5Config(
        emb_dim=16, num_heads=2, head_dim=8, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=32,
        vocab_size=384, num_tokens=make_spec("retrieval").num_tokens, activation_dtype="float32",
    )  # fmt: skip
    random = np.random.default_rng(0)
    shapes = t5.abstract_params(config)
    return t5.graph(config), jax.tree.map(lambda leaf: np.float32(random.normal(0, 0.5, leaf.shape)), shapes)


@pytest.fixture(scope="module")
def sharding():
    return partitioning.batch_sharding(partitioning.make_mesh({"data": -1}))


@pytest.fixture(scope="module")
def likelihoods(model):
    """(prompt, sequences) -> log p(sequence | prompt), teacher-forced, each by itself: [n]."""

    @jax.jit
    def scores(params, tokens, targets):
        inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        return sequence_scores(nnx.merge(model[0], params)(tokens, inputs), targets)

    def of(prompt: np.ndarray, targets: np.ndarray) -> np.ndarray:
        tokens = np.zeros((len(targets), 128), np.int32)
        tokens[:, : len(prompt)] = prompt
        return np.array(scores(model[1], tokens, targets))

    return of


# The model's answers.


@pytest.mark.parametrize("limit", [60, 256, writing.NO_LIMIT])
@pytest.mark.parametrize("wording", ["seen", "held_out"])
def test_prompts_are_those_of_the_held_out_samples(make_spec, limit, wording):
    limits = Limits(limit, writing.NO_LIMIT)
    spec = make_spec("ranking", neighbours=2, evaluation_wording=wording)
    before = {"seen": "Choose one :", "held_out": "One of these follows :"}[wording]
    queries = retrieval.evaluation_queries(spec.corpus, "validation", ALL)
    for index, (query, items) in enumerate(
        zip(queries, ranking.candidates(spec.corpus, "validation", queries), strict=True)
    ):
        items = items[items >= 0]
        prompt = samples.write_choice(spec, query, items, limit)
        np.testing.assert_array_equal(prompt, samples.render(spec, "validation", index, limits=limits).inputs)
        whole = samples.write_choice(spec, query, items, writing.NO_LIMIT)
        texts = [spec.vocabulary.decode(tokens[:-1]).split(before) for tokens in (prompt, whole)]
        (history, candidates), (whole_history, every) = ((a.split("Others with")[0], b) for a, b in texts)
        assert samples.shows(spec, query, items, limit) == (candidates == every, history == whole_history)
    for family in ("rating", "rating_random"):
        for history in (True, False):
            spec = make_spec(family, rating_history=history, evaluation_wording=wording)
            for index, query in enumerate(rating.evaluation_queries(spec.corpus, "test", family, ALL)):
                expected = samples.render(spec, "test", index, limits=limits).inputs
                np.testing.assert_array_equal(samples.write_rating(spec, query, limit), expected)


def test_candidates_are_those_of_the_task(make_spec, capsys):
    """All of them, also where the corpus has no hundred items to choose from."""
    spec = make_spec("ranking", candidate_seed=3)
    queries = retrieval.evaluation_queries(spec.corpus, "test", ALL)
    found = ranking.candidates(spec.corpus, "test", queries, seed=3)
    sizes = [(row >= 0).sum() for row in found]
    said = " ".join(capsys.readouterr().err.split())
    assert f"shop has 60 items, so users have {min(sizes)} to {max(sizes)} candidates, not 100" in said
    ranking.candidates(spec.corpus, "test", queries, min(sizes) - 1)
    assert "candidates" not in capsys.readouterr().err
    words = spec.vocabulary
    for query, row in zip(queries, found, strict=True):
        items = row[row >= 0]
        assert set(items) == set(range(60)) - set(spec.corpus.sequence(query.user).tolist()) | {query.target}
        assert (row[len(items) :] == -1).all()
    shown = words.decode(samples.render(spec, "test", 0).inputs).split("Choose one :")[1]
    titles = [words.decode(spec.displays.of(item)) for item in found[0][found[0] >= 0]]
    assert [title.strip() for title in shown.rstrip(" .").split(";")] == titles


def test_scores_of_candidates_are_their_likelihoods(make_spec, model, likelihoods, sharding):
    """Of items that share prefixes, or a whole title; also of those that the prompt had no room for."""
    spec = make_spec("ranking", test_negatives=NEGATIVES)
    queries = retrieval.evaluation_queries(spec.corpus, "test", ALL)[:USERS]
    candidates = ranking.candidates(spec.corpus, "test", queries, NEGATIVES)
    assert (candidates == -1).any()
    _, title, count = np.unique(spec.catalog.tokens, axis=0, return_inverse=True, return_counts=True)
    candidates[0, :2] = np.flatnonzero(count[title] == 2)
    candidates[0, 2:] = np.setdiff1d(np.arange(60), candidates[0, :2])[: NEGATIVES - 1]
    assert not all(samples.shows(spec, *pair, 128)[0] for pair in zip(queries, candidates, strict=True))
    score = recommender.make_scorer(spec, model[0], DECODING, sharding)(model[1])
    [scores] = results.gather(score(queries, candidates), USERS, "")
    for query, row, found in zip(queries, candidates, scores, strict=True):
        items = row[row >= 0]
        expected = likelihoods(samples.write_choice(spec, query, items, 128), spec.catalog.tokens)
        np.testing.assert_allclose(found[: len(items)], expected[items], atol=1e-4)
        assert (found[len(items) :] == -np.inf).all()
    assert scores[0, 0] == scores[0, 1]


@pytest.mark.parametrize("family", ["rating", "rating_random"])
def test_ratings_are_expectations_over_all_values(make_spec, model, likelihoods, sharding, family):
    spec = make_spec(family)
    queries = rating.evaluation_queries(spec.corpus, "test", family, ALL)[:USERS]
    predict = recommender.make_rater(spec, model[0], DECODING, sharding)(model[1])
    expected, likely = results.gather(predict(queries), USERS, "")
    values = np.arange(1, 5.5, 0.5)  # of the shop
    assert set(np.unique(spec.corpus.ratings)) == set(values)
    sequences = [[*writing.rating_tokens(spec.vocabulary, value), 1] for value in values]
    targets = np.asarray([row + [0] * (8 - len(row)) for row in sequences], np.int32)
    for query, mean, best in zip(queries, expected, likely, strict=True):
        prompt = samples.write_rating(spec, query, 128)
        likelihood = np.exp(likelihoods(prompt, targets).astype(np.float64))
        assert mean == pytest.approx((likelihood * values).sum() / likelihood.sum(), abs=1e-4)
        assert best == values[likelihood.argmax()]


def test_an_unknown_way_to_score_is_an_input_error():
    with pytest.raises(InputError, match="Did you mean 'trie'"):
        DecodingOptions(scores="tri")


# What evaluations make of answers.


def test_retrieval_counts_what_the_lists_hold(shop_corpus):
    """Against a recommender whose answers are known: the target second for every other user, absent for the rest."""
    queries = retrieval.evaluation_queries(shop_corpus, "validation", ALL)

    def recommend(asked, excluded):
        for number in reversed(range(len(asked))):
            others = np.setdiff1d(np.arange(12), [asked[number].target])[:10]
            items = np.insert(others, 1, asked[number].target)[:10] if number % 2 == 0 else others
            yield np.asarray([number]), items[None].astype(np.int32), np.zeros((1, 10), np.float32)

    result = retrieval.evaluate(shop_corpus, recommend, queries, ALL)
    values = report.summary(result)
    hits = (len(queries) + 1) // 2 / len(queries)
    for ending in ("", "_unfiltered"):
        for k in (5, 10):
            assert values[f"recall@{k}{ending}"] == values[f"hr@{k}{ending}"] == pytest.approx(hits)
            assert values[f"ndcg@{k}{ending}"] == pytest.approx(hits / np.log2(3))
            assert values[f"mrr@{k}{ending}"] == values[f"map@{k}{ending}"] == pytest.approx(hits / 2)
        low, high = values["intervals"][f"recall@10{ending}"]
        spread = 1.96 * math.sqrt(hits * (1 - hits) / len(queries))
        assert (high - low) / 2 == pytest.approx(spread, rel=0.2)
    assert values["users"] == len(queries) == len(shop_corpus.evaluation_users)
    np.testing.assert_array_equal(result.facts["rank"], [2 * (n % 2 == 0) for n in range(len(queries))])
    popularity = shop_corpus.training_popularity
    assert values["coverage@10"] == pytest.approx(len(np.unique(result.facts["items"])) / 60)
    bias = popularity[result.facts["items"]].mean() / popularity[result.facts["target"]].mean()
    assert values["popularity_bias@10"] == pytest.approx(bias)


def test_a_target_stands_behind_all_that_have_its_score(shop_corpus):
    queries = retrieval.evaluation_queries(shop_corpus, "test", ALL)
    candidates = ranking.candidates(shop_corpus, "test", queries, NEGATIVES)
    random = np.random.default_rng(0)
    scores = np.where(candidates >= 0, random.integers(0, 4, candidates.shape), -np.inf).astype(np.float32)

    def score(asked, items):
        for part in np.array_split(random.permutation(len(asked)), 3):
            yield part, scores[part]

    result = ranking.evaluate(shop_corpus, score, queries, candidates)
    targets = np.asarray([query.target for query in queries])
    own = scores[candidates == targets[:, None]]
    ranks = (scores >= own[:, None]).sum(axis=1)
    np.testing.assert_array_equal(result.facts["rank"], ranks)
    values = report.summary(result)
    for k in (1, 5, 10):
        assert values[f"hr@{k}"] == pytest.approx((ranks <= k).mean())
    assert values["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())
    assert values["ndcg@5"] == pytest.approx(np.where(ranks <= 5, 1 / np.log2(ranks + 1), 0).mean())


def rating_result(corpus) -> Result:
    queries = rating.evaluation_queries(corpus, "test", "rating", ALL)
    random = np.random.default_rng(0)
    predictions = random.uniform(1, 5, len(queries)).astype(np.float32)
    return rating.evaluate(corpus, lambda asked: [(np.arange(len(asked)), predictions, np.round(predictions))], queries)


def test_rating_errors(shop_corpus):
    result = rating_result(shop_corpus)
    values, facts = report.summary(result), result.facts
    for ending, name in (("", "expected"), ("_argmax", "most_likely")):
        errors = facts[name].astype(np.float64) - facts["rating"]
        assert values[f"rmse{ending}"] == pytest.approx(np.sqrt((errors**2).mean()), abs=1e-6)
        assert values[f"mae{ending}"] == pytest.approx(np.abs(errors).mean(), abs=1e-6)
        low, high = values["intervals"][f"rmse{ending}"]
        assert low < values[f"rmse{ending}"] < high


def test_a_sample_of_random_ratings_is_of_users_everywhere(shop_corpus):
    """The part is in the order of users: its first ratings would be those of a few users."""
    whole = rating.evaluation_queries(shop_corpus, "test", "rating_random", ALL)
    assert len(whole) == shop_corpus.num_interactions // 10
    assert [query.user for query in whole] == sorted(query.user for query in whole)
    count = len(whole) // 3
    some = rating.evaluation_queries(shop_corpus, "test", "rating_random", EvaluationOptions(max_users=count))
    asked = [(query.user, query.target) for query in some]
    assert len(set(asked)) == count
    assert set(asked) <= {(query.user, query.target) for query in whole}
    assert some[-1].user > whole[2 * count].user
    again = rating.evaluation_queries(shop_corpus, "test", "rating_random", EvaluationOptions(max_users=count))
    assert [(query.user, query.target) for query in again] == asked


@pytest.mark.parametrize("family", ["rating", "rating_random"])
def test_popularity_of_a_target_is_that_of_its_own_training_part(shop_corpus, family, capsys):
    queries = rating.evaluation_queries(shop_corpus, "test", family, ALL)

    def predict(asked):
        return [(np.arange(len(asked)), np.ones(len(asked), np.float32), np.ones(len(asked), np.float32))]

    result = rating.evaluate(shop_corpus, predict, queries, family)
    rows_of = {"rating": "users", "rating_random": "ratings"}[family]
    report.publish([("title", result)], shop_corpus, {}, None)
    assert f"All {len(queries)} {rows_of}" in capsys.readouterr().out
    train = examples.random_part(shop_corpus, "train") if family == "rating_random" else shop_corpus.in_training
    expected = [int((shop_corpus.items[train] == query.target).sum()) for query in queries]
    assert result.facts["target_popularity"].tolist() == expected


@pytest.mark.parametrize("answers", [[0, 1, 1], [0, 2], []])
def test_every_query_is_answered_once(answers):
    with pytest.raises((AssertionError, ValueError)):
        results.gather([(np.asarray([number]), np.zeros(1)) for number in answers], 3, "")


def test_slices_share_the_users_out_and_average_to_the_whole(shop_corpus):
    result = rating_result(shop_corpus)
    summary = report.summary(result)
    assert set(summary["slices"]) == set(PARTS)
    for fact in PARTS:
        parts = [part for part in slices(result) if part.fact == fact]
        assert sorted(np.concatenate([part.rows for part in parts])) == list(range(len(result)))
        mean = sum(part.estimates["mae"].value * len(part.rows) for part in parts) / len(result)
        assert mean == pytest.approx(summary["mae"])
        assert list(summary["slices"][fact]) == [part.name for part in parts]
        for part in parts:
            told = summary["slices"][fact][part.name]
            assert told["users"] == len(part.rows)
            assert told["intervals"]["rmse"][0] <= told["rmse"] <= told["intervals"]["rmse"][1]
    names = {fact: {part.name: set(result.facts[fact][part.rows]) for part in slices(result) if part.fact == fact}
             for fact in PARTS}  # fmt: skip
    assert names["history_length"]["1-4"] <= {1, 2, 3, 4}
    assert min(names["history_length"]["20-49"]) >= 20
    assert names["target_popularity"].get("unseen", {0}) == {0}
    assert min(names["target_popularity"]["5-19"]) >= 5


def test_baseline_with_a_row_a_user(shop_corpus, tmp_path):
    flags = ("--corpus", "shop", "--method", "popularity", "--output_dir", str(tmp_path / "out"))
    told = call(baseline, shop_corpus.directory.parent, *flags)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == told
    users = [shop_corpus.user_source_id(user) for user in shop_corpus.evaluation_users]
    targets = [shop_corpus.item_source_id(item) for item in shop_corpus.targets("test")]
    for family in ("retrieval", "ranking"):
        rows = parquet.read_table(tmp_path / "out" / f"{family}.parquet").to_pylist()
        assert [row["user"] for row in rows] == users
        assert [row["target"] for row in rows] == targets
        for name in told[family]["intervals"]:
            assert np.mean([row[name] for row in rows]) == pytest.approx(told[family][name], abs=1e-6)
        for row in rows:
            place = row["items"].index(row["target"]) + 1 if row["target"] in row["items"] else None
            assert row["rank"] == place or (family == "ranking" and place is None and row["rank"] > 10)
    assert any(row["rank"] is None for row in parquet.read_table(tmp_path / "out" / "retrieval.parquet").to_pylist())
    popularity = shop_corpus.training_popularity
    candidates = ranking.candidates(shop_corpus, "test", retrieval.evaluation_queries(shop_corpus, "test", ALL))
    better = [
        (popularity[row[row >= 0]] >= popularity[target]).sum() - 1
        for row, target in zip(candidates, shop_corpus.targets("test"), strict=True)
    ]
    assert told["ranking"]["hr@10"] == pytest.approx(np.mean(np.less(better, 10)))


# Which tasks are evaluated, and what their figures are called.


def test_the_tasks_in_a_name(shop_corpus, shop_words):
    data_dir = str(shop_corpus.directory.parent)
    for name, families in {
        "shop_all_token": ["retrieval", "ranking", "rating"],
        "shop_ranking_aligned": ["ranking"],
        "shop_rating_random": ["rating_random"],
        "shop_retrieval": ["retrieval"],
    }.items():
        found = eval.evaluated(name, shop_words.path, data_dir)
        assert [spec.family for spec in found] == families
        assert {spec.catalog.item_format for spec in found} == {"token" if "token" in name else "title"}
    for name in ("shop_mim_token", "shop_bpr_token"):
        with pytest.raises(InputError, match=r"Give one of shop_retrieval_token, .*shop_rating_random_token, or"):
            eval.evaluated(name, shop_words.path, data_dir)


def test_ratings_that_no_model_can_write_are_left_out_of_all(shop_words, tmp_path):
    """As in training: a mixture has no rating task then, and one that is asked for is an error."""
    rows = [(f"u{n % 40}", f"i{n % 29}", n, 1 + n / 100) for n in range(240)]
    prepared("tables", write_tables(tmp_path / "raw", rows), tmp_path, "fine")
    found = eval.evaluated("fine_all_token", shop_words.path, str(tmp_path))
    assert [spec.family for spec in found] == ["retrieval", "ranking"]
    with pytest.raises(InputError, match=r"fine has 240 different ratings; written as text there can be at most 100\."):
        eval.evaluated("fine_rating_token", shop_words.path, str(tmp_path))
    with pytest.raises(InputError, match="fine has 240 different ratings"):
        eval.evaluated("fine_rating_aligned_token", shop_words.path, str(tmp_path))


def test_nothing_to_evaluate_is_an_input_error(shop_corpus, tmp_path):
    with pytest.raises(InputError, match="SPLIT is 'train'"):
        retrieval.evaluation_queries(shop_corpus, "train", ALL)
    tables = write_tables(tmp_path / "raw", [("a", "x", 1, 5), ("a", "y", 2, 4), ("b", "x", 1, 3)])
    small = prepared("tables", tables, tmp_path, "small")
    with pytest.raises(InputError, match="nothing can be held out"):
        retrieval.evaluation_queries(small, "test", ALL)
    for family in ("rating", "rating_random"):
        with pytest.raises(InputError, match="nothing can be held out"):
            rating.evaluation_queries(small, "test", family, ALL)


def test_training_logs_every_family_with_intervals(make_spec, shop_corpus):
    families = ("retrieval", "ranking", "rating", "mim", "bpr")
    prefixes = [prefix for _, prefix in train.evaluated([make_spec(family) for family in families])]
    assert prefixes == ["validation_", "validation_ranking_", "validation_rating_"]
    two_formats = [make_spec("ranking"), make_spec("ranking", "token")]
    assert [prefix for _, prefix in train.evaluated(two_formats)] == [
        "validation_shop_ranking_",
        "validation_shop_token_ranking_",
    ]
    logged = dict(report.logged(rating_result(shop_corpus)))
    assert logged["users"] == len(shop_corpus.evaluation_users)
    assert logged["rmse_argmax_low"] < logged["rmse_argmax"] < logged["rmse_argmax_high"]


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("validation_rating_rmse", 1.0),
        ("validation_shop_rating_mae_argmax", 1.0),
        ("validation_loss", 1.0),
        ("validation_loss/shop_mim", 1.0),
        ("validation_recall@10", 3.0),
        ("validation_mae_ranking_hr@10", 3.0),  # of a corpus named mae
    ],
)
def test_errors_and_losses_go_down(metric, best):
    records = [{"step": step, metric: value} for step, value in ((1, 2.0), (2, 1.0), (3, 3.0))]
    assert best_evaluation(records, metric)[0]["value"] == best


def test_the_best_of_several_is_put_down(tmp_path):
    metric = "validation_recall@10"
    records = [{"step": step, metric: value} for step, value in ((1, 2.0), (2, 4.0), (3, 1.0))]
    write_best([*records, {"step": 4, "loss": 9.0}], metric, str(tmp_path))
    assert read_best(str(tmp_path)) is None  # that was no evaluation
    write_best(records, metric, str(tmp_path))
    assert read_best(str(tmp_path)) == {"step": 2, "metric": metric, "value": 4.0}
    with pytest.raises(RunError, match="Did you mean 'validation_recall@10'"):
        write_best(records, "validation_recal@10", str(tmp_path))


@pytest.mark.parametrize("users", [0, -1, 1000.0, True])
def test_numbers_of_users_that_are_none(users):
    with pytest.raises(InputError, match=r"number of users|EvaluationOptions\.max_users"):
        EvaluationOptions(max_users=users)


# Devices.


@pytest.mark.devices8
@pytest.mark.parametrize("family", ["ranking", "rating"])
def test_eight_devices_give_the_numbers_of_one(make_spec, model, family):
    """Of 44 users, which eight don't divide. Expected values are rounded otherwise in smaller batches."""
    spec = make_spec(family, test_negatives=NEGATIVES)
    one, eight = (
        common.make_evaluation(spec, "test", model[0], partitioning.make_mesh({"data": count}, jax.devices()[:count]))(
            model[1]
        )
        for count in (1, 8)
    )
    assert len(one) == len(eight) == len(spec.corpus.evaluation_users) == 44
    for name, fact in one.facts.items():
        np.testing.assert_allclose(fact, eight.facts[name], rtol=1e-6 if name == "expected" else 0)
