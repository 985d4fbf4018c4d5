"""What the constraint costs a decoding step: next to a step without it, as the catalogue grows, and next to STATIC.

    python benchmarks/decode_masking.py step --corpus amazon_beauty --vocabulary spiece.model
    python benchmarks/decode_masking.py growth
    git clone https://github.com/youtube/static-constraint-decoding
    python benchmarks/decode_masking.py static --static static-constraint-decoding

A step is what a beam search does for one more token of every beam: the caches follow their beams, the decoder runs,
logits are normalised, and the next beams are chosen. Ours is the search's own `advance`, of scores over the vocabulary
and with 64 excluded items a user. The ways take turns, each in one compiled program that keeps the cache in place, and
ratios are medians of the pairs'. Each command prints one JSON line.

`step`: FLAN-T5-small's sizes and random weights, the corpus's titles. The unconstrained step does what a beam search
must do anyway: the best 2 K of all K * V tokens; those of them that are end-of-sequence to what is finished, K of the
others on; and caches that move as little as ours. `overhead` is our step over that one, less 1; aim: at most 0.05.
`overhead_model` is next to a step that chooses nothing: caches, decoder, logits, their normaliser. Both also stand for
each number of tokens that beams have (`by_depth`).

`growth`: the same step over synthetic titles, of which a node has as many children in a small catalogue as in a large
one; the large one is deeper. `narrow`: 10 children a node (of the small one's root 12), 4 levels, 12,000 titles, and 6
levels, a million. `wide`: 110 children, 2 levels, 12,100 titles, and 100 children, 3 levels, a million. Then a title
goes on by itself, up to 16 tokens. Only levels that branch in both are timed. `growth` is the larger of the two
ratios, large over small; aim: at most 1.15.

`static`: STATIC's own benchmark, 2 users, 70 beams, sequences of 8 random tokens out of 2,048 (2 to 2,047: the others
are ours for padding and end-of-sequence), for which it keeps 30 tokens a beam at the second one, looked up in its dense
table. A step is all that follows given logits, of tokens 2 to 8. Theirs: log-softmax, their kernel (or their table),
the 70 best, and their history of tokens, with code of their repository where it is a function there. Ours: `advance`
with a decoder that hands those logits on, so it also looks for items that end and gives caches their slots. Both start
each step from the same beams and must come to the same scores. `ratio` is their seconds over ours for the seven steps,
`ratio_by_step` that of each; aim: at least 1. Index bytes and the seconds to build it (sorting included) stand beside.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from recalign_jax import gin_config
from recalign_jax.commands.common import model_config
from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.decoding import forced, permitted
from recalign_jax.decoding.beam_search import Beams, advance, widths_of
from recalign_jax.decoding.cache import follow_parents, slot_order
from recalign_jax.decoding.finished import none
from recalign_jax.decoding.permitted import Permitted
from recalign_jax.decoding.scoring import Decoder, log_normalizer
from recalign_jax.decoding.trie import Trie, build_trie
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from seqio_tasks import specs, vocabulary

MODEL = "gin_configs/models/flan_t5_small.gin"
EXCLUDED = 64  # items a user
TOP_K = 10
NUM_TOKENS = 32_100  # of T5's vocabulary
DEPTHS = 4  # steps of a search that are timed
TITLE_LENGTH = 16  # of a synthetic title, end-of-sequence not counted
# name -> (children of a node on each level of the small catalogue, of the large one)
BRANCHES = {"narrow": ((12, 10, 10, 10), (10,) * 6), "wide": ((110, 110), (100,) * 3)}
# STATIC's benchmark: users, beams, tokens kept of a beam at the second one, length, vocabulary.
STATIC_BATCH, STATIC_BEAMS, STATIC_KEPT, STATIC_LENGTH, STATIC_VOCABULARY = 2, 70, 30, 8, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    step = commands.add_parser("step")
    step.add_argument("--corpus", required=True)
    step.add_argument("--vocabulary", required=True)
    step.add_argument("--data_dir")
    growth = commands.add_parser("growth")
    for command in (step, growth):
        command.add_argument("--users", type=int, default=16)
        command.add_argument("--beams", type=int, default=20)
        command.add_argument("--inputs", type=int, default=128, help="tokens of a prompt")
    step.add_argument("--pairs", type=int, default=120)
    growth.add_argument("--pairs", type=int, default=102)
    static = commands.add_parser("static")
    static.add_argument("--static", type=pathlib.Path, required=True, help="checkout of STATIC's repository")
    static.add_argument("--sequences", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    static.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    if args.command == "static":
        sys.path.insert(0, str(args.static))
        print(json.dumps({f"{n:,}": compare_static(n, args.pairs) for n in args.sequences}))
        return
    gin_config.parse([MODEL], [])
    if args.command == "growth":
        print(json.dumps(compare_sizes(model_config(NUM_TOKENS), args.users, args.beams, args.inputs, args.pairs)))
        return
    corpus = load_corpus(args.corpus, args.data_dir)
    spec = specs.make_spec(corpus, "retrieval", "title", vocabulary.load(args.vocabulary), specs.TaskOptions())
    trie = build_trie(spec.catalog.tokens, spec.catalog.lengths, corpus.training_popularity, spec.num_tokens)
    config = model_config(spec.num_tokens)
    print(json.dumps(compare_steps(config, trie, args.users, args.beams, args.inputs, args.pairs)))


def in_turns(ways: Mapping[str, Callable[[Any], Any]], rounds: int, cache: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Seconds of each way in each round, [rounds], and the cache; one more round, the first, isn't counted.

    A way takes the cache, whose memory it may use, and returns what it finds and the cache. Every second round goes
    backwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            _, cache = jax.block_until_ready(way(cache))
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in seconds.items()}, cache


def first_beams(trie: Trie, batch: int, num_beams: int) -> Beams:
    """The root, in the first of the beams."""
    slots = jnp.broadcast_to(jnp.arange(num_beams), (batch, num_beams))
    alive = slots == 0
    score = jnp.where(alive, 0.0, -jnp.inf)
    return Beams(score, jnp.zeros_like(slots), jnp.where(alive, len(trie.item_of_rank), 0), slots)


def no_token_logits(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """Stands for what scores over the vocabulary never ask a decoder for."""
    raise NotImplementedError


# ---- Steps of a model ---------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """The ways to do a step, and their cache. Each takes (depth, beams, ..., cache) and returns (found, cache)."""

    constrained: Callable[..., Any]  # with finished, trie, excluded ranks [B, X], widths; finds (beams, finished)
    unconstrained: Callable[..., Any]  # with scores of what is finished [B, F], tokens [B, K]
    model_alone: Callable[..., Any]  # with tokens [B, K]
    cache: Any


def make_steps(config: T5Config, users: int, num_beams: int, inputs: int, max_steps: int) -> Steps:
    """Steps of a T5 with random weights, after random prompts."""
    graph, params = t5.create(config, jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (users, inputs), 2, config.vocab_size)

    @jax.jit
    def start(params, prompts):
        model = nnx.merge(graph, params)
        return model.init_cache(model.encode(prompts), prompts > 0, num_beams, max_steps)

    def decoder(params, cross) -> Decoder:
        model = nnx.merge(graph, params)

        def step(last, position, cache):
            return model.decode_step(last, position, cross, cache)

        return Decoder(step, model.logits, token_logits=no_token_logits)

    def next_logits(state, depth, beams, tokens, cache):
        model = decoder(*state)
        hidden, cache = model.step(tokens[..., None], depth, follow_parents(cache, beams.parent))
        logits = model.logits(hidden[:, :, 0])
        return logits, log_normalizer(logits), cache

    @partial(jax.jit, donate_argnames="cache", static_argnames="widths")
    def constrained(state, depth, beams, finished, trie, ranks, widths, cache):
        cache = follow_parents(cache, beams.parent)
        *found, cache = advance(
            decoder(*state), trie, Permitted(ranks, only=False), depth, trie.token[beams.node], beams, finished, cache,
            widths=widths, num_beams=num_beams, length_penalty=0.0, scores="vocabulary",
        )  # fmt: skip
        return found, cache

    @partial(jax.jit, donate_argnames="cache")
    def unconstrained(state, depth, beams, finished, tokens, cache):
        logits, normalizer, cache = next_logits(state, depth, beams, tokens, cache)
        score = logits + (beams.score - normalizer)[..., None]
        score, flat = jax.lax.top_k(score.reshape(users, -1), 2 * num_beams)
        token, parent = flat % logits.shape[-1], flat // logits.shape[-1]
        ends = token == EOS_ID
        finished = jnp.append(finished, jnp.where(ends, score, -jnp.inf), axis=1)
        finished = jax.lax.top_k(finished, finished.shape[1] - 2 * num_beams)[0]
        score, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), num_beams)
        token, parent = (jnp.take_along_axis(array, order, axis=1) for array in (token, parent))
        slots, parent = slot_order(parent, score > -jnp.inf)
        score, token = (jnp.take_along_axis(array, slots, axis=1) for array in (score, token))
        return (score, token, parent, finished), cache

    @partial(jax.jit, donate_argnames="cache")
    def model_alone(state, depth, beams, tokens, cache):
        _, normalizer, cache = next_logits(state, depth, beams, tokens, cache)
        return normalizer, cache

    cross, cache = start(params, prompts)
    state = (params, cross)
    return Steps(partial(constrained, state), partial(unconstrained, state), partial(model_alone, state), cache)


def search(steps: Steps, cache: Any, trie: Trie, num_beams: int, depths: int) -> tuple[list[tuple], Any]:
    """[what `steps.constrained` takes before the cache] for the steps from 1 to `depths` of a search, and the cache."""
    users = jax.tree.leaves(cache)[0].shape[1]
    random = np.random.default_rng(0)
    excluded = np.stack([random.choice(len(trie.item_of_rank), EXCLUDED, replace=False) for _ in range(users)])
    ranks = permitted.from_items(trie, jnp.asarray(excluded)).ranks
    beams, finished, states = first_beams(trie, users, num_beams), none(users, TOP_K), []
    for depth in range(depths):
        widths = tuple(widths_of(trie)) if depth else (trie.root_branch,)
        (beams, finished), cache = steps.constrained(depth, beams, finished, trie, ranks, widths, cache)
        states.append((jnp.int32(depth + 1), beams, finished, trie, ranks, tuple(widths_of(trie))))
    return states, cache


def compare_steps(config: T5Config, trie: Trie, users: int, num_beams: int, inputs: int, pairs: int) -> dict[str, Any]:
    """Runs `step` and returns what is printed; `pairs` of them at each depth together."""
    steps = make_steps(config, users, num_beams, inputs, trie.max_depth + forced.run_length(trie) - 1)
    states, cache = search(steps, steps.cache, trie, num_beams, DEPTHS)
    seconds: dict[str, list[np.ndarray]] = {}
    for depth, beams, finished, *index in states:
        tokens = trie.token[beams.node]
        ways = {
            "constrained": partial(steps.constrained, depth, beams, finished, *index),
            "unconstrained": partial(steps.unconstrained, depth, beams, finished.score, tokens),
            "model_alone": partial(steps.model_alone, depth, beams, tokens),
        }
        taken, cache = in_turns(ways, -(-pairs // DEPTHS), cache)
        for name, values in taken.items():
            seconds.setdefault(name, []).append(values)
    by_depth = {name: np.stack(values) for name, values in seconds.items()}  # [DEPTHS, pairs of each]
    over, over_model = (by_depth["constrained"] / by_depth[name] - 1 for name in ("unconstrained", "model_alone"))
    return {
        "overhead": rounded(np.median(over)),
        "overhead_model": rounded(np.median(over_model)),
        "by_depth": {
            depth: {"overhead": rounded(np.median(a)), "overhead_model": rounded(np.median(b))}
            for depth, (a, b) in enumerate(zip(over, over_model, strict=True), start=1)
        },
        **{f"{name}_seconds": rounded(np.median(values)) for name, values in by_depth.items()},
        "pairs": over.size,
        "users": users,
        "beams": num_beams,
        "inputs": inputs,
        "items": len(trie.item_of_rank),
        "excluded_items": EXCLUDED,
    }


def compare_sizes(config: T5Config, users: int, num_beams: int, inputs: int, pairs: int) -> dict[str, Any]:
    """Runs `growth` and returns what is printed."""
    result: dict[str, Any] = {}
    steps = make_steps(config, users, num_beams, inputs, TITLE_LENGTH + 1)
    cache = steps.cache
    for name, sizes in BRANCHES.items():
        began = time.perf_counter()
        tries = [synthetic_trie(branches, NUM_TOKENS) for branches in sizes]
        build_seconds = time.perf_counter() - began
        depths, states = len(sizes[0]) - 1, []
        for trie in tries:
            found, cache = search(steps, cache, trie, num_beams, depths)
            states.append(found)
        ratios, medians = [], []
        for small, large in zip(*states, strict=True):
            ways = {"small": partial(steps.constrained, *small), "large": partial(steps.constrained, *large)}
            seconds, cache = in_turns(ways, -(-pairs // depths), cache)
            ratios.append(seconds["large"] / seconds["small"])
            medians.append([np.median(seconds[way]) for way in ways])
        result[name] = {
            "ratio": rounded(np.median(ratios)),
            "ratio_by_depth": {depth: rounded(np.median(values)) for depth, values in enumerate(ratios, start=1)},
            "seconds": [rounded(value) for value in np.mean(medians, axis=0)],
            "titles": [len(trie.item_of_rank) for trie in tries],
            "nodes": [len(trie.token) for trie in tries],
            "trie_bytes": [num_bytes(trie) for trie in tries],
            "build_seconds": rounded(build_seconds),
            "pairs": np.size(ratios),
        }
    return {"growth": max(shape["ratio"] for shape in result.values()), **result, "users": users, "beams": num_beams}


def synthetic_trie(branches: Sequence[int], vocab_size: int) -> Trie:
    """The trie of all titles that go on in branches[i] ways after i tokens, and by themselves after these."""
    random = np.random.default_rng(0)
    count = math.prod(branches)
    tokens = random.integers(2, vocab_size, (count, TITLE_LENGTH + 1), np.int32)
    tokens[:, -1] = EOS_ID
    for position, (branch, chosen) in enumerate(
        zip(branches, np.unravel_index(np.arange(count), branches), strict=True)
    ):
        tokens[:, position] = random.choice(np.arange(2, vocab_size), branch, replace=False)[chosen]
    return build_trie(tokens, np.full(count, TITLE_LENGTH + 1), np.zeros(count), vocab_size)


# ---- Next to STATIC -----------------------------------------------------------------------------------------------


def compare_static(count: int, pairs: int) -> dict[str, Any]:
    """Runs `static` for that many sequences and returns what is printed of them."""
    from static_decoding import csr_utils, decoding_jax

    batch, num_beams, kept, vocab_size = STATIC_BATCH, STATIC_BEAMS, STATIC_KEPT, STATIC_VOCABULARY
    random = np.random.default_rng(0)
    sequences = random.integers(2, vocab_size, (count, STATIC_LENGTH), np.int32)
    logits = jax.random.uniform(jax.random.key(0), (STATIC_LENGTH, batch, num_beams, vocab_size))

    began = time.perf_counter()
    tokens = np.pad(sequences, ((0, 0), (0, 1)), constant_values=EOS_ID)
    trie = build_trie(tokens, np.full(count, STATIC_LENGTH + 1), np.zeros(count), vocab_size)
    jax.block_until_ready(trie)
    built = time.perf_counter()
    packed, offsets, widest, _, dense_mask, dense_states = csr_utils.build_static_index(
        sequences[np.lexsort(sequences.T[::-1])], vocab_size, dense_lookup_layers=2
    )
    index = tuple(jnp.asarray(array) for array in (packed, offsets, dense_mask, dense_states))
    seconds = {"ours": built - began, "static": time.perf_counter() - built}
    del sequences, tokens, packed, offsets, dense_mask, dense_states

    @partial(jax.jit, static_argnames="widths")
    def ours(logits, trie, depth, beams, finished, widths, cache):
        """`advance` after given logits [B, K, V]."""
        decoder = Decoder(
            lambda tokens, position, cache: (logits[:, :, None], cache), lambda hidden: hidden, no_token_logits
        )
        nothing_excluded = permitted.from_items(trie, jnp.zeros((batch, 0), jnp.int32))
        *found, cache = advance(
            decoder, trie, nothing_excluded, depth, beams.node, beams, finished, cache,
            widths=widths, num_beams=num_beams, length_penalty=0.0, scores="vocabulary",
        )  # fmt: skip
        return found, cache

    @partial(jax.jit, static_argnames="depth")
    def theirs(logits, index, depth, score, state, history):
        """The same by STATIC, from prefixes of `depth` tokens; history [B, K, length]."""
        packed, offsets, dense_mask, dense_states = index
        log_probs, state = jax.nn.log_softmax(logits.reshape(-1, vocab_size)), state.reshape(-1)
        if depth == 1:
            best, token = jax.lax.top_k(jnp.where(dense_mask[state - 1], log_probs, -jnp.inf), kept)
            following = dense_states[state[:, None] - 1, token]
        else:
            best, token, following = decoding_jax.generate_and_apply_logprobs_mask(
                log_probs, state, packed, offsets, widest[depth], vocab_size
            )
        width = best.shape[1]
        score, flat = jax.lax.top_k(
            (score[..., None] + best.reshape(batch, num_beams, width)).reshape(batch, -1), num_beams
        )
        token, state = (jnp.take_along_axis(array.reshape(batch, -1), flat, axis=1) for array in (token, following))
        history = decoding_jax._gather_beams(history, flat // width).at[:, :, depth].set(token)
        return (score, state), history

    def state_of(node: jax.Array, depth: int) -> jax.Array:
        """STATIC's number of a node: below the second level both count the same prefixes in the same order."""
        return trie.token[node] + 1 if depth == 1 else node - trie.root_branch + vocab_size

    beams, finished = first_beams(trie, batch, num_beams), none(batch, num_beams)
    history = jnp.zeros((batch, num_beams, STATIC_LENGTH), jnp.int32)
    (beams, finished), history = ours(logits[0], trie, 0, beams, finished, (trie.root_branch,), history)
    depths, taken = range(1, STATIC_LENGTH), []
    for depth in depths:
        given, state = logits[depth], state_of(beams.node, depth)
        ways = {
            "ours": partial(ours, given, trie, jnp.int32(depth), beams, finished, tuple(widths_of(trie))),
            "static": partial(theirs, given, index, depth, beams.score, state),
        }
        (next_beams, next_finished), (score, _) = (way(history)[0] for way in ways.values())
        np.testing.assert_allclose(np.sort(next_beams.score), np.sort(score), rtol=0, atol=1e-5)
        seconds_of_step, history = in_turns(ways, pairs, history)
        taken.append(seconds_of_step)
        beams, finished = next_beams, next_finished
    all_ours, all_static = (np.stack([values[name] for values in taken]) for name in ("ours", "static"))  # [7, pairs]
    return {
        "ratio": rounded(np.median(all_static.sum(0) / all_ours.sum(0))),
        "ratio_by_step": dict(zip(depths, map(rounded, np.median(all_static / all_ours, axis=1)), strict=True)),
        "ours_microseconds": [round(value * 1e6) for value in np.median(all_ours, axis=1)],
        "static_microseconds": [round(value * 1e6) for value in np.median(all_static, axis=1)],
        "ours_bytes": num_bytes(trie),
        "static_bytes": num_bytes(index),
        "build_seconds": {name: rounded(value) for name, value in seconds.items()},
        "pairs": pairs,
    }


def num_bytes(index: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(index))


def rounded(value: Any) -> float:
    return round(float(value), 4)


if __name__ == "__main__":
    main()
