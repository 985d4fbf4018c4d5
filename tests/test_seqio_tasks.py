"""SeqIO sees the same samples as the trainer: registration, mixtures, packing by SeqIO's own converter, sharding."""

import dataclasses
import functools
import itertools
from collections import Counter

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf

import seqio_tasks
from recalign_jax.corpus.corpus import check_name
from recalign_jax.errors import InputError
from seqio_tasks import ambiguity, components, prompts, samples, specs, task_names, writing
from seqio_tasks.components import registered
from seqio_tasks.writing import Limits
from tests.corpora import prepared, write_tables

LENGTHS = {"inputs": 160, "targets": 64}
FAMILIES = ("retrieval", "ranking", "rating", "rating_random", "mim", "mlm", "bpr")
MIXTURES = ("retrieval_aligned", "retrieval_mim", "retrieval_mlm", "ranking_aligned", "rating_aligned", "all")
NAMES = {f"shop_{base}{suffix}" for base in (*FAMILIES, *MIXTURES) for suffix in ("", "_id", "_token")}


@pytest.fixture(scope="module", autouse=True)
def names(shop_corpus, shop_words):
    return register_again(shop_corpus, shop_words)


def register_again(shop_corpus, shop_words, **options) -> list[str]:
    """Registers with options from gin, as a run does; then clears gin. With one wording, retrieval isn't random."""
    for name, value in {"training_wordings": 1, **options}.items():
        gin.bind_parameter(f"TaskOptions.{name}", value)
    try:
        return seqio_tasks.register(str(shop_corpus.directory), shop_words.path)
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


def test_registration(names):
    assert set(names) == NAMES == set(task_names.names_for("shop", rated=True))
    assert len(names) == len(NAMES)
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
    # A task of one's own over the same file has the same vocabulary; with item tokens it is another one.
    own = seqio.SentencePieceVocabulary(shop_words.path, extra_ids=100)
    assert title == own
    assert token != own
    # TensorFlow's tokenizer can't write item tokens.
    assert token.decode_tf(tf.constant([*red, 1, 0])).numpy() == b"red"
    item = token.vocab_size - 1
    assert token.decode_tf(tf.constant([*red, item, 1, 0])).numpy() == b"red <item_59>"
    rows = tf.constant([[*red, item, 1, 0], [item, *red, 0, 0]])
    assert token.decode_tf(rows).numpy().tolist() == [b"red <item_59>", b"<item_59> red"]


# Datasets.


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("name", ["shop_retrieval", "shop_ranking_token", "shop_mim_id", "shop_mlm_token", "shop_bpr"])
def test_held_out_examples_equal_render(name, split):
    expected = rendered(name, split, limits=Limits(**LENGTHS))
    assert examples(name, LENGTHS, split, shuffle=False) == expected
    assert sorted(examples(name, LENGTHS, split, shuffle=True, seed=3)) == sorted(expected)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_retrieval_training_examples_equal_render(lengths):
    limits = writing.NO_LIMITS if lengths is None else Limits(**lengths)
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
    assert set(counts) == {"shop_retrieval", "shop_mim", "shop_mlm"}
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == counts
    found = {task.name: rate for task, rate in registered("shop_retrieval_aligned")}
    assert found == pytest.approx({name: count / sum(counts.values()) for name, count in counts.items()}, rel=1e-12)
    [(task, rate)] = registered("shop_mim_token")
    assert (task.name, rate) == ("shop_mim_token", 1.0)


def test_maximum_and_temperature_change_the_rates(shop_corpus, shop_words):
    counts = {task.name: task.num_examples("train") for task, _ in registered("shop_retrieval_aligned")}
    try:
        register_again(shop_corpus, shop_words, mixture_maximum=100, mixture_temperature=2.0)
        rates = {task.name: rate for task, rate in registered("shop_retrieval_aligned")}
    finally:
        register_again(shop_corpus, shop_words)
    roots = {name: min(count, 100) ** 0.5 for name, count in counts.items()}
    assert rates == pytest.approx({name: root / sum(roots.values()) for name, root in roots.items()})


@pytest.mark.parametrize("name", ["shop_all_token", "shop_rating_aligned_token"])
def test_a_mixture_draws_at_its_rates(name):
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, "train", seed=0)
    rows = list(dataset.take(3000).as_numpy_iterator())
    spec = registered(name)[0][0].spec
    asked = {family: wordings[0][2] for family, wordings in prompts.TEMPLATES.items()}
    question = {family: " ".join(map(str, spec.vocabulary.encode([text])[0])) for family, text in asked.items()}

    def family_of(tokens: str) -> str:
        [found] = [family for family, words in question.items() if f" {words} " in f" {tokens} "]
        return found

    drawn = Counter(family_of(" ".join(map(str, row["inputs"]))) for row in rows)
    rates = {task.spec.family: rate for task, rate in registered(name)}
    assert set(drawn) == set(rates)
    for family, rate in rates.items():
        assert abs(drawn[family] / len(rows) - rate) < 4 * (rate * (1 - rate) / len(rows)) ** 0.5


