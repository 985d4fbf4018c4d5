"""Constrained decoding against transformers' `generate` on random models: the same tokens and the same scores.

transformers is held to the catalogue by `prefix_allowed_tokens_fn`, which sets other tokens to -inf after the softmax,
so its scores are over the whole vocabulary, as ours. Both divide them by length ** length_penalty, with
end-of-sequence counted. Two things are not the same:

- When to stop. We go on while a beam could still enter the result. transformers does so with early_stopping='never';
  False compares with what beams would score if they ended now, True stops at num_beams finished sequences.
- What may finish. We let an item end at every beam. transformers lets it end only if, of all continuations of all
  beams, its end is among the best num_beams: short items lose to long ones that are likelier so far. It can't happen
  where all items are of one length, or no more than num_beams. Greedy search is the same rule with one beam: it never
  ends an item that has a likelier continuation.

So: equality where the rule can't act; elsewhere a search in Python that follows the rule gives transformers' result,
and the same search without it ours.
"""

import functools

import jax
import numpy as np
import pytest

from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.decoding.retrieve import make_generate
from recalign_jax.decoding.trie import build_trie
from recalign_jax.model import t5
from tests.test_model_torch import CONFIG, our_params, torch, torch_model, transformers
from tests.test_trie import pad, padded

SEEDS, USERS, PROMPT, DEPTH, ITEMS = (0, 1, 2), 4, 12, 6, 40
TOLERANCE = 1e-4
# Every number of beams with one length penalty.
BEAMS = [(1, 0.0), (2, 1.0), (3, 0.6), (4, 0.0), (5, 2.0), (6, 1.0), (7, 0.6), (8, 0.0)]
STOPPING = (False, True, "never")


def distinct(random, count, draw):
    """`count` different sequences in a random order."""
    found = {}
    while len(found) < count:
        found[tuple(draw().tolist())] = None
    return [list(sequence) for sequence in found]


def catalogue(kind, random):
    """Sequences without end-of-sequence, over few tokens, so that they share prefixes."""
    if kind == "one length":
        return distinct(random, ITEMS, lambda: random.integers(2, 8, 4))
    if kind == "prefix-free":  # the last token of an item is one that stands nowhere else
        return [
            [*s[:-1], 50 + s[-1]] for s in distinct(random, ITEMS, lambda: random.integers(2, 6, random.integers(1, 6)))
        ]
    if kind == "few":
        return distinct(random, 8, lambda: random.integers(2, 4, random.integers(1, 6)))
    return distinct(random, ITEMS, lambda: random.integers(2, 6, random.integers(1, 6)))


