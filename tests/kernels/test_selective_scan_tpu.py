"""The TPU kernels of the selective scan: many blocks, races, extreme steps, and ahead-of-time compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels import dispatch, selective_scan
from kernels.selective_scan import mosaic_tpu
from tests.kernels import races
from tests.kernels.conformance import error_ratio, normal
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, devices


def make(*, batch=1, time=150, channels=256, numbers=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "x": normal(rng, batch, time, channels).astype(dtype),
        "dt": jnp.exp(normal(rng, batch, time, channels) - 1),
        "A": -jnp.exp(normal(rng, channels, numbers)),
        "B": normal(rng, batch, time, numbers).astype(dtype),
        "C": normal(rng, batch, time, numbers).astype(dtype),
        "D": normal(rng, channels),
        "initial_state": normal(rng, batch, channels, numbers),
    }


def segments(batch, time):
    return jnp.asarray(np.cumsum(np.random.default_rng(1).random((batch, time)) < 0.03, axis=1), jnp.int32)


def value_and_gradients(implementation, segment_ids=None):
    def run(inputs, cotangents):
        def call(inputs):
            return selective_scan(**inputs, segment_ids=segment_ids, implementation=implementation)

        values, pull = jax.vjp(call, inputs)
        return values, pull(cotangents)[0]

    return run


def cotangents(inputs):
    rng = np.random.default_rng(2)
    x, state = inputs["x"], inputs["initial_state"]
    return normal(rng, *x.shape).astype(x.dtype), normal(rng, *state.shape)


def assert_is_the_reference(results, inputs, segment_ids=None, value_bound=1e-6):
    values, gradients = results
    expected, expected_gradients = jax.jit(value_and_gradients("reference", segment_ids))(inputs, cotangents(inputs))
    assert max(map(error_ratio, values, expected)) < value_bound
    for name, gradient in expected_gradients.items():
        assert error_ratio(gradients[name], gradient) < 1e-5, name


CASES = {
    "ragged": (make(time=300), None),  # three blocks of time, the others two
    "channel-blocks": (make(batch=2, channels=384), 128),
    "padded-channels": (make(channels=200), None),
    "one-number": (make(time=256, numbers=1), None),
    "forty-numbers": (make(channels=128, numbers=40), None),
}


def _blocks():
    """Each shape packed and not; three of them are quick, the others have nothing that conformance lacks but size."""
    for name in CASES:
        for packed in (False, True):
            quick = (name, packed) in (("ragged", False), ("channel-blocks", True), ("forty-numbers", True))
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(name, packed, marks=marks, id=f"{name}-{'packed' if packed else 'one_segment'}")


@pytest.mark.parametrize("name, packed", list(_blocks()))
def test_many_blocks_are_the_reference(name, packed):
    inputs, width = CASES[name]
    segment_ids = segments(*inputs["x"].shape[:2]) if packed else None
    with mosaic_tpu.use(width=width):
        results = jax.jit(value_and_gradients("mosaic_tpu", segment_ids))(inputs, cotangents(inputs))
    assert_is_the_reference(results, inputs, segment_ids)


def test_two_cores_share_the_channels():
    inputs = make(channels=512)
    with dispatch.use_device(dispatch.Device("cpu", "TPU v5")):
        results = jax.jit(value_and_gradients("mosaic_tpu"))(inputs, cotangents(inputs))
    assert_is_the_reference(results, inputs)


@pytest.mark.parametrize(
    "packed", [pytest.param(False, marks=pytest.mark.slow, id="one_segment"), pytest.param(True, id="packed")]
)
def test_steps_from_1e_6_to_1e3_and_rates_of_zero(packed):
    inputs = make(channels=128)
    rng = np.random.default_rng(4)
    inputs["dt"] = jnp.asarray(10 ** rng.uniform(-6, 3, inputs["dt"].shape), jnp.float32)
    inputs["A"] = inputs["A"].at[:5].set(0)
    segment_ids = segments(*inputs["x"].shape[:2]) if packed else None
    results = jax.jit(value_and_gradients("mosaic_tpu", segment_ids))(inputs, cotangents(inputs))
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), results))
    assert_is_the_reference(results, inputs, segment_ids)


@pytest.mark.parametrize("time", [100, pytest.param(200, marks=pytest.mark.slow)], ids=["one_block", "two_blocks"])
def test_no_races_and_no_uninitialised_memory(time):
    """In the interpreter that models a TPU's memories, each core with half of the channels."""
    inputs, segment_ids = make(time=time, channels=256, numbers=3), segments(1, time)
    two_cores = dispatch.use_device(dispatch.Device("cpu", "TPU v5"))
    with races.checked(), two_cores, mosaic_tpu.use(width=128):
        results = jax.jit(value_and_gradients("mosaic_tpu", segment_ids))(inputs, cotangents(inputs))
    assert_is_the_reference(results, inputs, segment_ids)


