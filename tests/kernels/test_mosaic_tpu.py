"""The TPU kernels of linear attention: many chunks and heads, races, and ahead-of-time compilation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels import dispatch, linear_attention
from kernels.linear_attention import mosaic_tpu
from kernels.linear_attention.specs import Tiles
from tests.kernels import races
from tests.kernels.conformance import error_ratio, log_gate, normal
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, devices

DECAYS = {"none": "", "fixed": "H", "scalar": "BTH", "vector": "BTHK"}


def make(decay, *, batch=1, time=300, heads=2, groups=2, key_dim=16, value_dim=16, bonus=False, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sizes = {"B": batch, "T": time, "H": heads, "K": key_dim}
    arrays = {
        "q": normal(rng, batch, time, groups, key_dim).astype(dtype),
        "k": normal(rng, batch, time, groups, key_dim).astype(dtype),
        "v": normal(rng, batch, time, heads, value_dim).astype(dtype),
        "initial_state": normal(rng, batch, heads, key_dim, value_dim),
    }
    if DECAYS[decay]:
        arrays["log_decay"] = log_gate(rng, *(sizes[d] for d in DECAYS[decay]))
    if bonus:
        arrays["bonus"] = normal(rng, heads, key_dim)
    return arrays


def segments(batch, time):
    return jnp.asarray(np.cumsum(np.random.default_rng(1).random((batch, time)) < 0.03, axis=1), jnp.int32)


def value_and_gradients(implementation, segment_ids=None):
    def run(inputs, cotangents):
        def call(inputs):
            return linear_attention(**inputs, segment_ids=segment_ids, implementation=implementation)

        values, pull = jax.vjp(call, inputs)
        return values, pull(cotangents)[0]

    return run


def cotangents(inputs):
    rng = np.random.default_rng(2)
    v, state = inputs["v"], inputs["initial_state"]
    return normal(rng, *v.shape).astype(v.dtype), normal(rng, *state.shape)


CASES = {  # more than one grid step along time, each way that heads share q and k, and one, two and four in 128 lanes
    "scalar": (make("scalar"), None, None),
    "scalar-shared-by-steps": (make("scalar", heads=8, groups=1), Tiles(32, 128, 1, 1, 1), segments(1, 300)),
    "scalar-shared-in-a-step": (
        make("scalar", heads=8, groups=2, value_dim=64),
        Tiles(64, 256, 4, 2, 2),
        segments(1, 300),
    ),
    "scalar-alone": (make("scalar", heads=3, groups=3), Tiles(128, 128, 1, 1, 1), segments(1, 300)),
    "fixed-whole-blocks": (make("fixed", time=512), Tiles(128, 256, 1, 1, 1), None),
    "fixed-ragged": (make("fixed", heads=3, groups=1), Tiles(128, 256, 3, 2, 1), None),
    "none-wide": (make("none", key_dim=130, value_dim=200, heads=2, groups=1), None, None),
    "vector": (make("vector", batch=2, heads=4, groups=4, key_dim=33), Tiles(64, 256, 1, 1, 1), None),
    "vector-shared": (make("vector", heads=4, groups=1), Tiles(128, 128, 2, 1, 1), segments(1, 300)),
    "vector-bonus": (make("vector", heads=4, groups=4, bonus=True), Tiles(32, 128, 1, 1, 1), segments(1, 300)),
    "vector-long-chunk": (make("vector"), Tiles(256, 256, 1, 1, 1), None),
}


SLOW = ("scalar-alone", "fixed-whole-blocks", "none-wide", "vector-long-chunk")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_many_chunks_are_the_reference(name):
    inputs, tiles, segment_ids = CASES[name]
    with mosaic_tpu.use(tiles=tiles):
        values, gradients = jax.jit(value_and_gradients("mosaic_tpu", segment_ids))(inputs, cotangents(inputs))
    expected, expected_gradients = jax.jit(value_and_gradients("reference", segment_ids))(inputs, cotangents(inputs))
    assert max(map(error_ratio, values, expected)) < 1e-6
    for key, gradient in expected_gradients.items():
        # What the fixed decay of a head gets is a sum over all tokens, most of which cancels.
        assert error_ratio(gradients[key], gradient) < (1e-4 if gradient.ndim == 1 else 1e-5), key


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_bfloat16_keeps_its_error_ratios_over_many_chunks(decay):
    inputs = make(decay, time=1024, heads=1, groups=1, key_dim=32, value_dim=32, dtype=jnp.bfloat16)
    exact = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    values, gradients = jax.jit(value_and_gradients("mosaic_tpu"))(inputs, cotangents(inputs))
    d_out, d_state = cotangents(inputs)
    expected, expected_gradients = jax.jit(value_and_gradients("reference"))(
        exact, (d_out.astype(jnp.float32), d_state)
    )
    assert max(map(error_ratio, values, expected)) < 5e-3
    for key, gradient in expected_gradients.items():
        assert error_ratio(gradients[key], gradient) < (2e-2 if key == "log_decay" else 1e-2), key


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_extreme_decays_next_to_mild_ones(decay, dtype):
    """A strong decay takes no digits from the mild ones after it."""
    inputs = make(decay, heads=1, groups=1, dtype=dtype)
    g = inputs["log_decay"]
    extreme = jnp.asarray(np.random.default_rng(3).random(g.shape) < 0.2)
    inputs["log_decay"] = jnp.where(extreme, -1e4, g / 10)
    values, gradients = jax.jit(value_and_gradients("mosaic_tpu"))(inputs, cotangents(inputs))
    expected, expected_gradients = jax.jit(value_and_gradients("reference"))(inputs, cotangents(inputs))
    limit = 1e-6 if dtype == jnp.float32 else 5e-3
    assert max(map(error_ratio, values, expected)) < limit
    assert all(bool(jnp.isfinite(x).all()) for x in gradients.values())
    for key in ("q", "k", "v"):
        assert error_ratio(gradients[key], expected_gradients[key]) < 10 * limit, key


@pytest.mark.parametrize("decay, bonus", [("scalar", False), ("vector", True)])
def test_no_races_and_no_uninitialised_memory(decay, bonus):
    """In the interpreter that models a TPU's memories: results as expected, no two accesses without an order."""
    inputs = make(decay, time=200, heads=4, groups=2, bonus=bonus)
    segment_ids = segments(1, 200)
    with races.checked(), mosaic_tpu.use(tiles=Tiles(128, 128, 1, 1, 1)):
        values, gradients = jax.jit(value_and_gradients("mosaic_tpu", segment_ids))(inputs, cotangents(inputs))
    expected, expected_gradients = jax.jit(value_and_gradients("reference", segment_ids))(inputs, cotangents(inputs))
    assert max(map(error_ratio, values, expected)) < 1e-6
    assert max(error_ratio(gradients[key], expected_gradients[key]) for key in gradients) < 1e-5


