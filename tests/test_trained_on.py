"""A checkpoint answers what it was trained for, and what only looks alike is refused: from real corpora on disk."""

import dataclasses

import pytest

from recalign_jax.commands import prepare, trained_on
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.errors import InputError
from seqio_tasks import specs
from tests.corpora import call, prepared, write_tables

ROWS = [
    (f"u{user}", f"i{(user * 3 + place) % 10}", place, 1 + (user + place) % 5)
    for user in range(8)
    for place in range(5)
]


def spec_of(corpus, words, item_format, family="retrieval"):
    return specs.make_spec(corpus, family, item_format, words, specs.TaskOptions())


@pytest.fixture
def corpus(tmp_path):
    return prepared("tables", write_tables(tmp_path / "raw", ROWS), tmp_path, "store")


def again(tmp_path, rows, *flags):
    """The corpus of that name, prepared anew elsewhere."""
    return prepared("tables", write_tables(tmp_path / "other_raw", rows), tmp_path / "other", "store", *flags)


def extended(corpus, rows):
    folder = write_tables(corpus.directory.parent / "more", rows)
    flags = ["--source", "tables", "--input", str(folder), "--corpus", corpus.name, "--extend"]
    call(prepare, corpus.directory.parent, *flags)
    return load_corpus(corpus.name, corpus.directory.parent)


def without_items(identity):
    """As runs of earlier versions have it."""
    return {name: value for name, value in identity.items() if not name.startswith("items ")}


@pytest.mark.parametrize("item_format", ["token", "id", "title"])
def test_the_corpus_it_was_trained_on_is_no_surprise(corpus, shop_words, item_format, capsys):
    spec = spec_of(corpus, shop_words, item_format)
    identity = trained_on.task_fingerprints([spec])
    for trained in (identity, without_items(identity)):
        trained_on.check_use(spec, "run", trained)
        trained_on.check_start([spec], shop_words, False, trained)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("item_format", ["token", "id"])
@pytest.mark.parametrize("change", ["seed", "renamed"])
def test_numbers_that_are_other_items_now(corpus, shop_words, tmp_path, item_format, change, capsys):
    """As many items and the same numbers, so the catalogue is the very same."""
    renamed = [(user, "zz" if item == "i3" else item, time, rating) for user, item, time, rating in ROWS]
    other = again(tmp_path, ROWS, "--seed", "1") if change == "seed" else again(tmp_path, renamed)
    before, spec = spec_of(corpus, shop_words, item_format), spec_of(other, shop_words, item_format)
    assert before.catalog.fingerprint == spec.catalog.fingerprint
    identity = trained_on.task_fingerprints([before])
    for trained in (identity, without_items(identity)):
        with pytest.raises(InputError, match="its item numbers are other items"):
            trained_on.check_use(spec, "run", trained)
    trained_on.check_start([spec], shop_words, False, identity)
    assert ("tokens of other items than store" in capsys.readouterr().err) == (item_format == "token")
    trained_on.check_use(
        spec_of(other, shop_words, "title"), "run", trained_on.task_fingerprints([spec_of(corpus, shop_words, "title")])
    )


def test_the_same_items_in_another_order_of_interactions(corpus, shop_words, tmp_path):
    """Numbers depend on the ids alone."""
    other = again(tmp_path, [(user, item, 9 - time, rating) for user, item, time, rating in ROWS])
    assert other.fingerprint != corpus.fingerprint
    before, spec = spec_of(corpus, shop_words, "token"), spec_of(other, shop_words, "token")
    trained_on.check_use(spec, "run", trained_on.task_fingerprints([before]))


@pytest.mark.parametrize("knows_items", [True, False])
def test_an_extension_leaves_numbers_as_they_are(corpus, shop_words, knows_items, capsys):
    families = {item_format: spec_of(corpus, shop_words, item_format) for item_format in ("token", "id", "title")}
    trained = {name: trained_on.task_fingerprints([spec]) for name, spec in families.items()}
    if not knows_items:
        trained = {name: without_items(identity) for name, identity in trained.items()}
    logs_alone = extended(corpus, [("u0", "i9", 50, 3), ("new", "i1", 51, 3)])
    for name, identity in trained.items():
        trained_on.check_use(spec_of(logs_alone, shop_words, name), "run", identity)
    with_items = extended(logs_alone, [("u0", "j1", 60, 3), ("u1", "j2", 61, 3)])
    for name in ("id", "title"):
        trained_on.check_use(spec_of(with_items, shop_words, name), "run", trained[name])
    token = spec_of(with_items, shop_words, "token")
    with pytest.raises(InputError, match="no tokens for 2 new items"):
        trained_on.check_use(token, "run", trained["token"])
    trained_on.check_start([token], shop_words, False, trained["token"])
    assert "warning" not in capsys.readouterr().err


def test_the_random_split_is_drawn_anew_with_an_extension(corpus, shop_words, capsys):
    """Else most of what is held out would be what the model was trained on."""
    before = trained_on.task_fingerprints([spec_of(corpus, shop_words, "id", "rating_random")])
    spec = spec_of(extended(corpus, [("u0", "i9", 50, 3)]), shop_words, "id", "rating_random")
    with pytest.raises(InputError, match="random split of ratings is another one"):
        trained_on.check_use(spec, "run", before)
    trained_on.check_start([spec], shop_words, False, before)
    assert "random split of ratings is another one" in capsys.readouterr().err


def test_adapters_need_tokens_that_are_there(corpus, shop_words, capsys):
    spec = spec_of(corpus, shop_words, "token")
    trained = trained_on.task_fingerprints([spec])
    later = spec_of(extended(corpus, [("u0", "j1", 60, 3)]), shop_words, "token")
    for asked, identity, warned in ((spec, trained, False), (later, trained, True), (spec, {}, True)):
        capsys.readouterr()
        trained_on.check_start([asked], shop_words, True, identity)
        assert ("Adapters don't train the embeddings of item tokens" in capsys.readouterr().err) == warned


def test_another_vocabulary_is_no_start(corpus, shop_words):
    other = dataclasses.replace(shop_words, path="words.model", fingerprint="other")
    spec = spec_of(corpus, shop_words, "title")
    with pytest.raises(InputError, match=r"trained with another vocabulary than words\.model"):
        trained_on.check_start([spec], other, False, trained_on.task_fingerprints([spec]))
    trained_on.check_start([spec], other, False, {})  # a published model