def test_what_it_does_not_do_is_said():
    inputs = make(time=4, channels=8)
    with pytest.raises(NotImplementedError, match="mosaic_tpu: x is float16"):
        selective_scan(**inputs | {"x": inputs["x"].astype(jnp.float16)}, implementation="mosaic_tpu")
    with dispatch.use_device(dispatch.Device("gpu", "NVIDIA H200")):
        with pytest.raises(NotImplementedError, match="a kernel for TPUs"):
            selective_scan(**inputs, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="more than 64 numbers a channel"):
        selective_scan(**make(time=4, channels=8, numbers=65), implementation="mosaic_tpu")


def abstract(inputs, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)


def abstract_call(sharding, **sizes):
    inputs = jax.eval_shape(lambda: make(**sizes))
    return abstract((inputs, jax.eval_shape(cotangents, inputs)), sharding)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", [pytest.param(c, marks=[] if c == "v5e" else pytest.mark.slow) for c in TOPOLOGIES])
def test_compiles_ahead_of_time(chip, dtype):
    """Forward and backward, packed, at a length and a number of channels that are no multiple of anything."""
    device = devices(chip)[0]
    args = abstract_call(SingleDeviceSharding(device), time=600, channels=1000, dtype=dtype)
    with dispatch.use_device(device):
        lowered = jax.jit(value_and_gradients(None, jnp.ones((1, 600), jnp.int32))).lower(*args)
    assert compile_for_tpu(lowered).as_text().count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("numbers", [1, 64])
def test_compiles_the_smallest_and_the_largest_state(chip, numbers):
    device = devices(chip)[0]
    args = abstract_call(SingleDeviceSharding(device), batch=2, channels=2048, numbers=numbers)
    with dispatch.use_device(device):
        compiled = compile_for_tpu(jax.jit(value_and_gradients(None)).lower(*args))
    assert compiled.as_text().count("tpu_custom_call") >= 2


@pytest.mark.parametrize("chip", [pytest.param(c, marks=[] if c == "v5e" else pytest.mark.slow) for c in TOPOLOGIES])
def test_compiles_in_a_shard_map_over_four_chips(chip):
    four = devices(chip)
    mesh, split = jax.sharding.Mesh(np.array(four), ("x",)), PartitionSpec("x")

    def run(inputs, cotangents):
        values, gradients = value_and_gradients(None)(inputs, cotangents)
        return values, {"x": gradients["x"]}

    specs = {name: PartitionSpec() if name in "AD" else split for name in make(time=1)}
    args = abstract_call(NamedSharding(mesh, PartitionSpec()), batch=4, time=256, dtype=jnp.bfloat16)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(specs, split), out_specs=split, check_vma=False)
    with dispatch.use_device(four[0]):
        compiled = compile_for_tpu(jax.jit(sharded).lower(*args))
    assert compiled.as_text().count("tpu_custom_call") >= 2


def test_no_state_of_a_token_is_in_memory():
    device = devices("v5e")[0]
    time, channels, numbers = 16384, 2048, 16
    sizes = {"time": time, "channels": channels, "numbers": numbers, "dtype": jnp.bfloat16}
    args = abstract_call(SingleDeviceSharding(device), **sizes)
    with dispatch.use_device(device):
        memory = compile_for_tpu(jax.jit(value_and_gradients(None)).lower(*args)).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * time * channels * numbers / 16
