"""The TPU kernel of the linear scan: many blocks of time and channels, races, and ahead-of-time compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels import dispatch, linear_scan
from tests.kernels import races
from tests.kernels.conformance import complex_normal, error_ratio, log_gate, normal
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, devices

KINDS = ("real", "real-fixed", "complex", "complex-fixed")


def make(kind, *, batch=2, time=75, channels=640, dtype=jnp.float32):
    """640 channels are two blocks of them, the second of which is not full."""
    rng = np.random.default_rng(0)
    is_complex = kind.startswith("complex")
    shape = (channels,) if kind.endswith("fixed") else (batch, time, channels)
    log_decay = log_gate(rng, *shape) + (1j * normal(rng, *shape) if is_complex else 0)
    draw = complex_normal if is_complex else normal
    return {
        "x": draw(rng, batch, time, channels).astype(jnp.complex64 if is_complex else dtype),
        "log_decay": log_decay,
        "initial_state": draw(rng, batch, channels),
    }


def cotangents(inputs):
    rng = np.random.default_rng(1)
    draw = complex_normal if jnp.iscomplexobj(inputs["log_decay"]) else normal
    return tuple(draw(rng, *inputs[name].shape).astype(inputs[name].dtype) for name in ("x", "initial_state"))


def segments(batch, time):
    return jnp.asarray(np.cumsum(np.random.default_rng(2).random((batch, time)) < 0.1, axis=1), jnp.int32)


def value_and_gradients(implementation, segment_ids=None, chunk_size=None):
    def run(inputs, cotangents):
        def call(inputs):
            options = {"segment_ids": segment_ids, "chunk_size": chunk_size, "implementation": implementation}
            return linear_scan(**inputs, **options)

        values, pull = jax.vjp(call, inputs)
        return values, pull(cotangents)[0]

    return run


def assert_is_the_reference(inputs, segment_ids, chunk_size):
    given = inputs, cotangents(inputs)
    values, gradients = jax.jit(value_and_gradients("mosaic_tpu", segment_ids, chunk_size))(*given)
    expected, expected_gradients = jax.jit(value_and_gradients("reference", segment_ids))(*given)
    assert max(map(error_ratio, values, expected)) < 1e-6
    for name, gradient in expected_gradients.items():
        assert error_ratio(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("packed", [False, True], ids=["one_segment", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_are_the_reference(kind, packed):
    """Three blocks of 32 tokens, the last of which is not full."""
    assert_is_the_reference(make(kind), segments(2, 75) if packed else None, chunk_size=32)


@pytest.mark.parametrize("time, chunk_size", [(64, 32), (16, None), (1, None), (600, None)])
def test_whole_blocks_and_short_and_long_rows(time, chunk_size):
    assert_is_the_reference(make("real-fixed", time=time, channels=130), None, chunk_size)


def test_bfloat16_rounds_the_output_only():
    """The state that goes from block to block is float32."""
    inputs = make("real", time=400, channels=8, dtype=jnp.bfloat16)
    inputs["log_decay"] = inputs["log_decay"] / 100  # remembers for hundreds of tokens
    _, final_state = linear_scan(**inputs, chunk_size=16, implementation="mosaic_tpu")
    exact = inputs | {"x": inputs["x"].astype(jnp.float32)}
    assert error_ratio(final_state, linear_scan(**exact, implementation="reference")[1]) < 1e-6


@pytest.mark.parametrize("kind", ["real", "complex-fixed"])
def test_no_races_and_no_uninitialised_memory(kind):
    """In the interpreter that models a TPU's memories: results as expected, no two accesses without an order."""
    with races.checked():
        assert_is_the_reference(make(kind, time=40, channels=520), None, chunk_size=16)


def test_what_it_does_not_do_is_said():
    inputs = make("real", time=4, channels=4)
    with pytest.raises(NotImplementedError, match="mosaic_tpu: x is float16"):
        linear_scan(**inputs | {"x": inputs["x"].astype(jnp.float16)}, implementation="mosaic_tpu")
    with dispatch.use_device(dispatch.Device("gpu", "NVIDIA H200")):
        with pytest.raises(NotImplementedError, match="a kernel for TPUs"):
            linear_scan(**inputs, implementation="mosaic_tpu")


def abstract(inputs, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)


@pytest.mark.parametrize("chip", [pytest.param(c, marks=[] if c == "v5e" else pytest.mark.slow) for c in TOPOLOGIES])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_ahead_of_time(chip, kind, dtype):
    """As TPUs run it by default, forward and backward, at lengths that are no multiple of anything."""
    if kind.startswith("complex") and dtype == jnp.bfloat16:
        pytest.skip("complex64 has no half of bf16")
    device = devices(chip)[0]
    for time, channels in ((700, 640), (1, 4)):
        inputs = jax.eval_shape(lambda: make(kind, time=time, channels=channels, dtype=dtype))  # noqa: B023
        args = abstract((inputs, jax.eval_shape(cotangents, inputs)), SingleDeviceSharding(device))
        with dispatch.use_device(device):
            compiled = compile_for_tpu(jax.jit(value_and_gradients(None, jnp.ones((2, time), jnp.int32))).lower(*args))
        assert compiled.as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize("chip", [pytest.param(c, marks=[] if c == "v5e" else pytest.mark.slow) for c in TOPOLOGIES])
def test_compiles_in_a_shard_map_over_four_chips(chip):
    four = devices(chip)
    mesh, split = Mesh(np.array(four), ("x",)), PartitionSpec("x")
    for kind in ("real", "complex"):
        inputs = jax.eval_shape(lambda: make(kind, batch=4, time=256, channels=128))  # noqa: B023
        args = abstract((inputs, jax.eval_shape(cotangents, inputs)), NamedSharding(mesh, split))
        run = jax.shard_map(value_and_gradients(None), mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        with dispatch.use_device(four[0]):
            lowered = jax.jit(run).lower(*args)
        assert compile_for_tpu(lowered).as_text().count("tpu_custom_call") == 2


@pytest.mark.slow
def test_memory_of_a_long_row():
    """Forward and backward at T 131072 allocate the outputs and little more than what is kept, h and the decays."""
    device = devices("v5e")[0]
    inputs = jax.eval_shape(lambda: make("real", batch=1, time=131072, channels=1024, dtype=jnp.bfloat16))
    args = abstract((inputs, jax.eval_shape(cotangents, inputs)), SingleDeviceSharding(device))
    with dispatch.use_device(device):
        memory = compile_for_tpu(jax.jit(value_and_gradients(None)).lower(*args)).memory_analysis()
    assert memory.temp_size_in_bytes < 2**20
