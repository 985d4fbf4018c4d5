"""What a step needs: FLOPs and bytes moved against XLA's counts and by hand, `recalign plan`, and advice."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recalign_jax import cli, hardware, partitioning
from recalign_jax.errors import InputError
from recalign_jax.model import flops, lora, t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import collectives, memory, packing, plan
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.memory import Job
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions, loss_sums

pytestmark = pytest.mark.usefixtures("fast_compilation")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'"
)
# One layer each: XLA counts the body of a scan once.
WIDE = T5Config(
    emb_dim=512, num_heads=8, head_dim=64, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=1024,
    vocab_size=4096, dropout_rate=0.0, activation_dtype="float32",
)  # fmt: skip
TINY = dataclasses.replace(WIDE, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64, vocab_size=256)


def test_flops_of_a_step_are_xlas():
    rows, length, targets = 4, 96, 32

    def loss(params, batch):
        return loss_sums(t5.graph(WIDE), params, batch, StepOptions(0.0), 1, None)[0]

    batch = packing.batch_shapes(rows, length, targets)
    counted = jax.jit(jax.grad(loss)).lower(t5.abstract_params(WIDE), batch).compile().cost_analysis()["flops"]
    assert flops.train_step_flops(WIDE, rows, length, targets) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    "targets", [("query", "value"), ("wi_0", "wi_1", "wo", "out", "key"), ("query", "logits_dense")]
)
def test_flops_of_a_step_with_adapters_are_xlas(targets):
    """Gradients of kernels without adapters aren't computed."""
    rows, length, target_length = 4, 96, 32
    options = LoraOptions(rank=1, targets=targets)
    base = t5.abstract_params(WIDE)

    def loss(adapters, base, batch):
        return loss_sums(t5.graph(WIDE), lora.merge(base, adapters, options), batch, StepOptions(0.0), 1, None)[0]

    adapters = jax.eval_shape(lambda key: lora.init_adapters(base, options, key), jax.random.key(0))
    batch = packing.batch_shapes(rows, length, target_length)
    counted = jax.jit(jax.grad(loss)).lower(adapters, base, batch).compile().cost_analysis()["flops"]
    assert flops.train_step_flops(WIDE, rows, length, target_length, targets) == pytest.approx(counted, rel=0.02)


def test_flops_grow_with_layers():
    def of(encoder, decoder):
        config = dataclasses.replace(TINY, num_encoder_layers=encoder, num_decoder_layers=decoder)
        return flops.train_step_flops(config, 2, 16, 8)

    assert of(5, 1) - of(1, 1) == 4 * (of(2, 1) - of(1, 1)) > 0
    assert of(1, 5) - of(1, 1) == 4 * (of(1, 2) - of(1, 1)) > 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v6 lite", 918), ("NVIDIA A100-SXM4-40GB", 312),
     ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989)],
)  # fmt: skip
def test_chips_are_known_by_jaxs_names(name, teraflops):
    assert hardware.peak_flops(name) == teraflops * 1e12


def test_unknown_chips_have_no_peak():
    assert hardware.peak_flops("cpu") is None
    assert hardware.peak_flops("NVIDIA B999") is None


# Bytes moved.

HLO = """HloModule jit_step

%async_fusion.1 (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}

%async_fusion.2 (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}

%body (s: (s32[], f32[10])) -> (s32[], f32[10]) {
  %s = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[10]{0} get-tuple-element(%s), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %sum = f32[10]{0} all-reduce(%x), channel_id=2, to_apply=%add
  %a = bf16[4,8]{1,0} constant({...})
  %f1 = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%async_fusion.1
  %f2 = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%async_fusion.2
  ROOT %t = (s32[], f32[10]{0}) tuple(%next, %sum)
}

%cond (s: (s32[], f32[10])) -> pred[] {
  %s = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %start = s32[] constant(4)
  %t = (s32[], f32[10]{0}) tuple(%start, %x)
  %loop = (s32[], f32[10]{0}) while(%t), condition=%cond, body=%body
  %y = f32[10]{0} get-tuple-element(%loop), index=1
  %cp = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=3, source_target_pairs={{0,1}}
  ROOT %done = f32[10]{0} collective-permute-done(%cp)
}
"""


