"""SeqIO sees the same samples as the trainer: registration, mixtures, packing by SeqIO's own converter, sharding."""

import functools
import itertools
from collections import Counter

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf

import seqio_tasks
from recalign_jax.errors import InputError
from seqio_tasks import samples, specs, tasks
from seqio_tasks.samples import Limits

LENGTHS = {"inputs": 160, "targets": 64}
NAMES = {
    *("shop_retrieval", "shop_retrieval_token", "shop_mim", "shop_mim_token"),
    *("shop_retrieval_aligned", "shop_retrieval_aligned_token"),
}


@pytest.fixture(scope="module", autouse=True)
def registered(shop_corpus, shop_words):
    return seqio_tasks.register(str(shop_corpus.directory), shop_words.path)


def register_again(shop_corpus, shop_words, **options) -> None:
    """Registers with options from gin, as a run does; then clears gin."""
    for name, value in options.items():
        gin.bind_parameter(f"TaskOptions.{name}", value)
    try:
        seqio_tasks.register(str(shop_corpus.directory), shop_words.path)
    finally:
        gin.clear_config()


def examples(name: str, lengths=LENGTHS, split: str = "train", **options) -> list[tuple[tuple[int, ...], ...]]:
    """The examples of a task or mixture as (inputs, targets)."""
    dataset = seqio.get_mixture_or_task(name).get_dataset(lengths, split, **options)
    return [(tuple(row["inputs"]), tuple(row["targets"])) for row in dataset.as_numpy_iterator()]


def rendered(name: str, split: str, **options) -> list[tuple[tuple[int, ...], ...]]:
    spec = seqio.get_mixture_or_task(name).source.spec
    found = (samples.render(spec, split, index, **options) for index in range(samples.num_examples(spec, split)))
    return [(tuple(sample.inputs.tolist()), tuple(sample.targets.tolist())) for sample in found]


# Registration.


def test_registration(registered):
    assert set(registered) == NAMES == set(specs.names_for("shop"))
    assert len(registered) == len(NAMES)
    assert NAMES.issubset({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})


def test_registering_again_replaces_with_the_new_options(shop_corpus, shop_words):
    before = seqio.get_mixture_or_task("shop_retrieval_aligned")
    register_again(shop_corpus, shop_words)
    assert examples("shop_retrieval", None, "test", shuffle=False) == rendered("shop_retrieval", "test")
    full = examples("shop_retrieval", None, "test", shuffle=False)
    register_again(shop_corpus, shop_words, history_length=2)
    short = examples("shop_retrieval", None, "test", shuffle=False)
    register_again(shop_corpus, shop_words)
    assert max(len(inputs) for inputs, _ in short) < max(len(inputs) for inputs, _ in full)
    assert seqio.get_mixture_or_task("shop_retrieval_aligned") is not before
    assert examples("shop_retrieval", None, "test", shuffle=False) == full


def test_vocabularies_of_the_features(shop_words, shop_corpus):
    title = seqio.get_mixture_or_task("shop_mim").output_features["targets"].vocabulary
    token = seqio.get_mixture_or_task("shop_mim_token").output_features["targets"].vocabulary
    assert title.vocab_size == shop_words.num_tokens
    assert token.vocab_size == shop_words.num_tokens + shop_corpus.num_items
    assert title == seqio.get_mixture_or_task("shop_retrieval").output_features["inputs"].vocabulary
    assert title != token
    # Item tokens can be read in what SeqIO decodes, as its evaluator does.
    sample = samples.render(seqio.get_mixture_or_task("shop_mim_token").source.spec, "test", 0)
    assert token.decode(sample.targets.tolist()) == shop_words.decode(sample.targets)
    assert "<item_" in token.decode(sample.targets)
    assert "⁇" not in token.decode(sample.inputs)
    red = shop_words.encode(["red"])[0]
    assert token.decode([*red, token.vocab_size]) == shop_words.decode([*red, 2])
    # TensorFlow's tokenizer can't write item tokens, but it stands them.
    assert token.decode_tf(tf.constant([*red, 1, 0])).numpy() == b"red"
    assert token.decode_tf(tf.constant([*red, token.vocab_size - 1, token.vocab_size, 1, 0])).numpy().startswith(b"red")


