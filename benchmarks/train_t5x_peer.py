"""T5X's side of train_t5x.py, which runs it in T5X's environment."""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import gin
import jax
import numpy as np
from t5x import gin_utils, utils

from benchmarks import turns

DIMENSIONS = (
    "emb_dim",
    "num_heads",
    "head_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "mlp_dim",
    "logits_via_embedding",
)
FILES = ("t5x/examples/t5/t5_1_1/base.gin", "gin_configs/t5x/vocabulary.gin", "gin_configs/t5x/finetune.gin")
INPUT_SECONDS = 3  # of a turn of the pipeline alone


def train(**parts: Any) -> dict[str, Any]:
    """Stands where T5X's gin files expect T5X's train loop, and returns what they build for it."""
    return parts


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ["RECALIGN_DATA_DIR"] = only(settings["corpus"], settings["data_dir"], settings["folder"])
    os.environ["RECALIGN_VOCABULARY"] = settings["vocabulary"]
    macros = {
        "MIXTURE_OR_TASK_NAME": settings["mixture"],
        "TASK_FEATURE_LENGTHS": settings["lengths"],
        "BATCH_SIZE": settings["batch_size"],
        "DROPOUT_RATE": settings["model"]["dropout_rate"],
        "MODEL_DIR": settings["folder"],
        "TRAIN_STEPS": 1_000_000,
    }
    network = {"dtype": "float32"} | {name: settings["model"][name] for name in DIMENSIONS}
    bindings = [f"{name} = {value!r}" for name, value in macros.items()]
    bindings += [f"network.T5Config.{name} = {value!r}" for name, value in network.items()]
    gin_utils.parse_gin_flags([str(turns.ROOT)], FILES, bindings)
    parts = gin.get_configurable(train)()
    pipeline, own_rows = batches_of(parts), batches_of(parts)
    trainer = build(parts, own_rows.element_spec)

    rows = [place(parts, batch) for batch in read_rows(f"{settings['folder']}/rows.npz")]
    started = time.perf_counter()
    trainer.compile_train(rows[0])
    ready = {
        "compile_seconds": round(time.perf_counter() - started, 2),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trainer.train_state.params)),
    }
    same_rows, steps = itertools.cycle(rows), settings["steps"]

    def run(batches: Iterator[Any]) -> dict[str, Any]:
        """Some steps of T5X's loop."""
        taken: list[Any] = []
        started = time.perf_counter()
        trainer.train(keeping(batches, taken), steps)
        jax.block_until_ready(trainer.train_state)
        seconds = time.perf_counter() - started
        tokens = sum(
            int((batch[f"{side}_segment_ids"] > 0).sum()) for batch in taken for side in ("encoder", "decoder")
        )
        return {"tokens": tokens, "steps": steps, "seconds": seconds}

    def some_seconds() -> Iterator[Any]:
        started = time.perf_counter()
        while time.perf_counter() < started + INPUT_SECONDS:
            yield next(pipeline)

    turns.serve(
        ready,
        {"loop": lambda: run(own_rows), "step": lambda: run(same_rows), "input": lambda: turns.feed(some_seconds())},
    )


def only(corpus: str, data_dir: str, folder: str) -> str:
    """A folder with this corpus alone: under T5X all corpora of the data directory are registered."""
    os.mkdir(f"{folder}/data")
    os.symlink(f"{data_dir}/{corpus}", f"{folder}/data/{corpus}")
    return f"{folder}/data"


def build(parts: dict[str, Any], spec: dict[str, Any]) -> Any:
    """T5X's trainer with a new state, put together as T5X's train loop does it."""
    model, partitioner = parts["model"], parts["partitioner"]
    if parts["use_hardware_rng"] or parts["random_seed"] is None:
        utils.set_hardware_rng_ops()
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in spec.items()},
        input_types={name: array.dtype for name, array in spec.items()},
        partitioner=partitioner,
    )
    return parts["trainer_cls"](
        model=model,
        train_state=initializer.from_scratch(jax.random.PRNGKey(0)),
        partitioner=partitioner,
        train_state_axes=initializer.train_state_axes,
        eval_names=(),
        summary_dir=None,
        rng=jax.random.PRNGKey(1),
    )


def batches_of(parts: dict[str, Any]) -> Any:
    """T5X's input: SeqIO's pipeline, packed, on the device."""
    config, partitioner = parts["train_dataset_cfg"], parts["partitioner"]
    layout = partitioner.get_data_layout(config.batch_size)
    dataset = utils.get_dataset(config, layout.shard_id, layout.num_shards, parts["model"].FEATURE_CONVERTER_CLS)
    return utils.prepare_train_iter(
        dataset, partitioner=partitioner, checkpoint_cfg=parts["checkpoint_cfg"], data_layout=layout
    )


def read_rows(path: str) -> Iterator[dict[str, np.ndarray]]:
    """Our packed rows, as our side wrote them."""
    arrays = dict(np.load(path))
    for number in range(len(arrays["decoder_target_tokens"])):
        yield {name: array[number] for name, array in arrays.items()}


def place(parts: dict[str, Any], batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    partitioner = parts["partitioner"]
    return jax.device_put(batch, jax.sharding.NamedSharding(partitioner.mesh, partitioner.data_partition_spec))


def keeping(batches: Iterator[Any], kept: list[Any]) -> Iterator[Any]:
    for batch in batches:
        kept.append(batch)
        yield batch


if __name__ == "__main__":
    main()