def test_what_it_does_not_do_is_said():
    inputs = make("scalar", time=4)
    with pytest.raises(NotImplementedError, match="mosaic_tpu: inputs are float16"):
        linear_attention(**{k: x.astype(jnp.float16) for k, x in inputs.items()}, implementation="mosaic_tpu")
    with dispatch.use_device(dispatch.Device("gpu", "NVIDIA H200")):
        with pytest.raises(NotImplementedError, match="a kernel for TPUs"):
            linear_attention(**inputs, implementation="mosaic_tpu")
    wide = make("none", time=4, key_dim=513)
    with pytest.raises(NotImplementedError, match="more than 512 a side"):
        linear_attention(**wide, implementation="mosaic_tpu")


def abstract(inputs, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), inputs)


def _chips():
    """In bfloat16 for v5e, scalar decays for v6e too and in float32; a fixed decay is a scalar one to the kernels.
    The others are slow tests: up to half a minute each, and nothing that these lack."""
    for decay in DECAYS:
        for chip in TOPOLOGIES:
            for dtype in (jnp.bfloat16, jnp.float32):
                quick = chip == "v5e" and dtype == jnp.bfloat16 and decay != "fixed"
                quick |= decay == "scalar" and (chip, dtype) in (("v5e", jnp.float32), ("v6e", jnp.bfloat16))
                yield pytest.param(chip, decay, dtype, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("chip, decay, dtype", list(_chips()))
def test_compiles_ahead_of_time(chip, decay, dtype):
    """Forward and backward, with what else a call may have, at a length that is no multiple of anything."""
    device = devices(chip)[0]
    groups = {"none": 1, "vector": 4}.get(decay, 2)
    width = 64 if decay == "scalar" else 128  # two heads that share q and k in 128 lanes
    inputs = jax.eval_shape(
        lambda: make(decay, time=600, heads=4, groups=groups, key_dim=64, value_dim=width, dtype=dtype)
    )
    args = abstract((inputs, jax.eval_shape(cotangents, inputs)), lambda x: SingleDeviceSharding(device))
    segment_ids = jnp.ones((1, 600), jnp.int32) if decay in ("none", "vector") else None
    with dispatch.use_device(device):
        compiled = compile_for_tpu(jax.jit(value_and_gradients(None, segment_ids)).lower(*args))
    assert compiled.as_text().count("tpu_custom_call") >= 2


@pytest.mark.parametrize("chip", [pytest.param(c, marks=[] if c == "v5e" else pytest.mark.slow) for c in TOPOLOGIES])
def test_compiles_in_a_shard_map_over_four_chips(chip):
    four = devices(chip)
    mesh = jax.sharding.Mesh(np.array(four), ("x",))
    split = PartitionSpec("x")

    def run(inputs, cotangents):
        results = [value_and_gradients(None)(inputs[decay], cotangents) for decay in ("scalar", "vector")]
        return [(values, {"q": gradients["q"]}) for values, gradients in results]

    inputs = {decay: jax.eval_shape(lambda d=decay: make(d, batch=4, time=256, dtype=jnp.bfloat16)) for decay in DECAYS}
    inputs = {decay: inputs[decay] for decay in ("scalar", "vector")}
    args = (inputs, jax.eval_shape(cotangents, inputs["scalar"]))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    with dispatch.use_device(four[0]):
        lowered = jax.jit(sharded).lower(*abstract(args, lambda x: NamedSharding(mesh, split)))
    compiled = compile_for_tpu(lowered)
    assert compiled.as_text().count("tpu_custom_call") >= 4


@pytest.mark.slow
def test_memory_of_a_long_sequence():
    """Forward and backward at T 131072 hold less than six times the inputs' bytes."""
    device = devices("v5e")[0]
    time, heads, width = 131072, 8, 128
    inputs = {name: jax.ShapeDtypeStruct((1, time, heads, width), jnp.bfloat16) for name in ("q", "k", "v")}
    inputs["log_decay"] = jax.ShapeDtypeStruct((1, time, heads), jnp.float32)
    inputs["initial_state"] = jax.ShapeDtypeStruct((1, heads, width, width), jnp.float32)
    out_and_state = inputs["v"], inputs["initial_state"]
    args = abstract((inputs, out_and_state), lambda x: SingleDeviceSharding(device))
    with dispatch.use_device(device):
        memory = compile_for_tpu(jax.jit(value_and_gradients(None)).lower(*args)).memory_analysis()
    input_bytes = sum(x.size * x.dtype.itemsize for x in inputs.values())
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 6 * input_bytes


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_float32_matmuls_are_of_full_precision(decay, monkeypatch, capsys):
    """Interpretation hides bfloat16 passes: read the precision of every matmul that Mosaic is given."""
    device = devices("v5e")[0]
    inputs = jax.eval_shape(lambda: make(decay, time=256))
    args = abstract((inputs, jax.eval_shape(cotangents, inputs)), lambda x: SingleDeviceSharding(device))
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, debug=True))  # prints what it makes
    with dispatch.use_device(device):
        jax.jit(value_and_gradients(None)).lower(*args)
    matmuls = [line for line in capsys.readouterr().out.splitlines() if "tpu.matmul" in line]
    precisions = [re.search(r"contract_precision<(\w+)>", line) for line in matmuls]
    assert len(matmuls) > 20 and {match and match[1] for match in precisions} == {"fp32"}
