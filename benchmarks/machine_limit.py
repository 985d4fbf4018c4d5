"""How far training is from the machine's limit: FLOP/s of the real step over those of matrix products alone.

    python benchmarks/machine_limit.py --corpus amazon_beauty --vocabulary spiece.model

On one core and on all, each a process that is held to them, in turns and in float32: a large square product (the
peak); every product that a step is made of, forward and backward, by itself (shapes of the model: `products`); and the
step of `recalign train`. FLOPs are the model's own (recalign_jax/model/flops.py): padding counts, recomputation and
the optimizer don't.

Prints one JSON line: `ratio`, the step's FLOP/s over the peak's on all cores, and for either number of cores `peak`,
`products` and `step` in GFLOP/s, and the step's share of the other two, medians over rounds. The corpus must be
prepared. Needs Linux (affinity).
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import our_training, turns
from recalign_jax.model import flops
from recalign_jax.model.config import T5Config

SQUARE = 3072
LEAST_SECONDS = 0.2  # seconds that a product is repeated for


class Product(NamedTuple):
    """A matrix product of the forward pass, and how many there are of its shape."""

    einsum: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    times: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    our_training.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    numbers = sorted({1, len(os.sched_getaffinity(0))})
    with contextlib.ExitStack() as stack:
        asks = []
        for cores in numbers:
            settings = json.dumps(vars(args) | {"cores": cores})
            command = [sys.executable, "-m", "benchmarks.machine_limit", "--side", settings]
            asks.append(stack.enter_context(turns.side(command))[1])
        answers = [[ask("all") for ask in asks] for _ in range(args.rounds + 1)][1:]
    by_cores = {number: summary([answer[i] for answer in answers]) for i, number in enumerate(numbers)}
    told = {"model": pathlib.Path(args.model).stem, "batch_size": args.batch_size, "rounds": args.rounds}
    print(json.dumps({"ratio": by_cores[numbers[-1]]["of_peak"], "cores": by_cores} | told))


def summary(answers: list[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds, in GFLOP/s, and the step's share of the other two."""
    rates = {name: statistics.median(answer[name] for answer in answers) / 1e9 for name in answers[0]}
    return {name: round(rate, 1) for name, rate in rates.items()} | {
        f"of_{name}": round(statistics.median(a["step"] / a[name] for a in answers), 3) for name in ("peak", "products")
    }


def measure(settings: dict[str, Any]) -> None:
    """One model on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["cores"]])
    args = argparse.Namespace(**settings)
    _, stream, config = our_training.set_up(args)
    lengths = (args.batch_size, args.inputs, args.targets)
    step_flops = flops.train_step_flops(config, *lengths)
    state, step = our_training.state_and_step(config, "adafactor", len(stream.tasks))
    batch, _ = next(our_training.on_device(stream))
    train = our_training.our_trainer(state, step, itertools.repeat((batch, None)), 1)
    square = forward_and_backward(Product("mk,kn->mn", (SQUARE, SQUARE), (SQUARE, SQUARE), 1))
    each = [(product.times, forward_and_backward(product)) for product in products(config, *lengths)]

    def answer() -> dict[str, float]:
        return {
            "peak": 3 * 2 * SQUARE**3 / square(),
            "products": step_flops / sum(times * seconds() for times, seconds in each),
            "step": step_flops / train(0)[1],
        }

    turns.serve({}, {"all": answer})


def products(config: T5Config, batch_size: int, length: int, targets: int) -> list[Product]:
    """The matrix products of a forward pass; three times their FLOPs are `flops.train_step_flops`."""
    depth, width, heads, head = config.emb_dim, config.mlp_dim, config.num_heads, config.head_dim
    encoder, decoder, branches = config.num_encoder_layers, config.num_decoder_layers, len(config.mlp_activations)

    def dense(tokens: int, inputs: int, outputs: int, times: int) -> Product:
        return Product("mk,kn->mn", (batch_size * tokens, inputs), (inputs, outputs), times)

    def attention(queries: int, keys: int, times: int) -> list[Product]:
        q, k, weights = ((batch_size, *shape) for shape in ((queries, heads, head), (keys, heads, head),
                                                            (heads, queries, keys)))  # fmt: skip
        return [Product("bqnh,bknh->bnqk", q, k, times), Product("bnqk,bknh->bqnh", weights, k, times)]

    return [
        dense(length, depth, heads * head, 3 * encoder + 2 * decoder),
        dense(length, heads * head, depth, encoder),
        dense(targets, depth, heads * head, 4 * decoder),
        dense(targets, heads * head, depth, 2 * decoder),
        *(dense(tokens, depth, width, branches * layers) for tokens, layers in ((length, encoder), (targets, decoder))),
        *(dense(tokens, width, depth, layers) for tokens, layers in ((length, encoder), (targets, decoder))),
        *attention(length, length, encoder),
        *attention(targets, targets, decoder),
        *attention(targets, length, decoder),
        dense(targets, depth, config.vocab_size, 1),
    ]


def forward_and_backward(product: Product) -> Callable[[], float]:
    """Returns what measures the seconds of a product and the two of its gradients."""

    @jax.jit
    def all_three(left: jax.Array, right: jax.Array, gradient: jax.Array) -> Any:
        result, backward = jax.vjp(lambda a, b: jnp.einsum(product.einsum, a, b), left, right)
        return result, backward(gradient)

    keys = jax.random.split(jax.random.key(0), 3)
    left, right = (
        jax.random.normal(key, shape) for key, shape in zip(keys[:2], (product.left, product.right), strict=True)
    )
    shape = jax.eval_shape(lambda a, b: jnp.einsum(product.einsum, a, b), left, right).shape
    gradient = jax.random.normal(keys[2], shape)

    def seconds() -> float:
        jax.block_until_ready(all_three(left, right, gradient))
        taken: list[float] = []
        while sum(taken) < LEAST_SECONDS:
            started = time.perf_counter()
            jax.block_until_ready(all_three(left, right, gradient))
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    return seconds


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        measure(json.loads(sys.argv[2]))
    else:
        main()
