"""Constrained decoding next to transformers: users a second, of the same random model, prompts and catalogue.

    python benchmarks/decode.py --corpus amazon_beauty --vocabulary spiece.model

transformers runs `generate` with a beam search that `prefix_allowed_tokens_fn` holds to the catalogue. We decode as
`recalign infer` does, twice: with the same scores as that (softmax over the whole vocabulary), and with scores over the
trie. All three take turns in one process, after calls that are not counted (compilation, first allocations), and in
which freed memory stays, as in `recalign infer`: torch gains from that as well. Beams,
number of results, length penalty (0), greatest length and the rule of when to stop (when no beam can enter the result
any more) are the same, the weights are transformers' random ones of FLAN-T5-small's size, prompts are those of users
drawn at random, the same ones for all three, in float32. Each side has them in batches of a size that suits it,
shortest prompts first.

Prints one JSON line: `ratio` (ours over transformers', same scores) and `ratio_renormalised` (scores over the trie),
medians over rounds, and users a second of all three. What was found is compared as well: `score_difference`, the
largest one between the scores of an item that both return; `shared`, the share of transformers' results that ours have
too; and the mean log-likelihood of all results on both sides. Aims: 3.5 and 10. The corpus must be prepared. Needs
torch.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.train_throughput import torch_model
from recalign_jax import gin_config, host, partitioning
from recalign_jax.checkpoint.initial import load_initial
from recalign_jax.commands.common import model_config
from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.corpus.corpus import data_dir_or_default, load_corpus
from recalign_jax.decoding.retrieve import make_generate, retrieve
from recalign_jax.decoding.trie import build_trie
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from seqio_tasks import examples, samples, specs, vocabulary
from seqio_tasks.specs import TaskSpec

Found = list[dict[int, float]]  # of every prompt the items and their scores
Decode = Callable[[Sequence[np.ndarray]], Found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--model", default="gin_configs/models/flan_t5_small.gin", help="gin file")
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--users", type=int, default=32, help="of a round, the same ones for all three")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--peer_batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    host.keep_freed_memory()
    print(json.dumps(run(args)))


def run(args: argparse.Namespace) -> dict[str, object]:
    gin_config.parse([args.model], [])
    corpus = load_corpus(args.corpus, data_dir_or_default(args.data_dir))
    spec = specs.make_spec(corpus, "retrieval", "title", vocabulary.load(args.vocabulary), specs.TaskOptions())
    config = dataclasses.replace(model_config(spec.num_tokens), num_tokens=None)  # transformers masks no padding rows
    random = np.random.default_rng(0)
    users = random.choice(len(corpus.evaluation_users), args.users, replace=False)
    prompts = [samples.write_history(spec, examples.next_item(corpus, "test", int(user)), 512) for user in users]
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(config, folder)
        sides = {
            "transformers": theirs(spec, model, args.beams, args.peer_batch),
            "ours": ours(spec, config, folder, args.beams, args.batch, "vocabulary"),
            "renormalised": ours(spec, config, folder, args.beams, args.batch, "trie"),
        }
    found = {name: decode(prompts) for name, decode in sides.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, decode in sides.items():
            start = time.perf_counter()
            decode(prompts)
            rates[name].append(len(prompts) / (time.perf_counter() - start))
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[name], rates["transformers"], strict=True))
        for name in ("ours", "renormalised")
    }
    pairs = list(zip(found["transformers"], found["ours"], strict=True))
    both = [(peer[item], own[item]) for peer, own in pairs for item in peer if item in own]
    return {
        "ratio": round(ratios["ours"], 2),
        "ratio_renormalised": round(ratios["renormalised"], 2),
        "users_per_second": {name: round(statistics.median(values), 3) for name, values in rates.items()},
        "ratios_of_rounds": [
            [round(rates[name][n] / rates["transformers"][n], 2) for n in range(args.rounds)]
            for name in ("ours", "renormalised")
        ],
        "score_difference": max(abs(a - b) for a, b in both),
        "shared": round(len(both) / sum(len(peer) for peer, _ in pairs), 3),
        "mean_score": {
            "transformers": round(float(np.mean([score for peer, _ in pairs for score in peer.values()])), 3),
            "ours": round(float(np.mean([score for _, own in pairs for score in own.values()])), 3),
        },
        "prompt_tokens": round(float(np.mean([len(prompt) for prompt in prompts])), 1),
        "items": corpus.num_items,
        "beams": args.beams,
    }


def write_model(config: T5Config, folder: str) -> transformers.T5ForConditionalGeneration:
    """transformers' T5 of that size with its own random weights, also written to the folder."""
    torch.manual_seed(0)
    model = torch_model(config).eval()
    model.save_pretrained(folder)
    return model