def test_bytes_moved_count_every_turn_of_a_loop():
    """Ten turns (4, 6, ..., 22), each an all-reduce of 40 bytes and one gather of 256 that two fusions share."""
    moved = collectives.bytes_moved(HLO)
    assert moved["all-reduce"] == 10 * 2 * 40
    assert moved["all-gather"] == 10 * 256
    assert 40 <= moved["collective-permute"] <= 48
    assert moved["reduce-scatter"] == moved["all-to-all"] == 0


@pytest.mark.devices8
def test_bytes_moved_of_a_compiled_loop():
    """A scan of three layers whose kernels are split: each is gathered once."""
    mesh = partitioning.make_mesh({"fsdp": 8})
    kernels = jax.ShapeDtypeStruct((3, 64, 64), np.float32)
    x = jax.ShapeDtypeStruct((16, 64), np.float32)

    def run(kernels, x):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    compiled = jax.jit(run, in_shardings=(split, rows), out_shardings=rows).lower(kernels, x).compile()
    assert collectives.bytes_moved(compiled.as_text())["all-gather"] == 3 * 64 * 64 * 4


# Advice.


def job(devices=1, shape=None, **changed) -> Job:
    mesh = partitioning.make_mesh(shape or {"data": -1}, jax.devices()[:devices])
    rows = InputOptions(task_feature_lengths={"inputs": 32, "targets": 16}, batch_size=32)
    return dataclasses.replace(Job(TINY, make_optimizer(), mesh, StepOptions(), rows, LoraOptions()), **changed)


def test_advice_names_what_saves_memory_and_how_much():
    large = job(config=dataclasses.replace(TINY, vocab_size=4096), optimizer=make_optimizer("adamw"))
    text = memory.advice(large)
    first, *lines = text.splitlines()
    assert first.startswith("A step of these settings needs 0.0")
    for macro in ("REMAT=full", "GRADIENT_ACCUMULATION=2", "LOGITS_CHUNKS=8", "BATCH_SIZE=16"):
        line = next(line for line in lines if f"--gin.{macro} saves" in line)
        assert float(line.split()[2]) > 0, line


def test_savings_stop_where_nothing_is_left():
    rows = InputOptions(task_feature_lengths={"inputs": 32, "targets": 16}, batch_size=4)
    ladder = list(plan.smaller(job(input_options=rows)))
    settings = ladder[-1][0]
    assert settings == {"REMAT": "full", "GRADIENT_ACCUMULATION": 4, "LOGITS_CHUNKS": 8}


# The command.


def planned(capsys, *arguments) -> dict:
    status = cli.main([
        "plan", "--json", "--topology", "v5e:2x2",
        *("--gin_file", "gin_configs/models/t5_tiny.gin", "--gin_file", "gin_configs/runs/finetune.gin"),
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}", *arguments,
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out.splitlines()[-1])


@needs_libtpu
def test_plan_of_a_tiny_model(capsys, monkeypatch):
    monkeypatch.setattr(plan, "SEARCH_SECONDS", 0)
    found = planned(capsys, "--gin.MESH={'fsdp': 4}", "--gin.BATCH_SIZE=8")
    assert found["fits"]
    assert found["devices"] == 4
    assert found["device_kind"] == "TPU v5 lite"
    config = T5Config(emb_dim=64, num_heads=4, head_dim=16, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=128)
    assert 0.1 < found["flops_per_step"] / flops.train_step_flops(config, 8, 32, 8) < 10
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(t5.abstract_params(config)))
    # A quarter of the parameters and more, and not a copy of all of them on every device.
    assert parameters / 4 < found["hbm_bytes_per_device"] < 8 * parameters
    assert found["collectives"]["all-gather"] > 0
    assert found["tried"] == []


@needs_libtpu
def test_what_does_not_fit_is_an_answer_with_a_suggestion(capsys, monkeypatch):
    monkeypatch.setattr(plan, "smaller", lambda job: [memory.with_batch_size(job, 8)])
    found = planned(capsys, "--gin.BATCH_SIZE=262144", "--gin.MESH={'data': 4}")
    assert not found["fits"]
    assert found["hbm_bytes_per_device"] > found["hbm_limit_bytes"]
    assert found["collectives"] is None
    assert found["suggestion"] == {"BATCH_SIZE": 8}


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x5", "v9:2x2", "nonsense"])
def test_unknown_topologies_are_errors(name):
    with pytest.raises(InputError, match=f"--topology {name}: .*such as v5e:4x4"):
        plan.topology_devices(name)


def test_libtpu_missing_is_an_error(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(InputError, match=r"pip install -e '\.\[plan\]'"):
        plan.topology_devices("v5e:2x2")