# Datasets.


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("name", ["shop_retrieval", "shop_retrieval_token", "shop_mim", "shop_mim_token"])
def test_held_out_examples_equal_render(name, split):
    expected = rendered(name, split, limits=Limits(**LENGTHS))
    assert examples(name, LENGTHS, split, shuffle=False) == expected
    assert sorted(examples(name, LENGTHS, split, shuffle=True, seed=3)) == sorted(expected)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_retrieval_training_examples_equal_render(lengths):
    limits = samples.NO_LIMITS if lengths is None else Limits(**lengths)
    expected = rendered("shop_retrieval", "train", limits=limits)
    assert examples("shop_retrieval", lengths, "train", shuffle=False) == expected
    shuffled = examples("shop_retrieval", lengths, "train", shuffle=True, seed=1)
    assert shuffled != expected
    assert Counter(shuffled) == Counter(expected)


def test_limits_reach_the_samples():
    """Whole items are dropped before SeqIO trims: every prompt still ends with its question and end of sequence."""
    shortest = samples.shortest_row(seqio.get_mixture_or_task("shop_mim").source.spec)
    ends = {inputs[-3:] for inputs, _ in examples("shop_mim", shortest)}
    assert len(ends) == 1
    assert max(len(inputs) for inputs, _ in examples("shop_mim", None)) > 2 * shortest["inputs"]


def test_masks_differ_between_epochs_and_seeds_and_repeat_with_the_seed():
    count = samples.num_examples(seqio.get_mixture_or_task("shop_mim").source.spec, "train")
    two = examples("shop_mim", None, shuffle=False, seed=5, num_epochs=2)
    assert len(two) == 2 * count
    assert two == examples("shop_mim", None, shuffle=False, seed=5, num_epochs=2)
    same = sum(first == second for first, second in zip(two[:count], two[count:], strict=True))
    assert same < count / 4
    other = examples("shop_mim", None, shuffle=False, seed=6)
    assert sum(first == second for first, second in zip(two[:count], other, strict=True)) < count / 4


@pytest.mark.parametrize("num_shards", [2, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_shards_cover_each_example_once(num_shards, shuffle):
    shards = [
        examples("shop_retrieval", shuffle=shuffle, seed=0, shard_info=seqio.ShardInfo(index, num_shards))
        for index in range(num_shards)
    ]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert Counter(itertools.chain(*shards)) == Counter(rendered("shop_retrieval", "train", limits=Limits(**LENGTHS)))


# Mixtures.


def test_the_mixture_is_proportional_to_examples():
    mixture = seqio.get_mixture_or_task("shop_retrieval_aligned")
    counts = {task.name: samples.num_examples(task.source.spec, "train") for task in mixture.tasks}
    assert set(counts) == {"shop_retrieval", "shop_mim"}
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == counts
    found = {spec.name: rate for spec, rate in tasks.components("shop_retrieval_aligned")}
    assert found == pytest.approx({name: count / sum(counts.values()) for name, count in counts.items()}, rel=1e-12)
    [(spec, rate)] = tasks.components("shop_mim_token")
    assert (spec.name, rate) == ("shop_mim_token", 1.0)


def test_maximum_and_temperature_change_the_rates(shop_corpus, shop_words):
    counts = {spec.name: samples.num_examples(spec, "train") for spec, _ in tasks.components("shop_retrieval_aligned")}
    try:
        register_again(shop_corpus, shop_words, mixture_maximum=100, mixture_temperature=2.0)
        rates = {spec.name: rate for spec, rate in tasks.components("shop_retrieval_aligned")}
    finally:
        register_again(shop_corpus, shop_words)
    roots = {name: min(count, 100) ** 0.5 for name, count in counts.items()}
    assert rates == pytest.approx({name: root / sum(roots.values()) for name, root in roots.items()})


def test_the_mixture_draws_at_its_rates():
    dataset = seqio.get_mixture_or_task("shop_retrieval_aligned_token").get_dataset(None, "train", seed=0)
    rows = list(dataset.take(2000).as_numpy_iterator())
    spec = seqio.get_mixture_or_task("shop_mim_token").source.spec
    question = spec.vocabulary.encode([". Masked items ?"])[0]
    masked = np.mean([row["inputs"][-len(question) - 1 : -1].tolist() == question for row in rows])
    rates = {spec.family: rate for spec, rate in tasks.components("shop_retrieval_aligned_token")}
    assert abs(masked - rates["mim"]) < 4 * (rates["mim"] * (1 - rates["mim"]) / len(rows)) ** 0.5


def test_seqios_own_packing_runs_on_the_mixture():
    lengths = {"inputs": 800, "targets": 128}
    dataset = seqio.get_dataset(
        mixture_or_task_name="shop_retrieval_aligned",
        task_feature_lengths=lengths,
        dataset_split="train",
        shuffle=True,
        seed=0,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
    )
    known = {inputs for inputs, _ in rendered("shop_retrieval", "train", limits=Limits(**lengths))}
    rows = list(dataset.take(10).as_numpy_iterator())
    found = 0
    for row in rows:
        assert {len(values) for name, values in row.items() if name.startswith("encoder")} == {800}
        assert row["encoder_segment_ids"].max() == row["decoder_segment_ids"].max()
        for segment in range(1, row["encoder_segment_ids"].max() + 1):
            tokens = row["encoder_input_tokens"][row["encoder_segment_ids"] == segment]
            assert tokens[-1] == 1
            found += tuple(tokens.tolist()) in known
    assert sum(row["encoder_segment_ids"].max() for row in rows) > 1.5 * len(rows)
    assert found > len(rows)


# Names.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shop_retrieval_alinged", "Did you mean 'shop_retrieval_aligned'"),
        ("nothing", "Unknown task or mixture 'nothing'"),
        ("own_records", "has a source of its own"),
    ],
)
def test_components_of_unknown_names(name, message):
    if "own_records" not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            "own_records",
            source=seqio.FunctionDataSource(lambda split, shuffle_files: tf.data.Dataset.range(3), splits=["train"]),
            output_features={"inputs": seqio.Feature(seqio.PassThroughVocabulary(9))},
        )
    with pytest.raises(InputError, match=message):
        tasks.components(name)


