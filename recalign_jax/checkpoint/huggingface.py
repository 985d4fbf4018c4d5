"""Hugging Face folders of T5 (config.json and safetensors), to and from our parameters.

Names are those of `T5ForConditionalGeneration.state_dict()`; torch keeps kernels as [outputs, inputs], ours are
[inputs, outputs].
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  makes numpy know bfloat16, which safetensors asks for by name
import numpy as np

from recalign_jax.checkpoint import stacking
from recalign_jax.checkpoint.stacking import Source
from recalign_jax.errors import InputError
from recalign_jax.model.config import T5Config
from recalign_jax.model.t5 import abstract_params

_TOP = {
    "token_embedder/embedding": "shared",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm",
    "encoder/relpos_bias/rel_embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm",
    "decoder/relpos_bias/rel_embedding": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder/logits_dense/kernel": "lm_head",
}
_SUBLAYERS = {
    "encoder": {
        "pre_attention_layer_norm": "layer.0.layer_norm",
        "attention": "layer.0.SelfAttention",
        "pre_mlp_layer_norm": "layer.1.layer_norm",
        "mlp": "layer.1.DenseReluDense",
    },
    "decoder": {
        "pre_self_attention_layer_norm": "layer.0.layer_norm",
        "self_attention": "layer.0.SelfAttention",
        "pre_cross_attention_layer_norm": "layer.1.layer_norm",
        "encoder_decoder_attention": "layer.1.EncDecAttention",
        "pre_mlp_layer_norm": "layer.2.layer_norm",
        "mlp": "layer.2.DenseReluDense",
    },
}
_KERNELS = {"query": "q", "key": "k", "value": "v", "out": "o", "wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"}
# Copies of `shared` that torch's state_dict lists under further names.
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_CONFIG_FIELDS = {
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "mlp_dim": "d_ff",
    "vocab_size": "vocab_size",
    "dropout_rate": "dropout_rate",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "layer_norm_epsilon": "layer_norm_epsilon",
}


def read_config(folder: pathlib.Path) -> T5Config:
    """Returns the configuration of the model in a Hugging Face folder. Raises InputError if it is no T5.1.1."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json here. Give the folder that save_pretrained wrote.")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if values.get("feed_forward_proj") != "gated-gelu":
        raise InputError(
            f"{path}: feed_forward_proj is {values.get('feed_forward_proj')!r}; only T5.1.1 models ('gated-gelu': "
            "T5 v1.1, FLAN-T5) are supported"
        )
    missing = sorted(set(_CONFIG_FIELDS.values()) - set(values))
    if missing:
        raise InputError(f"{path}: {missing[0]!r} is missing")
    return T5Config(
        **{ours: values[theirs] for ours, theirs in _CONFIG_FIELDS.items()},
        # transformers before 5 scaled exactly the tied models and had no field for it; 5 also ties T5.1.1 models
        # that it makes from scratch, without scaling, and says tie_word_embeddings in any case.
        logits_via_embedding="lm_head.weight" not in _files_of_names(folder),
        scale_decoder_outputs=values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True)),
    )


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a folder's safetensors, one file or several with an index, by name."""
    from safetensors import safe_open

    names_of_files: dict[str, list[str]] = {}
    for name, file in _files_of_names(folder).items():
        names_of_files.setdefault(file, []).append(name)
    arrays = {}
    for file, names in names_of_files.items():
        with safe_open(folder / file, framework="numpy") as tensors:
            arrays.update({name: tensors.get_tensor(name) for name in names})
    return arrays


def load_params(arrays: Mapping[str, np.ndarray], config: T5Config, where: str) -> dict[str, Any]:
    """Returns our parameters (float32 numpy) from arrays named as in torch's state_dict; `where` is for messages.

    Raises InputError that names a parameter which is missing, left over or of another shape.
    """
    sources = _sources(config)
    stacking.check_nothing_left(set(arrays) - set(_ALIASES), sources, where)
    return stacking.load(arrays, sources, abstract_params(config), where)


def unload_params(params: dict[str, Any], config: T5Config) -> dict[str, np.ndarray]:
    """Returns the arrays of a `T5ForConditionalGeneration.state_dict()`, float32 (aliases of `shared` left out)."""
    return stacking.unload(params, _sources(config))


def _sources(config: T5Config) -> dict[str, Source]:
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    sources = {}
    for path in stacking.flatten(abstract_params(config)):
        stacked = "/layers/" in path
        if stacked:
            stack, _, sublayer, *kernel, _ = path.split("/")
            name = ".".join([_SUBLAYERS[stack][sublayer], *(_KERNELS[part] for part in kernel)])
            names = tuple(f"{stack}.block.{layer}.{name}.weight" for layer in range(layers[stack]))
        else:
            names = (f"{_TOP[path]}.weight",)
        sources[path] = Source(names, stacked, transposed=path.endswith(("/kernel", "/rel_embedding")))
    return sources


def _files_of_names(folder: pathlib.Path) -> dict[str, str]:
    """{array's name: file in the folder that holds it}."""
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        absent = sorted(set(files.values()) - {path.name for path in folder.iterdir()})
        if absent:
            raise InputError(f"{index}: names the file {absent[0]!r}, which is not in the folder")
        return files
    if single.is_file():
        with safe_open(single, framework="numpy") as tensors:
            return dict.fromkeys(tensors.keys(), single.name)
    if any(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: has only a .bin file. That is a pickle, which can run code when it is read, so it is not. "
            'Convert it where you trust it: python -c "from transformers import T5ForConditionalGeneration as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json here")
