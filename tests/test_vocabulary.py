"""The vocabulary: T5's layout, the messages when it is another, and agreement with SeqIO and transformers."""

import io
import pickle

import pytest
import sentencepiece

from recalign_jax.errors import InputError
from seqio_tasks import prompts, vocabulary
from tests.shared_data import shared

TEXTS = [
    *prompts.literals(),
    "A user chose , in order : Avlon Styling Wax, 2.6 Ounce ; [masked item] . Next item ?",
    "Rimmel Scandal Eyes Waterproof Kohl Eyeliner - Purple 013",
    "  two  spaces\tand a tab ",
    "",
    "L'Oréal ½ oz. 保湿 <extra_id_0> </s>",
]


def trained(folder, text: str = "the red and the blue soap " * 5, **options) -> str:
    """Path of a small model with T5's layout, but for `options`."""
    model = io.BytesIO()
    layout = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 17, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([text]), model_writer=model, **layout | options)
    (folder / "words.model").write_bytes(model.getvalue())
    return str(folder / "words.model")


def test_t5_layout(t5_words):
    assert t5_words.num_tokens == 32_100
    assert t5_words.fingerprint.startswith("d60acb12")
    assert t5_words.encode(["Next item ?"]) == [[3021, 2118, 3, 58]]


def test_seqio_agrees(t5_words):
    import seqio

    theirs = seqio.SentencePieceVocabulary(t5_words.path, extra_ids=vocabulary.NUM_SENTINELS)
    assert (theirs.vocab_size, theirs.pad_id, theirs.eos_id, theirs.unk_id) == (
        *(t5_words.num_tokens, vocabulary.PAD_ID),
        *(vocabulary.EOS_ID, vocabulary.UNK_ID),
    )
    # SeqIO reads sentinels out of text, ours are never written in one.
    texts = [text for text in TEXTS if "extra_id" not in text]
    assert t5_words.encode(texts) == [theirs.encode(text) for text in texts]
    for text in texts:
        ids = [*t5_words.encode([text])[0], vocabulary.EOS_ID, vocabulary.PAD_ID]
        assert t5_words.decode(ids) == theirs.decode(ids)
    for sentinel in (0, 7, 99):
        token = t5_words.num_tokens - 1 - sentinel
        assert t5_words.decode([token]) == theirs.decode([token]).strip() == f"<extra_id_{sentinel}>"


def test_transformers_agrees(t5_words):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(shared("data/t5_vocabulary")))
    assert len(theirs) == t5_words.num_tokens
    for text in TEXTS:
        if "extra_id" not in text and text:
            assert [*t5_words.encode([text])[0], vocabulary.EOS_ID] == theirs(text)["input_ids"]
    assert theirs.convert_ids_to_tokens(32_099) == t5_words.decode([32_099]) == "<extra_id_0>"


def test_decode_writes_items_and_sentinels_between_the_text(shop_words):
    count = shop_words.num_tokens
    red, soap = shop_words.encode(["red", "soap"])
    ids = [*red, count, *soap, count + 41, count - 1, count - 100, *red, vocabulary.EOS_ID, *[vocabulary.PAD_ID] * 3]
    assert shop_words.decode(ids) == "red <item_0> soap <item_41> <extra_id_0> <extra_id_99> red"
    assert shop_words.decode([count + 41, vocabulary.EOS_ID]) == "<item_41>"
    assert shop_words.decode([]) == ""


def test_a_loaded_vocabulary_can_be_pickled(shop_words):
    again = pickle.loads(pickle.dumps(shop_words))
    assert again == shop_words
    assert hash(again) == hash(shop_words)
    assert again.encode(["red soap"]) == shop_words.encode(["red soap"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file"),
        (b"", "is no SentencePiece model"),
        (b"red\nblue\n", "is no SentencePiece model"),
        (bytes(1000), "is no SentencePiece model"),
    ],
)
def test_no_model(tmp_path, content, message):
    path = tmp_path / "some.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        vocabulary.load(str(path))
    assert str(path) in str(caught.value)


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(InputError, match="is no file"):
        vocabulary.load(str(tmp_path))


def test_a_vocabulary_is_found_by_its_path_or_its_name_in_the_data_dir(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "vocabularies"
    folder.mkdir(parents=True)
    (folder / "shop_1000.model").touch()
    assert vocabulary.find("shop_1000.model", tmp_path / "data") == str(folder / "shop_1000.model")
    assert vocabulary.find(str(folder / "shop_1000.model"), None) == str(folder / "shop_1000.model")
    monkeypatch.setenv("RECALIGN_DATA_DIR", str(tmp_path / "data"))
    assert vocabulary.find("shop_1000.model", None) == str(folder / "shop_1000.model")
    # A file of that name here comes first.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop_1000.model").touch()
    assert vocabulary.find("shop_1000.model", None) == "shop_1000.model"
    message = r"Vocabulary shop_100.model is neither a file nor .* in \S+/vocabularies. Did you mean 'shop_1000.model'"
    with pytest.raises(InputError, match=message):
        vocabulary.find("shop_100.model", None)
    with pytest.raises(InputError, match="Vocabulary vocabularies is neither a file"):
        vocabulary.find("vocabularies", tmp_path / "data")


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_path(nothing):
    with pytest.raises(InputError, match=r"--gin\.VOCABULARY=PATH"):
        vocabulary.load(nothing)


def test_the_layout_must_be_t5s(tmp_path):
    assert vocabulary.load(trained(tmp_path)).num_tokens == 117
    # SentencePiece's default: unknown 0, beginning 1, end 2, no pad.
    path = trained(tmp_path, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    with pytest.raises(InputError, match=r"pad, end of sequence, unknown are \(-1, 2, 0\), not \(0, 1, 2\)"):
        vocabulary.load(path)


def test_missing_pieces_are_named(tmp_path, shop_words):
    vocabulary.check_pieces(shop_words, prompts.literals())
    words = vocabulary.load(trained(tmp_path))
    vocabulary.check_pieces(words, ["red soap"])
    with pytest.raises(InputError, match=r"'the \[red\] soap\?': no \? \[ \]\.") as caught:
        vocabulary.check_pieces(words, ["red soap", "the [red] soap?"])
    assert words.path in str(caught.value)
    assert "recalign vocab" in str(caught.value)