def ours(spec: TaskSpec, config: T5Config, folder: str, beams: int, batch: int, scores: str) -> Decode:
    """Our search, as `recalign infer` runs it, on one device."""
    mesh = partitioning.make_mesh({"data": 1})
    params = load_initial(folder, config, 0, partitioning.with_shardings(t5.abstract_params(config), mesh))
    catalog = spec.catalog
    trie = build_trie(catalog.tokens, catalog.lengths, spec.corpus.training_popularity, spec.num_tokens)
    generate = make_generate(t5.graph(config), beams, beams, scores=scores)

    def decode(prompts: Sequence[np.ndarray]) -> Found:
        found: Found = [{} for _ in prompts]
        nothing = [np.zeros(0, np.int32)] * len(prompts)
        sharding = partitioning.batch_sharding(mesh)
        for chosen, items, values in retrieve(generate, params, trie, prompts, nothing, batch, sharding):
            for number, row, row_scores in zip(chosen, items, values, strict=True):
                found[number] = dict(zip(row[row >= 0].tolist(), row_scores[row >= 0].tolist(), strict=True))
        return found

    return decode


def theirs(spec: TaskSpec, model: transformers.T5ForConditionalGeneration, beams: int, batch: int) -> Decode:
    """transformers' beam search over the same catalogue."""
    following: dict[tuple[int, ...], set[int]] = {}
    item_of: dict[tuple[int, ...], int] = {}
    for item, (row, length) in enumerate(zip(spec.catalog.tokens.tolist(), spec.catalog.lengths.tolist(), strict=True)):
        item_of.setdefault(tuple(row[:length]), item)
        for place in range(length):
            following.setdefault(tuple(row[:place]), set()).add(row[place])
    allowed = {prefix: sorted(tokens) for prefix, tokens in following.items()}

    def decode(prompts: Sequence[np.ndarray]) -> Found:
        found: Found = [{} for _ in prompts]
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tokens = torch.zeros(len(chosen), max(len(prompts[number]) for number in chosen), dtype=torch.long)
            for row, number in zip(tokens, chosen, strict=True):
                row[: len(prompts[number])] = torch.from_numpy(prompts[number].astype(np.int64))
            with torch.inference_mode():
                result = model.generate(
                    tokens,
                    attention_mask=(tokens > 0).long(),
                    num_beams=beams,
                    num_return_sequences=beams,
                    max_new_tokens=int(spec.catalog.lengths.max()),
                    do_sample=False,
                    length_penalty=0.0,
                    early_stopping="never",
                    prefix_allowed_tokens_fn=lambda _, ids: allowed.get(tuple(ids[1:].tolist()), [EOS_ID]),
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            rows = zip(result.sequences[:, 1:].tolist(), result.sequences_scores.tolist(), strict=True)
            for place, (row, score) in enumerate(rows):
                if EOS_ID in row and score > -1e6:
                    sequence = tuple(row[: row.index(EOS_ID) + 1])
                    found[chosen[place // beams]][item_of[sequence]] = score
        return found

    return decode


if __name__ == "__main__":
    main()