@pytest.mark.parametrize("options", [{}, {"mixture_maximum": 100, "mixture_temperature": 2.0}])
def test_the_trainer_finds_by_name_what_is_registered(shop_corpus, shop_words, data_dir, options):
    """Without SeqIO; the rates are SeqIO's."""
    try:
        register_again(shop_corpus, shop_words, **options)
        for name in sorted(NAMES):
            found = of_corpora(name, shop_words, data_dir, **options)
            there = registered(name)
            assert [(task.name, rate) for task, rate in found] == [(task.name, rate) for task, rate in there]
            for (task, _), (other, _) in zip(found, there, strict=True):
                assert task.spec.options == other.spec.options
                for split in ("train", "test"):
                    one, two = (t.render(split, 3, 0, 5, Limits(**LENGTHS)) for t in (task, other))
                    assert [one.inputs.tolist(), one.targets.tolist()] == [two.inputs.tolist(), two.targets.tolist()]
    finally:
        register_again(shop_corpus, shop_words)


def of_corpora(name: str, words, data_dir, **options):
    for option, value in {"training_wordings": 1, **options}.items():
        gin.bind_parameter(f"TaskOptions.{option}", value)
    try:
        return components.of_corpora(name, words.path, data_dir)
    finally:
        gin.clear_config()


def test_a_mixture_of_two_corpora_holds_the_tasks_of_both(shop_corpus, shop_words, data_dir, tmp_path):
    prepared("tables", write_tables(tmp_path, [("u", f"i{n}", n) for n in range(9)]), data_dir, "corner")
    found = of_corpora("shop.corner_all", shop_words, data_dir)
    counts = {task.name: task.num_examples("train") for task, _ in found}
    families = ("retrieval", "ranking", "mim", "mlm", "bpr")
    assert set(counts) == {f"{corpus}_{f}" for corpus in ("shop", "corner") for f in families} | {"shop_rating"}
    rates = {task.name: rate for task, rate in found}
    assert rates == pytest.approx({name: count / sum(counts.values()) for name, count in counts.items()})
    found = of_corpora("shop.corner_mim", shop_words, data_dir)
    assert [task.name for task, _ in found] == ["corner_mim", "shop_mim"]


def test_a_corpus_too_small_for_a_task_is_an_input_error(shop_words, data_dir, tmp_path):
    prepared("tables", write_tables(tmp_path, [("u", f"i{n}", n) for n in range(3)]), data_dir, "kiosk")
    with pytest.raises(InputError, match="kiosk_mim has no train examples"):
        of_corpora("kiosk_mim", shop_words, data_dir)


def test_too_many_different_ratings_are_told_of(shop_words, data_dir, tmp_path, capsys):
    rows = [(f"u{user}", f"i{n}", n, user + n / 10) for user in range(15) for n in range(9)]
    prepared("tables", write_tables(tmp_path, rows), data_dir, "fine")
    capsys.readouterr()
    assert "fine_rating" not in [task.name for task, _ in of_corpora("fine_all", shop_words, data_dir)]
    assert "fine has 135 different ratings: too many for rating tasks" in capsys.readouterr().err
    with pytest.raises(InputError, match="135 different ratings; written as text"):
        of_corpora("fine_rating_aligned", shop_words, data_dir)


def test_a_temperature_that_no_rate_can_have_is_an_input_error(shop_words, data_dir):
    with pytest.raises(InputError, match=r"MIXTURE_TEMPERATURE is 0\.001"):
        of_corpora("shop_retrieval_aligned", shop_words, data_dir, mixture_temperature=0.001)


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
        ("own_records", "'own_records' has no features inputs and targets: inputs"),
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
        registered(name)


@pytest.fixture
def two_corpora(tmp_path):
    for name in ("shop", "shop_large"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "corpus.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shop_retrieval", (("shop",), "retrieval", "title")),
        ("shop_mim_token", (("shop",), "mim", "token")),
        ("shop_mim_title", (("shop",), "mim", "title")),
        ("shop_bpr_id", (("shop",), "bpr", "id")),
        ("shop_all", (("shop",), "all", "title")),
        ("shop_large_mlm", (("shop_large",), "mlm", "title")),
        ("shop_large_retrieval_aligned_token", (("shop_large",), "retrieval_aligned", "token")),
        ("shop_retrieval_mim", (("shop",), "retrieval_mim", "title")),
        ("shop_large_retrieval_mlm_token", (("shop_large",), "retrieval_mlm", "token")),
        ("shop_large.shop_retrieval_aligned", (("shop_large", "shop"), "retrieval_aligned", "title")),
    ],
)
def test_names_are_split(two_corpora, name, expected):
    assert task_names.split_name(name, two_corpora) == expected


