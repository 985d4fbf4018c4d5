"""Trains a SentencePiece vocabulary on the text of a corpus, in T5's layout.

Pad is 0, end-of-sequence 1, unknown 2 and there is no beginning-of-sequence, so that it can stand in the place of
T5's own: `seqio.SentencePieceVocabulary(path, extra_ids=100)` puts the sentinels on top. Vocabularies lie beside
the corpora, not inside: preparing a corpus again replaces its whole directory.
"""

import io
import re
import string
from collections.abc import Iterator, Sequence

from recalign_jax import errors
from recalign_jax.corpus.corpus import Corpus

# Prompts and numbers that the corpus lacks must not become unknown tokens.
_ALWAYS = string.ascii_letters + string.digits + string.punctuation
_MAX_TEXT_BYTES = 65_536
_PHRASE_WEIGHT = 1000


def corpus_text(corpus: Corpus) -> Iterator[str]:
    """Yields the titles, brands and categories of all items."""
    for item in range(corpus.num_items):
        text = corpus.item_text(item)
        yield from filter(None, (text.title, text.brand, *text.categories))


class TooManyPieces(errors.InputError):
    """The text gives no vocabulary of so many pieces; `largest` is how many it gives."""

    def __init__(self, size: int, largest: int):
        super().__init__(
            f"The text gives no vocabulary of {size} pieces. The largest --size that it gives is {largest}."
        )
        self.largest = largest


def train_vocabulary(texts: Sequence[str], size: int, phrases: Sequence[str] = ()) -> bytes:
    """Returns a serialized SentencePiece unigram model.

    Args:
      texts: what it is trained on.
      size: number of pieces.
      phrases: as prompts, which stand in every sample: every word of them should become a piece.

    Raises:
      TooManyPieces: the size is more than the text can give.
      InputError: it is too small for its characters.
    """
    import sentencepiece

    # A string is considered as a piece only if two different words hold it, however often one occurs.
    held_twice = [" ".join(f"{word}." for word in phrase.split()) for phrase in phrases]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*texts, *list(phrases) * _PHRASE_WEIGHT, *held_twice]),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            character_coverage=1.0,
            required_chars=_ALWAYS,
            max_sentence_length=_MAX_TEXT_BYTES,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _explained(str(error), size) from None
    return model.getvalue()


def _explained(message: str, size: int) -> errors.InputError:
    if too_high := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return TooManyPieces(size, int(too_high[1]))
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        reason = f"--size {size} is too small: the characters of the text alone take {too_small[1]} pieces."
        return errors.InputError(reason)
    return errors.InputError(f"SentencePiece cannot train a vocabulary of {size} pieces: {message}")
