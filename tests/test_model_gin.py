"""Every model gin file: it builds, has the published size, and takes the macros."""

import json
import math
import pathlib

import gin
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from recalign_jax import gin_config  # noqa: F401  where gin looks for included files
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions, TrainState, make_train_step
from tests.shared_data import shared

FILES = pathlib.Path(__file__).resolve().parents[1] / "gin_configs" / "models"
# Of the checkpoints google/flan-t5-* and google/t5-v1_1-* as published; tiny and mini by the arithmetic of `count`.
SIZES = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
}
PUBLISHED = {f"{family}_{size}": count for family in ("flan_t5", "t5_v1_1") for size, count in SIZES.items()}
# emb_dim, num_heads, head_dim, layers of either stack, mlp_dim: the numbers in t5x/examples/t5/t5_1_1/{size}.gin.
T5X_SIZES = {
    "small": (512, 6, 64, 8, 1024),
    "base": (768, 12, 64, 12, 2048),
    "large": (1024, 16, 64, 24, 2816),
    "xl": (2048, 32, 64, 24, 5120),
    "xxl": (4096, 64, 64, 24, 10240),
}

# The models of t5_v1_1_* are those of flan_t5_*, as `test_sizes_equal_those_of_t5x` sees to.
DIFFERENT = sorted(path.stem for path in FILES.glob("*.gin") if not path.stem.startswith("t5_v1_1"))

ENCODER = ("encoder_input_tokens", "encoder_segment_ids")
DECODER = ("decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids", "decoder_task_ids")


@pytest.fixture
def config_of():
    """Reads a model gin file with bindings on top, as the command line does."""

    def read(name, *bindings):
        gin.parse_config_files_and_bindings([str(FILES / f"{name}.gin")], bindings)
        return T5Config()

    gin.clear_config()
    yield read
    gin.clear_config()


def count(config):
    """Parameters of a T5.1.1 by arithmetic, not by the code under test."""
    attention = 4 * config.emb_dim * config.num_heads * config.head_dim
    mlp = 3 * config.emb_dim * config.mlp_dim
    encoder = config.num_encoder_layers * (attention + mlp + 2 * config.emb_dim)
    decoder = config.num_decoder_layers * (2 * attention + mlp + 3 * config.emb_dim)
    vocabularies = 1 if config.logits_via_embedding else 2
    words = vocabularies * config.vocab_size * config.emb_dim
    return encoder + decoder + 2 * config.emb_dim + 2 * 32 * config.num_heads + words


@pytest.mark.parametrize("name", sorted(path.stem for path in FILES.glob("*.gin")))
def test_builds_with_the_published_number_of_parameters(config_of, name):
    config = config_of(name)
    shapes = jax.tree.leaves(t5.abstract_params(config))
    total = sum(math.prod(leaf.shape) for leaf in shapes)
    assert total == PUBLISHED.get(name, count(config)) == count(config)
    header = (FILES / f"{name}.gin").read_text().split("\n\n")[0]
    assert header.startswith("#")
    assert "recalign train --gin_file" in header
    assert f"{total:,} parameters" in header


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_training_step_traces(config_of, name):
    config = config_of(name)
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")

    def loss(params, tokens):
        return nnx.merge(t5.graph(config), params)(tokens, tokens, dropout_key=jax.random.key(0)).sum()

    gradients = jax.eval_shape(jax.grad(loss), t5.abstract_params(config), tokens)
    assert jax.tree.structure(gradients) == jax.tree.structure(t5.abstract_params(config))


@pytest.mark.parametrize("family", ["flan_t5", "t5_v1_1"])
@pytest.mark.parametrize("size", T5X_SIZES)
def test_sizes_equal_those_of_t5x(config_of, family, size):
    config = config_of(f"{family}_{size}")
    emb_dim, num_heads, head_dim, layers, mlp_dim = T5X_SIZES[size]
    assert config == T5Config(
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        mlp_dim=mlp_dim,
        # As t5x/examples/t5/t5_1_1/base.gin has them for every size, and network.py where no gin file does.
        vocab_size=32128,
        mlp_activations=("gelu", "linear"),
        logits_via_embedding=False,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        dropout_rate=0.1,
    )


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_sizes_equal_the_published_configs(config_of, size):
    published = json.loads((shared("data/flan_t5_configs") / f"{size}.json").read_text())
    config = config_of(f"flan_t5_{size}")
    assert (config.emb_dim, config.num_heads, config.head_dim, config.mlp_dim) == (
        published["d_model"],
        published["num_heads"],
        published["d_kv"],
        published["d_ff"],
    )
    assert (config.num_encoder_layers, config.num_decoder_layers) == (
        published["num_layers"],
        published["num_decoder_layers"],
    )
    assert config.vocab_size == published["vocab_size"]
    assert config.dropout_rate == published["dropout_rate"]
    assert config.layer_norm_epsilon == published["layer_norm_epsilon"]
    assert config.relative_attention_num_buckets == published["relative_attention_num_buckets"]
    assert config.relative_attention_max_distance == published["relative_attention_max_distance"]
    assert (published["feed_forward_proj"], published["dense_act_fn"]) == ("gated-gelu", "gelu_new")
    assert config.mlp_activations == ("gelu", "linear")
    assert config.logits_via_embedding == published["tie_word_embeddings"]


def test_macros_override(config_of):
    bindings = ["DROPOUT_RATE = 0.0", "ACTIVATION_DTYPE = 'bfloat16'", "REMAT = 'full'"]
    config = config_of("t5_tiny", *bindings)
    assert (config.dropout_rate, config.activation_dtype, config.remat) == (0.0, "bfloat16", "full")
    assert (config.emb_dim, config.num_encoder_layers, config.num_decoder_layers) == (64, 2, 2)


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_size_trains_abstractly(config_of, name):
    """The whole train step of every size, traced without allocating anything."""
    config = config_of(name)
    optimizer = make_optimizer("adafactor", 1e-3)

    def initialize(key):
        params = t5.init_params(config, key)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    tokens = {key: jax.ShapeDtypeStruct((2, 64), jnp.int32) for key in ENCODER}
    tokens |= {key: jax.ShapeDtypeStruct((2, 16), jnp.int32) for key in DECODER}
    batch = tokens | {"decoder_loss_weights": jax.ShapeDtypeStruct((2, 16), jnp.float32)}
    before = jax.eval_shape(initialize, jax.random.key(0))
    after, sums = jax.eval_shape(make_train_step(t5.graph(config), optimizer, StepOptions(1e-4), 3, 0), before, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), before
    )
    assert sums["loss"].shape == ()
    assert sums["task_loss"].shape == (3,)