@pytest.mark.parametrize("corpus", ["shop", "shop_large"])
def test_every_name_of_a_corpus_is_read_back(two_corpora, corpus):
    names = task_names.names_for(corpus, rated=False)
    assert len(set(names)) == len(names)
    assert [str(task_names.split_name(name, two_corpora)) for name in names] == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shop_retrival", "of corpus 'shop'. Did you mean 'shop_retrieval'"),
        ("shop_large_ratng", "Unknown task 'shop_large_ratng' of corpus 'shop_large'"),
        ("shop_large_rating_aligned", "Corpus 'shop_large' has no ratings"),
        ("shop.shop_large_mim_token", "can't be mixed in format 'token'.*Use 'shop.shop_large_mim'"),
        ("shop.shpo_mim", "Unknown task"),
        ("shpo.shop_mim", "no corpus 'shpo' in .* Did you mean 'shop'"),
        ("shop.shop_mim", "names a corpus twice"),
        ("shpo_retrieval", "Did you mean 'shop_retrieval'.*Prepared: shop, shop_large"),
    ],
)
def test_unknown_names(two_corpora, name, message):
    with pytest.raises(InputError, match=message):
        task_names.split_name(name, two_corpora)


def test_a_task_by_name(shop_corpus, shop_words, data_dir):
    make = functools.partial(specs.task_spec, vocabulary_path=shop_words.path, data_dir=data_dir)
    spec = make("shop_retrieval_token")
    assert (spec.name, spec.family, spec.catalog.item_format) == ("shop_retrieval_token", "retrieval", "token")
    assert spec.num_tokens == shop_words.num_tokens + shop_corpus.num_items
    assert spec.corpus.fingerprint == shop_corpus.fingerprint
    assert spec.vocabulary.fingerprint == shop_words.fingerprint
    with pytest.raises(InputError, match="'shop_retrieval_aligned' is a mixture"):
        make("shop_retrieval_aligned")


def test_no_corpus_can_have_a_name_that_ends_like_a_task():
    for name in task_names.names_for("shop", rated=True):
        with pytest.raises(InputError, match="tasks are named CORPUS_TASK"):
            check_name(name)
    for name in ("retrieval", "rating_random", "token"):  # of `retrieval_token` it would be the corpus
        with pytest.raises(InputError, match="tasks are named CORPUS_TASK"):
            check_name(name)


def test_the_families_in_a_mixture(shop_corpus):
    every = ("retrieval", "ranking", "rating", "mim", "mlm", "bpr")
    assert specs.families_in("all", shop_corpus) == every
    unrated = dataclasses.replace(shop_corpus, ratings=None)
    many = dataclasses.replace(shop_corpus, ratings=np.arange(len(shop_corpus.ratings), dtype=np.float32))
    for corpus in (unrated, many):
        assert specs.families_in("all", corpus) == tuple(family for family in every if family != "rating")
        assert specs.families_in("rating_aligned", corpus) == ("rating", "bpr")  # which `make_spec` refuses
    assert specs.families_in("mim", unrated) == ("mim",)


# Items that no model can tell apart.


def test_titles_that_the_vocabulary_cannot_write_are_told_of_once(tmp_path, t5_words, monkeypatch, capsys):
    """Such titles come out as <unk>, all alike, when T5's vocabulary has none of their characters."""
    monkeypatch.setattr(ambiguity, "_told", set())
    titles = ["茶杯", "牙刷", "肥皂", "Soap", "Brush", "Towel", "Comb"]
    items = [{"item_id": f"i{number}", "title": title} for number, title in enumerate(titles)]
    rows = [(f"u{user}", item["item_id"], time) for user in range(3) for time, item in enumerate(items)]
    prepared("tables", write_tables(tmp_path / "raw", rows, items), tmp_path, "abroad")
    make = functools.partial(specs.task_spec, vocabulary_path=t5_words.path, data_dir=tmp_path)
    capsys.readouterr()
    make("abroad_retrieval_token")
    assert capsys.readouterr().err == ""
    make("abroad_retrieval")
    told = capsys.readouterr().err
    assert f"of 7 items in format title, 3 hold characters that vocabulary {t5_words.path} lacks" in told
    assert "3 have the tokens of another item" in told
    assert "abroad_retrieval_token; `recalign vocab --corpus abroad --size N`" in told
    make("abroad_mim")
    seqio_tasks.register(str(tmp_path / "abroad"), t5_words.path)
    registered("abroad_retrieval_aligned")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ambiguity, "_told", set())
    registered("abroad_retrieval_aligned_token")
    assert capsys.readouterr().err == ""
    registered("abroad_all")
    assert capsys.readouterr().err.count("warning: abroad: of 7 items") == 1


@pytest.mark.parametrize("name", ["beauty_corpus", "movielens_corpus"])
def test_published_corpora_are_not_warned_of(name, t5_words, request, monkeypatch, capsys):
    monkeypatch.setattr(ambiguity, "_told", set())
    spec = specs.make_spec(request.getfixturevalue(name), "retrieval", "title", t5_words, specs.TaskOptions())
    capsys.readouterr()
    ambiguity.warn_of_ambiguous_items(spec.corpus, spec.catalog, t5_words)
    assert capsys.readouterr().err == ""
    assert spec.catalog.num_collisions > 0
