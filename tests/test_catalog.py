"""The catalogue: formats, fallbacks, caps, collisions, and pieces that join as the text does."""

from collections import Counter

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.corpus import catalog
from recalign_jax.corpus.records import clean_text
from recalign_jax.errors import InputError
from tests.corpora import prepared, shared_corpus, write_tables
from tests.shared_data import shared

ROWS = [("u", item, time) for time, item in enumerate("abcdefghi")]
ITEMS = [
    {"item_id": "a", "title": "Red  tea \x07\n"},
    {"item_id": "b", "title": "Red tea"},
    {"item_id": "c", "brand": "Acme", "categories": ["Home", "Bath"]},
    {"item_id": "d", "brand": "UNKNOWN", "categories": ["Home", "Bath"]},
    {"item_id": "e", "brand": "Acme"},
    {"item_id": "f", "brand": "Unknown"},
    {"item_id": "g", "title": "one two three four five six"},
    {"item_id": "h", "title": "one two three four five seven"},
]


class Words:
    """A tokenizer of whole words that drops "!", as SentencePiece drops some characters."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [[self.ids.setdefault(w, len(self.ids) + 3) for w in text.replace("!", "").split()] for text in texts]

    def decode(self, tokens) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[token] for token in tokens)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return prepared("tables", write_tables(folder / "raw", ROWS, ITEMS), folder, "small")


@pytest.fixture(scope="module")
def t5():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(shared("data/t5_vocabulary/spiece.model")))
    return processor.encode


def numbers(corpus):
    return {corpus.item_source_id(item): item for item in range(corpus.num_items)}


def test_titles_and_fallbacks(small):
    words = Words()
    built = catalog.build_catalog(small, "title", words, first_item_token=100)
    texts = {name: words.decode(built.displays.of(item)) for name, item in numbers(small).items()}
    assert texts == {
        "a": "Red tea",
        "b": "Red tea",
        "c": "Acme Bath",
        "d": "Bath",
        "e": "Acme",
        "f": f"item {numbers(small)['f']}",
        "g": "one two three four five six",
        "h": "one two three four five seven",
        "i": f"item {numbers(small)['i']}",  # only in the interactions
    }
    assert built.num_collisions == 2
    assert built.popularity.tolist() == small.training_popularity.tolist()


def test_a_title_that_leaves_no_token_is_written_as_its_number(tmp_path):
    corpus = prepared(
        "tables", write_tables(tmp_path / "raw", ROWS[:1], [{"item_id": "a", "title": "!!"}]), tmp_path, "c"
    )
    words = Words()
    assert words.decode(catalog.build_catalog(corpus, "title", words, 100).displays.of(0)) == "item 0"


@pytest.mark.parametrize("cap", [2, 4, 6, 7, 48])
def test_layout_and_cap(small, cap):
    built = catalog.build_catalog(small, "title", Words(), 100, max_item_tokens=cap)
    whole = catalog.build_catalog(small, "title", Words(), 100)
    assert (built.tokens.dtype, built.lengths.dtype, built.displays.tokens.dtype) == (np.int32,) * 3
    assert built.tokens.shape == (9, min(cap, 7))
    for item in range(9):
        length = built.lengths[item]
        assert length == min(cap, whole.lengths[item])
        target = built.tokens[item]
        assert (
            target[: length - 1].tolist()
            == whole.displays.of(item)[: cap - 1].tolist()
            == built.displays.of(item).tolist()
        )
        assert target[length - 1] == catalog.EOS_ID
        assert (target[length:] == catalog.PAD_ID).all()
        assert np.shares_memory(built.displays.of(item), built.displays.tokens)
    # g and h differ in their last word only.
    assert built.num_collisions == sum(n for n in Counter(map(bytes, built.tokens)).values() if n > 1)
    assert built.num_collisions >= (4 if cap < 7 else 2)


def test_own_tokens(small):
    def encode(texts):
        raise AssertionError("text is not needed")

    built = catalog.build_catalog(small, "token", encode, first_item_token=32_100)
    assert built.tokens.tolist() == [[32_100 + item, 1] for item in range(9)]
    assert [built.displays.of(item).tolist() for item in range(9)] == [[32_100 + item] for item in range(9)]
    assert built.num_collisions == 0
    assert built.lengths.tolist() == [2] * 9


def test_an_unknown_format_is_an_input_error(small):
    with pytest.raises(InputError, match=r"there are title, id, token\. Did you mean 'title'\?"):
        catalog.build_catalog(small, "titel", Words(), 100)


def test_the_fingerprint_is_that_of_the_tokens(small):
    def fingerprint(item_format="title", cap=48, first=100):
        return catalog.build_catalog(small, item_format, Words(), first, cap).fingerprint

    assert fingerprint() == fingerprint(first=7)
    assert len({fingerprint(), fingerprint(cap=5), fingerprint("token"), fingerprint("token", first=7)}) == 4


def test_beauty_in_t5_tokens(t5):
    beauty = shared_corpus("amazon_beauty")
    built = catalog.build_catalog(beauty, "title", t5, 32_100)
    assert built.tokens.shape == (12_101, 48)
    titles = Counter(catalog.title_text(beauty, item) for item in range(beauty.num_items))
    assert built.num_collisions >= sum(n for n in titles.values() if n > 1)
    capped = sum(len(tokens) > 47 for tokens in t5(list(titles)))
    assert built.num_collisions < 55 + 7 + capped
    for item in range(0, beauty.num_items, 997):
        assert built.displays.of(item).tolist() == t5(catalog.title_text(beauty, item))[:47]


# Joined pieces equal the tokens of the joined text. The exceptions are ties: "+++" is as likely as "++" "+" and as
# "+" "++", and rounding, which depends on what stands before, decides. The tokens are the same in another order.

EXCEPTIONS = {"amazon_beauty": ("+++", "xxx"), "amazon_toys": ()}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_joined_pieces_are_the_tokens_of_the_joined_text(name, t5):
    corpus = shared_corpus(name)
    around, separator = t5("Face Milk"), t5(";")
    texts = [catalog.title_text(corpus, item) for item in range(corpus.num_items)]
    joined = t5([f"Face Milk ; {text} ; Face Milk" for text in texts])
    exceptions = []
    for text, tokens, pieces in zip(texts, joined, t5(texts), strict=True):
        expected = [*around, *separator, *pieces, *separator, *around]
        if tokens != expected:
            assert sorted(tokens) == sorted(expected)
            exceptions.append(text)
    assert [text for text in exceptions if not any(tie in text for tie in EXCEPTIONS[name])] == []
    assert len(exceptions) <= 5


@settings(max_examples=300)
@given(st.lists(st.text(), min_size=2, max_size=4))
def test_joined_pieces_of_any_text(t5, raw):
    texts = [text for text in map(clean_text, raw) if t5(text)]
    separator = t5(";")
    joined = [token for text in texts for token in [*separator, *t5(text)]][len(separator) :]
    assert sorted(t5(" ; ".join(texts))) == sorted(joined)
