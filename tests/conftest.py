"""Corpora and vocabularies that several files use, prepared once a session; and the devices that tests run on."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import gin
import hypothesis
import numpy as np
import pytest

from recalign_jax.corpus import vocab
from recalign_jax.corpus.corpus import Corpus
from seqio_tasks import prompts, vocabulary
from tests.corpora import prepared, shared_corpus, write_tables
from tests.shared_data import shared

# The machines that run the tests are busy: the time of one example says nothing. What is drawn is always the same, so
# that a change isn't refused for what was there before; other draws are for those who look for more.
RANDOM = os.environ.get("RECALIGN_RANDOM_TESTS") == "1"
hypothesis.settings.register_profile("recalign", deadline=None, derandomize=not RANDOM)
hypothesis.settings.load_profile("recalign")


# The files that take longest come first: of two workers none is left with one of them while the other is done.
LONGEST = (
    *("test_interruptions.py", "test_train_loop.py", "test_commands.py", "test_lora.py"),
    *("test_train_devices8.py", "test_memory_devices8.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("devices8"):
        import jax

        if jax.device_count() < 8:
            pytest.skip("needs eight devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")


@pytest.fixture(autouse=True, scope="module")
def _fresh_gin():
    """No test file sees what another one bound."""
    gin.clear_config()


@pytest.fixture(scope="module")
def fast_compilation():
    """For files whose time is the compiler's: programs are compiled as they stand, also in other processes."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("recalign_data")


@pytest.fixture(scope="session")
def beauty_corpus(data_dir) -> Corpus:
    """../shared/data/amazon_beauty: 22,363 users, 12,101 items, no user repeats an item."""
    return prepared("tables", shared("data/amazon_beauty"), data_dir, "amazon_beauty")


@pytest.fixture(scope="session")
def shop_corpus(data_dir, tmp_path_factory) -> Corpus:
    """50 users with one to 40 rated interactions, 60 items; source ids are unlike any other text."""
    random = np.random.default_rng(0)
    words = ["red", "blue", "soft", "hard", "large", "small", "soap", "brush", "towel", "cream", "comb", "for", "the"]
    titles = [" ".join(random.choice(words, 1 + item % 9)) + f" {item}" for item in range(60)]
    items = [{"item_id": f"B00QXZ{item:04d}", "title": title} for item, title in enumerate(titles)]
    items[7]["title"] = items[8]["title"]  # two items of one title
    items[9] = {"item_id": items[9]["item_id"], "brand": "Acme", "categories": ["Bath", "Tubs"]}
    lengths = [1, 2, 3, 4, *random.integers(1, 41, 46)]
    rows = [
        (f"USR{user:03d}QXZ", items[item]["item_id"], time, 0.5 * (2 + (3 * item + user) % 9))
        for user, length in enumerate(lengths)
        for time, item in enumerate(random.permutation(59)[:length])  # nobody met the last item
    ]
    folder = write_tables(tmp_path_factory.mktemp("shop"), rows, items)
    return prepared("tables", folder, data_dir, "shop")


@pytest.fixture(scope="session")
def shop_words(shop_corpus, data_dir) -> vocabulary.Vocabulary:
    """A vocabulary trained on the text of the shop."""
    path = data_dir / "shop.model"
    path.write_bytes(vocab.train_vocabulary([*vocab.corpus_text(shop_corpus)], 170, prompts.literals()))
    return vocabulary.load(str(path))


@pytest.fixture(scope="session")
def t5_words() -> vocabulary.Vocabulary:
    """The vocabulary of T5 and FLAN-T5."""
    return vocabulary.load(str(shared("data/t5_vocabulary/spiece.model")))


@pytest.fixture(scope="session")
def movielens_corpus() -> Corpus:
    """../shared/data/movielens_100k: 943 users, 1,682 items, rated."""
    return shared_corpus("movielens_100k")


@pytest.fixture(scope="session")
def movielens_words(movielens_corpus, data_dir) -> vocabulary.Vocabulary:
    """A vocabulary trained on the text of MovieLens."""
    path = data_dir / "movielens.model"
    path.write_bytes(vocab.train_vocabulary([*vocab.corpus_text(movielens_corpus)], 600, prompts.literals()))
    return vocabulary.load(str(path))