@pytest.fixture
def two_corpora(tmp_path):
    for name in ("shop", "shop_large"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "corpus.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shop_retrieval", ("shop", "retrieval", "title")),
        ("shop_mim_token", ("shop", "mim", "token")),
        ("shop_mim_title", ("shop", "mim", "title")),
        ("shop_large_mim", ("shop_large", "mim", "title")),
        ("shop_large_retrieval_aligned_token", ("shop_large", "retrieval_aligned", "token")),
    ],
)
def test_names_are_split(two_corpora, name, expected):
    assert specs.split_name(name, two_corpora) == expected


@pytest.mark.parametrize("corpus", ["shop", "shop_large"])
def test_every_name_of_a_corpus_is_read_back(two_corpora, corpus):
    names = specs.names_for(corpus)
    assert len(set(names)) == len(names)
    parts = [specs.split_name(name, two_corpora) for name in names]
    assert [f"{part[0]}_{specs.with_format(*part[1:])}" for part in parts] == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shop_retrival", "of corpus 'shop'. Did you mean 'shop_retrieval'"),
        ("shop_large_ratng", "Unknown task 'shop_large_ratng' of corpus 'shop_large'"),
        ("shpo_retrieval", "Did you mean 'shop_retrieval'.*Prepared: shop, shop_large"),
    ],
)
def test_unknown_names(two_corpora, name, message):
    with pytest.raises(InputError, match=message):
        specs.split_name(name, two_corpora)


def test_a_task_by_name(shop_corpus, shop_words, data_dir):
    make = functools.partial(specs.task_spec, vocabulary_path=shop_words.path, data_dir=data_dir)
    spec = make("shop_retrieval_token")
    assert (spec.name, spec.family, spec.catalog.item_format) == ("shop_retrieval_token", "retrieval", "token")
    assert spec.num_tokens == shop_words.num_tokens + shop_corpus.num_items
    assert spec.corpus.fingerprint == shop_corpus.fingerprint
    assert spec.vocabulary.fingerprint == shop_words.fingerprint
    specs.check_family(spec, "retrieval")
    with pytest.raises(InputError, match="a mim task; retrieval is needed here, as shop_retrieval_token"):
        specs.check_family(make("shop_mim_token"), "retrieval")
    with pytest.raises(InputError, match="'shop_retrieval_aligned' is a mixture"):
        make("shop_retrieval_aligned")
