"""Hugging Face folders of T5 (config.json and safetensors): what their arrays are called, and reading them.

Names are those of `T5ForConditionalGeneration.state_dict()`; torch keeps kernels as [outputs, inputs], ours are
[inputs, outputs].
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from recalign_jax.checkpoint import stacking
from recalign_jax.checkpoint.arrays import Array, open_safetensors
from recalign_jax.checkpoint.hub import pickle_advice
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
# Files of T5 v1.1 lack some of these; transformers then takes the same values as T5Config.
_DEFAULTED = ("dropout_rate", "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")

GENERATION_VALUES = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def read_config(folder: pathlib.Path) -> T5Config:
    """Returns the configuration of the model in a Hugging Face folder. Raises InputError if it is no T5.1.1."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json here. Give the folder that save_pretrained wrote.")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not the configuration of a model")
    if values.get("feed_forward_proj") != "gated-gelu":
        raise InputError(
            f"{path}: feed_forward_proj is {values.get('feed_forward_proj')!r}; only T5.1.1 models ('gated-gelu': "
            "T5 v1.1, FLAN-T5) are supported"
        )
    if values.get("num_decoder_layers") is None:
        values["num_decoder_layers"] = values.get("num_layers")
    fields: dict[str, Any] = {ours: values.get(theirs) for ours, theirs in _CONFIG_FIELDS.items()}
    given = {ours: value for ours, value in fields.items() if value is not None or ours not in _DEFAULTED}
    missing = sorted(_CONFIG_FIELDS[ours] for ours, value in given.items() if value is None)
    if missing:
        raise InputError(f"{path}: {missing[0]!r} is missing")
    return T5Config(
        **given,
        # transformers before 5 scaled exactly the tied models and had no field for it; 5 also ties T5.1.1 models
        # that it makes from scratch, without scaling, and says tie_word_embeddings in any case.
        logits_via_embedding="lm_head.weight" not in _files_of_names(folder),
        scale_decoder_outputs=bool(values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True))),
    )


def read_arrays(folder: pathlib.Path) -> dict[str, Array]:
    """Opens all arrays of a folder's safetensors, one file or several with an index, by name; nothing is read yet.

    Copies of `shared` that torch's state_dict lists under further names are left out.
    """
    files = {name: folder / file for name, file in _files_of_names(folder).items()}
    return stacking.without(_ALIASES, open_safetensors(files))


def load_params(arrays: Mapping[str, Array], config: T5Config, where: str) -> dict[str, Any]:
    """Returns our parameters (float32 numpy) from arrays named as in torch's state_dict; `where` is for messages.

    Raises InputError that names a parameter which is missing, left over or of another shape.
    """
    return stacking.load(stacking.without(_ALIASES, arrays), sources(config), abstract_params(config), where)


def config_values(config: T5Config) -> dict[str, Any]:
    """Returns what config.json says of a model.

    Raises InputError for a model that transformers can't run.
    """
    if config.mlp_activations != ("gelu", "linear"):
        raise InputError(
            f"T5Config.mlp_activations is {config.mlp_activations}: transformers has no such T5.1.1, "
            "only ('gelu', 'linear')."
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{theirs: getattr(config, ours) for ours, theirs in _CONFIG_FIELDS.items()},
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "initializer_factor": 1.0,
        "n_positions": 512,
        "tie_word_embeddings": config.logits_via_embedding,
        "scale_decoder_outputs": config.scale_decoder_outputs,
        "use_cache": True,
        **GENERATION_VALUES,
    }


def sources(config: T5Config) -> dict[str, Source]:
    """Where torch's state_dict has our parameters, by path."""
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    found = {}
    for path in stacking.flatten(abstract_params(config)):
        stacked = "/layers/" in path
        if stacked:
            stack, _, sublayer, *kernel, _ = path.split("/")
            name = ".".join([_SUBLAYERS[stack][sublayer], *(_KERNELS[part] for part in kernel)])
            names = tuple(f"{stack}.block.{layer}.{name}.weight" for layer in range(layers[stack]))
        else:
            names = (f"{_TOP[path]}.weight",)
        found[path] = Source(names, stacked, transposed=path.endswith(("/kernel", "/rel_embedding")))
    return found


def _files_of_names(folder: pathlib.Path) -> dict[str, str]:
    """{array's name: file in the folder that holds it}."""
    from safetensors import SafetensorError, safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            absent = sorted(set(files.values()) - {path.name for path in folder.iterdir()})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{index}: no index of safetensors files, or damaged ({error!r})") from None
        if absent:
            raise InputError(f"{index}: names the file {absent[0]!r}, which is not in the folder")
        return files
    if single.is_file():
        try:
            with safe_open(single, framework="numpy") as tensors:
                return dict.fromkeys(tensors.keys(), single.name)
        except SafetensorError as error:
            raise InputError(
                f"{single}: no safetensors file, or damaged ({error}). Download or write it again."
            ) from None
    if any(folder.glob("*.bin")):
        raise InputError(f"{folder}: has only a .bin file. {pickle_advice(str(folder), f'{folder}-safetensors')}")
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json here")
