"""Vocabularies trained on a corpus."""

import pytest
import sentencepiece

from recalign_jax.commands import vocab as vocab_command
from recalign_jax.corpus import vocab
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.errors import InputError
from seqio_tasks import prompts
from tests.corpora import call, shared_corpus


@pytest.fixture(scope="module")
def data_dir():
    return shared_corpus("movielens_100k").directory.parent


@pytest.fixture(scope="module")
def trained(data_dir):
    return call(vocab_command, data_dir, "--corpus", "movielens_100k", "--size", "1000")


def test_layout_is_that_of_t5(trained, data_dir):
    assert trained == {"path": str(data_dir / "vocabularies" / "movielens_100k_1000.model"), "size": 1000}
    model = sentencepiece.SentencePieceProcessor(model_file=trained["path"])
    assert model.get_piece_size() == 1000
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    text = "Toy Story (1995) ; [masked item] ~ {Q}"
    assert model.decode(model.encode(text)) == text
    assert len(model.encode("Adventure")) == 1


def test_seqio_puts_the_sentinels_on_top(trained):
    import seqio

    vocabulary = seqio.SentencePieceVocabulary(trained["path"], extra_ids=100)
    assert (vocabulary.vocab_size, vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (1100, 0, 1, 2)
    assert vocabulary.decode(vocabulary.encode("Star Wars (1977)")) == "Star Wars (1977)"
    assert vocabulary.decode([1099]) == "<extra_id_0>"


def test_the_same_text_gives_the_same_vocabulary(trained, data_dir, tmp_path):
    path = str(tmp_path / "again.model")
    again = call(vocab_command, data_dir, "--corpus", "movielens_100k", "--size", "1000", "--output", path)
    assert again["path"] == path
    with open(path, "rb") as one, open(trained["path"], "rb") as other:
        assert one.read() == other.read()


def test_a_vocabulary_is_not_replaced_by_another_one_unasked(data_dir, tmp_path):
    path = tmp_path / "words.model"
    command = (vocab_command, data_dir, "--corpus", "movielens_100k", "--output", str(path))
    call(*command, "--size", "500")
    before = path.read_bytes()
    call(*command, "--size", "500")  # the same again
    with pytest.raises(InputError, match="another vocabulary, which models may have been trained with"):
        call(*command, "--size", "501")
    assert path.read_bytes() == before
    call(*command, "--size", "501", "--overwrite")
    assert path.read_bytes() != before


def test_words_of_phrases_become_pieces(data_dir):
    titles = list(vocab.corpus_text(load_corpus("movielens_100k", data_dir)))

    def pieces(phrases):
        model = sentencepiece.SentencePieceProcessor(model_proto=vocab.train_vocabulary(titles, 500, phrases))
        return model.encode("zygomorphic recommendation ?", out_type=str)

    assert pieces(["zygomorphic recommendation", "which ?"]) == ["▁zygomorphic", "▁recommendation", "▁?"]
    assert len(pieces([])) > 10


def test_every_word_of_the_prompts_is_a_piece(data_dir):
    path = data_dir / "vocabularies" / "words.model"
    call(vocab_command, data_dir, "--corpus", "movielens_100k", "--size", "1000", "--output", str(path))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    words = {word for text in prompts.literals() for word in text.split()}
    assert len(words) > 40
    # Only brackets, which SentencePiece parts from letters, stand by themselves.
    assert {word for word in words if model.encode(word, out_type=str) != [f"▁{word}"]} == {"[masked", "item]"}


def test_sizes_that_cannot_be(data_dir):
    with pytest.raises(InputError, match=r"The largest --size that it gives is \d+") as caught:
        call(vocab_command, data_dir, "--corpus", "movielens_100k", "--size", "90000")
    largest = str(caught.value).split()[-1].rstrip(".")
    assert call(vocab_command, data_dir, "--corpus", "movielens_100k", "--size", largest)["size"] == int(largest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocab_command, "DEFAULT_SIZE", 90000)
        found = call(vocab_command, data_dir, "--corpus", "movielens_100k")
    assert found == {"path": str(data_dir / "vocabularies" / f"movielens_100k_{largest}.model"), "size": int(largest)}
    for size in ("20", "1", "0", "-5"):
        with pytest.raises(InputError, match=size):
            call(vocab_command, data_dir, "--corpus", "movielens_100k", "--size", size)
    assert sorted(path.name for path in (data_dir / "vocabularies").glob("*90000*")) == []
    with pytest.raises(InputError, match="No corpus 'movielens'"):
        call(vocab_command, data_dir, "--corpus", "movielens", "--size", "20")