class Case:
    """A random model, prompts and a catalogue."""

    def __init__(self, kind, seed):
        random = np.random.default_rng(seed)
        self.model = torch_model(tied=False, scaled=False, seed=seed).eval()
        self.model.generation_config = transformers.GenerationConfig(
            decoder_start_token_id=0, eos_token_id=EOS_ID, pad_token_id=0
        )
        self.params = our_params(self.model, CONFIG)
        self.sequences = [(*sequence, EOS_ID) for sequence in catalogue(kind, random)]
        self.prompts = random.integers(2, CONFIG.vocab_size, (USERS, PROMPT))
        for user in range(USERS):
            self.prompts[user, random.integers(3, PROMPT + 1) :] = 0
        self.following = {}
        for sequence in self.sequences:
            for place, token in enumerate(sequence):
                self.following.setdefault(sequence[:place], set()).add(token)

    def ours(self, num_beams, top_k, length_penalty):
        """(sequence, score) of the best items of every user."""
        trie = build_trie(
            *pad([s[:-1] for s in self.sequences]), np.zeros(len(self.sequences)), vocab_size=CONFIG.vocab_size
        )
        # Shapes and bounds that all cases share, so that they share a compiled program.
        trie = padded(trie, ITEMS * DEPTH, root_branch=8, max_branch=8, max_depth=DEPTH)
        excluded = np.full((USERS, 1), -1, np.int32)
        found = generate(num_beams, top_k, length_penalty)(
            self.params, self.prompts.astype(np.int32), excluded, None, trie
        )
        return [
            [(self.sequences[item], score) for item, score in zip(*row, strict=True) if item >= 0]
            for row in zip(*map(np.asarray, jax.device_get(found)), strict=True)
        ]

    def transformers(self, num_beams, length_penalty, early_stopping):
        tokens = torch.from_numpy(self.prompts)
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping} if num_beams > 1 else {}
        output = self.model.generate(
            tokens,
            attention_mask=(tokens > 0).long(),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=DEPTH,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids: sorted(self.following.get(tuple(ids[1:].tolist()), {EOS_ID})),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            use_cache=False,  # its cache has as many layers as the encoder, and this decoder has one more
            **options,
        )
        # What follows the first end-of-sequence is filled up, with more of them.
        sequences = [tuple(row[1 : row.index(EOS_ID) + 1]) for row in output.sequences.tolist()]
        if num_beams > 1:
            scores = output.sequences_scores.tolist()
        else:
            steps = torch.stack(output.logits, dim=1).log_softmax(-1)  # [B, T, V]
            scores = [
                sum(steps[user, place, token].item() for place, token in enumerate(sequence))
                for user, sequence in enumerate(sequences)
            ]
        rows = list(zip(sequences, scores, strict=True))
        # Beams that were filled up for want of continuations have about -1e9.
        return [
            [one for one in rows[user * num_beams : (user + 1) * num_beams] if one[1] > -1e6] for user in range(USERS)
        ]

    @functools.cached_property
    def log_probabilities(self):
        """{prefix: [V]} of every user, from torch under teacher forcing."""
        decoder, _ = pad([s[:-1] for s in self.sequences])
        decoder = np.pad(decoder, ((0, 0), (1, 0)))[:, :-1].astype(np.int64)
        table = []
        for prompt in self.prompts:
            tokens = torch.from_numpy(np.repeat(prompt[None], len(decoder), axis=0))
            with torch.no_grad():
                logits = self.model(
                    input_ids=tokens, attention_mask=(tokens > 0).long(), decoder_input_ids=torch.from_numpy(decoder)
                ).logits
            steps = logits.double().log_softmax(-1).numpy()
            table.append(
                {
                    sequence[:place]: steps[item, place]
                    for item, sequence in enumerate(self.sequences)
                    for place in range(len(sequence))
                }
            )
        return table

    def in_python(self, user, num_beams, length_penalty, end_among_best):
        """Beam search; `end_among_best` is transformers' rule. It never stops early."""
        beams, finished = [((), 0.0)], []
        while beams:
            after = sorted(
                (
                    ((*prefix, token), score + self.log_probabilities[user][prefix][token])
                    for prefix, score in beams
                    for token in self.following[prefix]
                ),
                key=lambda one: -one[1],
            )
            may_end = after[:num_beams] if end_among_best else after
            finished += [(s, score / len(s) ** length_penalty) for s, score in may_end if s[-1] == EOS_ID]
            beams = [one for one in after if one[0][-1] != EOS_ID][:num_beams]
        return sorted(finished, key=lambda one: -one[1])[:num_beams]


@functools.cache
def generate(num_beams, top_k, length_penalty):
    quick = {"xla_backend_optimization_level": 0}  # to compile
    return jax.jit(make_generate(t5.graph(CONFIG), num_beams, top_k, length_penalty), compiler_options=quick)


@functools.cache
def case(kind, seed):
    return Case(kind, seed)


def assert_equal(found, expected):
    assert [sequence for sequence, _ in found] == [sequence for sequence, _ in expected]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["one length", "prefix-free"])
def test_greedy(kind, seed):
    here = case(kind, seed)
    for found, expected in zip(here.ours(1, 1, 0.0), here.transformers(1, 0.0, None), strict=True):
        assert len(found) == 1
        assert_equal(found, expected)


@pytest.mark.parametrize(("num_beams", "length_penalty"), BEAMS[1:])
def test_beams_where_all_items_have_one_length(num_beams, length_penalty):
    for seed, stopping in zip(SEEDS, STOPPING, strict=True):
        here = case("one length", seed)
        ours = here.ours(num_beams, num_beams, length_penalty)
        for found, expected in zip(ours, here.transformers(num_beams, length_penalty, stopping), strict=True):
            assert len(found) == num_beams
            assert_equal(found, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_as_many_beams_as_items(seed):
    """Items of all lengths, also such as begin others: all of them come, in the same order."""
    here = case("few", seed)
    for found, expected in zip(here.ours(8, 8, 2.0), here.transformers(8, 2.0, "never"), strict=True):
        assert len(found) == 8
        assert_equal(found, expected)


@pytest.mark.parametrize(("num_beams", "length_penalty"), [BEAMS[1], BEAMS[4], BEAMS[7]])
def test_what_may_finish_is_all_that_differs(num_beams, length_penalty):
    for seed in SEEDS:
        here = case("any", seed)
        ours = here.ours(num_beams, num_beams, length_penalty)
        theirs = here.transformers(num_beams, length_penalty, "never")
        for user in range(USERS):
            assert_equal(ours[user], here.in_python(user, num_beams, length_penalty, end_among_best=False))
            assert_equal(theirs[user], here.in_python(user, num_beams, length_penalty, end_among_best=True))
            for (_, score), (_, other) in zip(ours[user], theirs[user], strict=False):
                assert score >= other - TOLERANCE  # at every rank what we return is at least as likely
