"""SeqIO's own Evaluator runs every task: right answers score full, wrong ones what they should."""

import math

import numpy as np
import pytest
import seqio

import seqio_tasks
from seqio_tasks import scoring, specs, task_names
from seqio_tasks.specs import TaskOptions

LENGTHS = {"inputs": 400, "targets": 80}


@pytest.fixture(scope="module", autouse=True)
def registered(shop_corpus, shop_words):
    return seqio_tasks.register(str(shop_corpus.directory), shop_words.path)


def evaluate(name: str, answer) -> dict[str, float]:
    """Metrics of a model that writes `answer(target tokens)`."""
    evaluator = seqio.Evaluator(
        name,
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        eval_split="test",
        sequence_length=LENGTHS,
        async_compute_metrics=False,
    )

    def predict(dataset):
        return [(int(n), answer(row["decoder_target_tokens"].tolist())) for n, row in dataset.as_numpy_iterator()]

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    return metrics.result()[name]


@pytest.mark.parametrize("item_format", ["title", "id", "token"])
@pytest.mark.parametrize("family", task_names.FAMILIES)
def test_right_answers_score_full(family, item_format):
    metrics = evaluate(f"shop_{task_names.with_format(family, item_format)}", lambda target: target)
    expected = {"recall@1": 1.0, "in_catalogue": 1.0}
    if family.startswith("rating"):
        expected = {"rmse": 0.0, "mae": 0.0, "unreadable": 0.0}
    elif family in ("mim", "mlm"):
        expected = {"exact": 1.0} | ({"span_recall": 1.0} if family == "mlm" else {})
    assert metrics == expected


def test_wrong_answers_score_what_they_should(shop_corpus, shop_words):
    words = shop_words
    item = words.num_tokens + int(shop_corpus.targets("test")[0])
    right = float((shop_corpus.targets("test") == shop_corpus.targets("test")[0]).mean())
    metrics = evaluate("shop_retrieval_token", lambda target: [item, 1, *[0] * 78])
    assert metrics == pytest.approx({"recall@1": right, "in_catalogue": 1.0})
    assert evaluate("shop_retrieval_token", lambda target: [*words.encode(["red"])[0], 1]) == {
        "recall@1": 0.0,
        "in_catalogue": 0.0,
    }
    spoken = evaluate("shop_rating", lambda target: [*words.encode(["3"])[0], 1])
    last = shop_corpus.ratings[shop_corpus.user_offsets[shop_corpus.evaluation_users + 1] - 1]
    assert spoken == pytest.approx(
        {"rmse": ((last - 3) ** 2).mean() ** 0.5, "mae": abs(last - 3).mean(), "unreadable": 0.0}
    )
    silent = evaluate("shop_rating", lambda target: [*words.encode(["soft"])[0], 1])
    middle = shop_corpus.ratings[shop_corpus.in_training].mean()
    assert silent == pytest.approx(
        {"rmse": ((last - middle) ** 2).mean() ** 0.5, "mae": abs(last - middle).mean(), "unreadable": 1.0}
    )


def test_spans_are_compared_one_by_one(shop_corpus, shop_words):
    spec = specs.make_spec(shop_corpus, "mlm", "title", shop_words, TaskOptions())
    read, [score] = scoring.postprocess_fn(spec), scoring.metric_fns(spec)
    targets = [read("<extra_id_0> red tea <extra_id_1> blue"), read("<extra_id_0> soap")]
    assert targets == [["red tea", "blue"], ["soap"]]
    answers = [read("<extra_id_0> red tea <extra_id_1> green <extra_id_2> hat"), read("soap")]
    assert score(targets, answers) == {"exact": 0.0, "span_recall": 1 / 3}


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "", "four", "4 stars"])
def test_what_is_no_number_is_unreadable(shop_corpus, shop_words, text):
    spec = specs.make_spec(shop_corpus, "rating", "title", shop_words, TaskOptions())
    assert math.isnan(scoring.postprocess_fn(spec)(text))
    assert np.isfinite(scoring.metric_fns(spec)[0]([4.0], [math.nan])["rmse"])
