"""Schedules against their closed forms, optimizers by name, weight decay's mask, and the state's layout."""

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from recalign_jax import gin_config
from recalign_jax.errors import InputError
from recalign_jax.training.adafactor import Factored
from recalign_jax.training.optimizer import decayed, handed_schedule, make_optimizer, make_schedule, state_specs

PEAK, WARMUP, TOTAL = 0.01, 10, 50


def warm(step, after):
    return PEAK * step / WARMUP if step < WARMUP else after(step)


CLOSED_FORMS = {
    "constant": lambda step: warm(step, lambda _: PEAK),
    "inverse_sqrt": lambda step: PEAK / max(step, WARMUP) ** 0.5,
    "linear_warmup_cosine": lambda step: warm(
        step, lambda s: PEAK * (1 + np.cos(np.pi * min(1.0, (s - WARMUP) / (TOTAL - WARMUP)))) / 2
    ),
    "linear_warmup_linear_decay": lambda step: warm(step, lambda s: PEAK * max(0.0, (TOTAL - s) / (TOTAL - WARMUP))),
}


@pytest.mark.parametrize("kind", CLOSED_FORMS)
def test_schedule_is_its_closed_form(kind):
    schedule = jax.jit(make_schedule(kind, PEAK, WARMUP, TOTAL))
    for step in [*range(TOTAL + 1), 3 * TOTAL]:
        assert float(schedule(jnp.int32(step))) == pytest.approx(CLOSED_FORMS[kind](step), rel=1e-5, abs=1e-9), step


@pytest.mark.parametrize("kind", CLOSED_FORMS)
def test_schedule_without_warmup_starts_at_its_peak(kind):
    assert float(make_schedule(kind, PEAK, 0, TOTAL)(0)) == pytest.approx(PEAK)


def test_schedule_says_what_is_wrong():
    with pytest.raises(InputError, match=r"kind is 'inverse_sqr'.*Did you mean 'inverse_sqrt'\?"):
        make_schedule("inverse_sqr")
    with pytest.raises(InputError, match="total_steps is None; linear_warmup_cosine needs more than its 10"):
        make_schedule("linear_warmup_cosine", warmup_steps=10)
    with pytest.raises(InputError, match="total_steps is 10"):
        make_schedule("linear_warmup_linear_decay", warmup_steps=10, total_steps=10)
    for name, value in (("warmup_steps", -1), ("warmup_steps", None), ("warmup_steps", 2.5), ("learning_rate", -1.0),
                        ("learning_rate", None), ("learning_rate", float("nan")), ("kind", None)):  # fmt: skip
        with pytest.raises(InputError, match=f"make_schedule.{name} is {value}"):
            make_schedule(**{name: value})


@pytest.mark.parametrize(
    ("bindings", "rates"),
    [
        ([], [0.001, 0.001]),
        ([("SCHEDULE", "linear_warmup_cosine"), ("WARMUP_STEPS", "4"), ("LEARNING_RATE", "0.4")], [0.0, 0.1]),
        ([("make_optimizer.schedule", "0.5")], [0.5, 0.5]),
    ],
)
def test_what_is_logged_is_the_rate_of_the_optimizer(bindings, rates):
    from recalign_jax.commands import train  # noqa: F401 (what its gin file configures)

    gin_config.parse(["gin_configs/runs/finetune.gin"], bindings)
    assert [float(handed_schedule()(step)) for step in (0, 1)] == pytest.approx(rates)
    gin.clear_config()
    assert handed_schedule() is None


def test_unknown_optimizer():
    with pytest.raises(InputError, match=r"name is 'adamW', not one of adafactor, adamw.*Did you mean 'adamw'\?"):
        make_optimizer("adamW")
    for name, value in (("weight_decay", -1.0), ("max_gradient_norm", -1.0), ("max_gradient_norm", 0),
                        ("max_gradient_norm", "abc"), ("schedule", None), ("name", 3)):  # fmt: skip
        with pytest.raises(InputError, match=f"make_optimizer.{name} is {value!r}"):
            make_optimizer(**{name: value})


PARAMS = {
    "token_embedder": {"embedding": jnp.full((16, 8), 2.0)},
    "encoder": {
        "relpos_bias": {"rel_embedding": jnp.full((2, 4), 2.0)},
        "layers": {"mlp": {"wi_0": {"kernel": jnp.full((3, 8, 12), 2.0)}}, "norm": {"scale": jnp.full((3, 8), 2.0)}},
        "encoder_norm": {"scale": jnp.full(8, 2.0)},
    },
}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_weight_decay_takes_kernels_only_times_the_learning_rate(name):
    optimizer = make_optimizer(name, make_schedule("constant", 0.5), weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)  # so that decay alone moves anything
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda decays, x: np.full(x.shape, -0.5 * 0.1 * 2.0 * decays), decayed(PARAMS), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    assert [path for path, on in flat(decayed(PARAMS)) if on] == ["encoder/layers/mlp/wi_0/kernel"]


