"""Decodes a million results, and looks at every one: an item of the catalogue, once a user, with its own score.

    python tests/decode_many.py --items DIR/items.jsonl.gz --vocabulary spiece.model

The titles are real; the decoder is a random table of logits that depend on the user, the position and the last token,
so that every score can be computed again from the item's tokens alone. Each user excludes a few items. Both kinds of
scores take turns; those over the trie are computed again for some results only. Prints one JSON line with the number of
results and of wrong ones, and fails if there are any.
"""

import argparse
import gzip
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from recalign_jax.corpus.catalog import EOS_ID, PAD_ID
from recalign_jax.decoding.beam_search import beam_search
from recalign_jax.decoding.scoring import SCORES, Decoder
from recalign_jax.decoding.trie import build_trie

USERS, BEAMS, EXCLUDED, STATES, LONGEST = 100, 20, 8, 997, 47
SAMPLE = 20  # users of a batch whose scores over the trie are computed again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", required=True, help="items.jsonl.gz with titles")
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--results", type=int, default=1_000_000)
    args = parser.parse_args()
    counts = decode(*sequences(args.items, args.vocabulary), args.results)
    print(json.dumps(counts))
    if any(count for name, count in counts.items() if name != "results"):
        sys.exit(1)


def sequences(items: str, vocabulary: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [I, T], lengths [I]) of the titles, over the tokens that they use, numbered from 2 on."""
    processor = sentencepiece.SentencePieceProcessor(model_file=vocabulary)
    with gzip.open(items, "rt", encoding="utf-8") as lines:
        titles = [json.loads(line).get("title") or "unknown" for line in lines]
    rows = [row[:LONGEST] for row in processor.encode(titles)]
    number = {token: place for place, token in enumerate(sorted({token for row in rows for token in row}), 2)}
    lengths = np.array([len(row) + 1 for row in rows])
    tokens = np.full((len(rows), lengths.max()), PAD_ID)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row) + 1] = [*map(number.get, row), EOS_ID]
    return tokens, lengths


def decode(tokens: np.ndarray, lengths: np.ndarray, results: int) -> dict[str, int]:
    """Decodes at least so many results and counts what is wrong with them."""
    random, vocab = np.random.default_rng(0), int(tokens.max()) + 1
    table = random.normal(size=(STATES, vocab)).astype(np.float32) * 2
    log_normalizers = np.log(np.exp(table.astype(np.float64)).sum(axis=1))
    trie = build_trie(tokens, lengths, random.integers(0, 9, len(tokens)), vocab)

    def state(users, position, last):
        return (users * 31 + position * 17 + last * 7) % STATES

    def search(scores, users, excluded):
        def step(last, position, cache):
            here = position + jnp.arange(last.shape[2])
            return state(users[:, None, None], here, last)[..., None], cache

        decoder = Decoder(
            step,
            lambda hidden: jnp.asarray(table)[hidden[..., 0]],
            lambda hidden, tokens: jnp.asarray(table)[hidden, tokens],
        )
        cache = jnp.zeros((1, len(users), 1))
        options = {"num_beams": BEAMS, "top_k": BEAMS, "excluded_items": excluded, "scores": scores}
        return beam_search(decoder, cache, trie, **options)

    searches = {scores: jax.jit(lambda *args, scores=scores: search(scores, *args)) for scores in SCORES}
    inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    following: dict[bytes, set[int]] = {}
    for row, length in zip(tokens, lengths, strict=True):
        for place in range(length):
            following.setdefault(row[:place].tobytes(), set()).add(int(row[place]))
    choices = {prefix: np.array(sorted(found)) for prefix, found in following.items()}
    counts = dict.fromkeys(("results", "outside", "repeated", "excluded", "wrong_score"), 0)
    batch = 0
    while counts["results"] < results:
        users = np.arange(batch * USERS, (batch + 1) * USERS)
        excluded = random.integers(0, len(tokens), (USERS, EXCLUDED)).astype(np.int32)
        for scores in SCORES:
            items, values = map(np.asarray, searches[scores](jnp.asarray(users), excluded))
            there = values > -np.inf
            counts["results"] += int(there.sum())
            inside = there & (items >= 0) & (items < len(tokens))
            counts["outside"] += int((there & ~inside).sum())
            ordered = np.sort(np.where(inside, items, -1 - np.arange(BEAMS)), axis=1)
            counts["repeated"] += int((ordered[:, 1:] == ordered[:, :-1]).sum())
            counts["excluded"] += int((items[:, :, None] == excluded[:, None, :]).any(axis=2).sum())
            found = np.where(inside, items, 0)
            states = state(users[:, None, None], np.arange(tokens.shape[1]), inputs[found])  # [B, K, T]
            expected = table[states, tokens[found]].astype(np.float64)
            if scores == "vocabulary":
                expected -= log_normalizers[states]
            else:
                inside[SAMPLE:] = False
                for user, rank, place in zip(*np.nonzero(real[found[:SAMPLE]]), strict=True):
                    after = choices[tokens[found[user, rank], :place].tobytes()]
                    logits = table[states[user, rank, place], after].astype(np.float64)
                    expected[user, rank, place] -= np.log(np.exp(logits).sum())
            expected = np.where(real[found], expected, 0.0).sum(axis=2)
            counts["wrong_score"] += int((inside & (np.abs(expected - values) > 1e-3)).sum())
        batch += 1
    return counts


if __name__ == "__main__":
    main()
