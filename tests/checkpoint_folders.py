"""Models of the checkpoint tests, and Hugging Face folders as safetensors' own writer writes them."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from recalign_jax.checkpoint import huggingface, stacking
from recalign_jax.model.config import T5Config

T5X_TINY = T5Config(
    vocab_size=384, emb_dim=32, num_heads=4, head_dim=8, num_encoder_layers=3, num_decoder_layers=2, mlp_dim=64
)
SMALL = T5Config(
    vocab_size=40, emb_dim=16, num_heads=3, head_dim=4, num_encoder_layers=2, num_decoder_layers=3, mlp_dim=24
)
SMALL_JSON = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 16,
    "num_heads": 3,
    "d_kv": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "d_ff": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def state_dict(params, config):
    """The arrays of a `T5ForConditionalGeneration.state_dict()`, without the aliases of `shared`."""
    split = stacking.split(stacking.flatten(params), huggingface.sources(config))
    return {name: np.asarray(array) for name, array in split}


def write_folder(folder: pathlib.Path, arrays, values=SMALL_JSON, files=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if files == 1:
        save_file(arrays, folder / "model.safetensors")
        return
    names = [f"model-{number + 1:05}-of-{files:05}.safetensors" for number in range(files)]
    for number, file in enumerate(names):
        save_file({name: arrays[name] for name in sorted(arrays)[number::files]}, folder / file)
    weight_map = {name: names[number % files] for number, name in enumerate(sorted(arrays))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