def flat(tree):
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree.leaves_with_path(tree)]


def test_max_gradient_norm():
    params = {"kernel": jnp.zeros((2, 2))}
    gradients = [{"kernel": jnp.full((2, 2), size)} for size in (5.0, 1e-3)]  # norms 10 and 0.002
    clipped, plain = make_optimizer("adamw", 0.1, max_gradient_norm=1.0), make_optimizer("adamw", 0.1)
    state, expected_state = clipped.init(params), plain.init(params)
    for gradient, factor in zip(gradients, (0.1, 1.0), strict=True):
        updates, state = clipped.update(gradient, state, params)
        scaled = jax.tree.map(lambda x, factor=factor: x * factor, gradient)
        expected, expected_state = plain.update(scaled, expected_state, params)
        np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-5)


def test_gin_configures_all_of_it():
    gin.clear_config()
    gin.parse_config("""
        make_optimizer.name = 'adamw'
        make_optimizer.schedule = @make_schedule()
        make_schedule.kind = 'linear_warmup_cosine'
        make_schedule.learning_rate = 0.3
        make_schedule.total_steps = 4
        adamw.b1 = 0.0
        adamw.b2 = 0.0
    """)
    try:
        optimizer = make_optimizer()
    finally:
        gin.clear_config()
    params = {"kernel": jnp.ones((2, 2))}
    state, moved = optimizer.init(params), []
    for _ in range(5):
        updates, state = optimizer.update({"kernel": jnp.full((2, 2), 7.0)}, state, params)
        moved.append(-float(updates["kernel"][0, 0]))  # Adam without memory: sign(gradient) * learning rate
    np.testing.assert_allclose(moved, [0.15 * (1 + np.cos(np.pi * step / 4)) for step in range(5)], atol=1e-6)


SPECS = {
    "token_embedder": {"embedding": P("model", "fsdp")},
    "encoder": {
        "relpos_bias": {"rel_embedding": P()},
        "layers": {"mlp": {"wi_0": {"kernel": P(None, "fsdp", "model")}}, "norm": {"scale": P()}},
        "encoder_norm": {"scale": P("fsdp")},
    },
}


@pytest.mark.parametrize("max_gradient_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_state_specs_follow_the_parameters(name, max_gradient_norm):
    gin.bind_parameter("adafactor.min_dim_size_to_factor", 8)
    gin.bind_parameter("adafactor.beta1", 0.9)
    try:
        optimizer = make_optimizer(name, make_schedule(), weight_decay=0.1, max_gradient_norm=max_gradient_norm)
    finally:
        gin.clear_config()
    state, specs = jax.eval_shape(optimizer.init, PARAMS), state_specs(optimizer, PARAMS, SPECS)
    assert jax.tree.structure(state) == jax.tree.structure(specs)
    assert all(len(spec) <= leaf.ndim for leaf, spec in zip(*map(jax.tree.leaves, (state, specs)), strict=True))
    if name == "adafactor":
        moments = optax.tree_utils.tree_get(specs, "moments")
        assert moments["encoder"]["layers"]["mlp"]["wi_0"]["kernel"] == Factored(P(None, "fsdp"), P(None, "model"))
        assert moments["token_embedder"]["embedding"] == Factored(P("model"), P("fsdp"))
        assert moments["encoder"]["encoder_norm"]["scale"] == P("fsdp")
        assert optax.tree_utils.tree_get(specs, "ema") == SPECS
    else:
        assert optax.tree_utils.tree_get(specs, "nu") == SPECS


@pytest.mark.devices8
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_sharded_step_equals_the_step_on_one_device(name):
    gin.bind_parameter("adafactor.min_dim_size_to_factor", 8)
    try:
        optimizer = make_optimizer(name, make_schedule(), weight_decay=0.1, max_gradient_norm=1.0)
    finally:
        gin.clear_config()
    generator = np.random.default_rng(0)
    params, gradients = (
        jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), PARAMS) for _ in range(2)
    )

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    expected = step(params, optimizer.init(params), gradients)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "model"))
    shardings, state_shardings = (
        jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        for specs in (SPECS, state_specs(optimizer, PARAMS, SPECS))
    )
    state = jax.jit(optimizer.init, out_shardings=state_shardings)(jax.device_put(params, shardings))
    sharded = jax.jit(step, out_shardings=(shardings, state_shardings), donate_argnums=(0, 1))
    found = sharded(jax.device_put(params, shardings), state, jax.device_put(gradients, shardings))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
