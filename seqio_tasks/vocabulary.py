"""T5's SentencePiece vocabulary: pad 0, end of sequence 1, unknown 2, 100 sentinels on top of the pieces.

Of the `token` item format, item i is the entry `num_tokens + i` above them (FLAN-T5: 32,100 + i).
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import sentencepiece

from recalign_jax.corpus.catalog import EOS_ID, PAD_ID
from recalign_jax.corpus.corpus import VOCABULARIES, data_dir_or_default
from recalign_jax.errors import InputError, did_you_mean

UNK_ID = 2
NUM_SENTINELS = 100


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model in T5's layout.

    Attributes:
      path: of the `.model` file.
      fingerprint: sha256 of the file.
      num_tokens: pieces and sentinels; equals `len(tokenizer)` of transformers' T5 tokenizer.
    """

    path: str
    fingerprint: str
    num_tokens: int

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_file=self.path)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without end of sequence."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; item tokens are written `<item_7>`, sentinels `<extra_id_0>`."""
        words: list[str] = []
        pieces: list[int] = []
        num_pieces = self.num_tokens - NUM_SENTINELS

        def flush() -> None:
            if pieces:
                words.append(self._processor.decode(pieces))
                pieces.clear()

        for token in map(int, ids):
            if token < num_pieces:
                pieces.append(token)
                continue
            flush()
            if token < self.num_tokens:
                words.append(f"<extra_id_{self.num_tokens - 1 - token}>")
            else:
                words.append(f"<item_{token - self.num_tokens}>")
        flush()
        return " ".join(filter(None, words))


def find(name: str, data_dir: str | pathlib.Path | None) -> str:
    """The path of a vocabulary: that of a file, or the name of one in DATA_DIR/vocabularies.

    Raises:
      InputError: when it is neither.
    """
    folder = data_dir_or_default(data_dir) / VOCABULARIES
    for path in (pathlib.Path(name), folder / name):
        if path.is_file():
            return str(path)
    hint = did_you_mean(name, [path.name for path in folder.glob("*.model")])
    raise InputError(
        f"Vocabulary {name} is neither a file nor the name of one in {folder}.{hint} Give a SentencePiece .model; "
        "recalign vocab trains one."
    )


def load(path: str) -> Vocabulary:
    """Loads a SentencePiece model and checks that it is laid out as T5's.

    Raises:
      InputError: when the file is missing, no SentencePiece model, or laid out otherwise.
    """
    if not path:
        raise InputError(
            "No vocabulary given: --gin.VOCABULARY=PATH (a SentencePiece .model; recalign vocab trains one)."
        )
    file = pathlib.Path(path)
    if not file.is_file():
        raise InputError(f"Vocabulary {path} is no file. Give a SentencePiece .model; recalign vocab trains one.")
    data = file.read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise InputError(f"Vocabulary {path} is no SentencePiece model: {error}") from error
    layout = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if layout != (PAD_ID, EOS_ID, UNK_ID):
        raise InputError(
            f"Vocabulary {path} is not laid out as T5's: pad, end of sequence, unknown are {layout}, "
            f"not {(PAD_ID, EOS_ID, UNK_ID)}. recalign vocab trains one that is."
        )
    return Vocabulary(str(file), hashlib.sha256(data).hexdigest(), processor.get_piece_size() + NUM_SENTINELS)


def check_pieces(vocabulary: Vocabulary, texts: Sequence[str]) -> None:
    """Raises InputError when the vocabulary can't write one of the texts."""
    for text, ids in zip(texts, vocabulary.encode(texts), strict=True):
        if UNK_ID in ids:
            missing = sorted({c for c in text if not c.isspace() and UNK_ID in vocabulary.encode([c])[0]})
            raise InputError(
                f"Vocabulary {vocabulary.path} lacks pieces for the prompt text {text!r}"
                f"{': no ' + ' '.join(missing) if missing else ''}. Train one with recalign vocab."
            )


def embedding_rows(num_tokens: int) -> int:
    """Rows of a model's embedding for so many entries: the next multiple of 128, whatever the mesh.

    So a checkpoint fits every mesh: 128 suits the matrix units, and every model axis of a power of two up to it
    divides it.
    """
    return -(-num_tokens // 128) * 128
