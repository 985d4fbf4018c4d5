"""A warning where the tokens of items don't tell them apart, so that no training can."""

from recalign_jax import terminal
from recalign_jax.corpus.catalog import Catalog
from recalign_jax.corpus.corpus import Corpus
from seqio_tasks.vocabulary import UNK_ID, Vocabulary

# Shares of the items. Of the corpora that papers use, in T5's tokens, 0.6 % (Beauty) and 2.1 % (MovieLens-100K, where
# films are listed twice) are the largest: nothing is wrong with them.
_MANY_UNKNOWN, _MANY_SHARED = 0.01, 0.05

_told: set[tuple[str, str, str]] = set()


def warn_of_ambiguous_items(corpus: Corpus, catalog: Catalog, words: Vocabulary) -> None:
    """Warns if many items hold what the vocabulary can't write, or have the tokens of another item; once a process.

    All that a vocabulary lacks is one token: with T5's, titles in Chinese come out alike.
    """
    key = (corpus.name, catalog.item_format, words.fingerprint)
    if key in _told or not terminal.speaks():
        return
    _told.add(key)
    unknown = int((catalog.tokens == UNK_ID).any(axis=1).sum())
    if unknown <= _MANY_UNKNOWN * catalog.num_items and catalog.num_collisions <= _MANY_SHARED * catalog.num_items:
        return
    advice = (
        f"; `recalign vocab --corpus {corpus.name} --size N` trains a vocabulary on its text, for models that are "
        "trained from random parameters"
    )
    terminal.warn(
        f"{corpus.name}: of {catalog.num_items:,} items in format {catalog.item_format}, {unknown:,} hold characters "
        f"that vocabulary {words.path} lacks, and {catalog.num_collisions:,} have the tokens of another item, from "
        f"which no model can tell them. Tasks that end in _token or _id write an item's number instead, as "
        f"{corpus.name}_retrieval_token{advice if unknown else ''}."
    )
