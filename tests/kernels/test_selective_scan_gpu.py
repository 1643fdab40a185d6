"""The Hopper kernels of the selective scan, interpreted on a CPU, on a GPU, and compiled without one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from kernels import dispatch, mosaic_gpu, selective_scan
from tests.kernels import hopper, races
from tests.kernels import test_selective_scan_tpu as tpu
from tests.kernels.test_selective_scan_tpu import abstract_call, cotangents, make, segments
from tests.kernels.tpu import compile_for_tpu as compile_without_cache

# A GPU's exponential is off by up to 2 units in the last place, a state by those of all tokens in it.
assert_is_the_reference = functools.partial(
    tpu.assert_is_the_reference, value_bound=5e-6 if dispatch.device().is_hopper else 1e-6
)


def value_and_gradients(segment_ids=None):
    return jax.jit(tpu.value_and_gradients("mosaic_gpu", segment_ids))


CASES = {  # tokens, channels and numbers that are no multiple of anything; and whether rows are packed
    "ragged": (dict(time=37, channels=70), False),
    "packed": (dict(time=37, channels=70), True),
    "two-groups": (dict(batch=2, time=20, channels=130), True),
    "one-number": (dict(time=20, channels=260, numbers=1), False),
    "forty-numbers": (dict(time=20, channels=40, numbers=40), True),
}


QUICK = ("packed", "forty-numbers")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
def test_values_and_gradients_are_the_references(name):
    sizes, packed = CASES[name]
    inputs = make(**sizes)
    segment_ids = segments(*inputs["x"].shape[:2]) if packed else None
    results = value_and_gradients(segment_ids)(inputs, cotangents(inputs))
    assert_is_the_reference(results, inputs, segment_ids)


def at_edges(batch, time):
    """Segments that start at, before and after the edges of chunks of 16 tokens and of parts of two chunks."""
    return jnp.cumsum(jnp.isin(jnp.arange(time), jnp.array([16, 31, 32, 33, 64])), dtype=jnp.int32)[None].repeat(
        batch, 0
    )


def test_steps_of_the_narrow_type():
    inputs = make(time=37, channels=70)
    inputs["dt"] = inputs["dt"].astype(jnp.bfloat16)
    y, state = jax.jit(tpu.value_and_gradients("reference"))(inputs, cotangents(inputs))[0]
    (out, final_state), gradients = value_and_gradients()(inputs, cotangents(inputs))
    assert max(map(tpu.error_ratio, (out, final_state), (y, state))) < 5e-6
    assert gradients["dt"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "packed", [pytest.param(False, marks=pytest.mark.slow, id="one_segment"), pytest.param(True, id="packed")]
)
def test_parts_of_the_time_are_one_sequence(packed, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "time_parts", lambda blocks, chunks: 3)  # of 2, 2 and 1 chunks
    inputs = make(batch=2, time=75, channels=10)
    segment_ids = at_edges(2, 75) if packed else None
    results = value_and_gradients(segment_ids)(inputs, cotangents(inputs))
    assert_is_the_reference(results, inputs, segment_ids)


@pytest.mark.parametrize("blocks, chunks, parts", [(132, 999, 1), (12, 128, 16), (12, 7, 1), (100, 24, 3), (1, 90, 10)])
def test_parts_are_never_empty(blocks, chunks, parts):
    assert mosaic_gpu.time_parts(blocks, chunks) == parts
    assert (parts - 1) * -(-chunks // parts) < chunks


def test_steps_from_1e_6_to_1e3_and_rates_of_zero():
    inputs = make(time=50, channels=128)
    rng = np.random.default_rng(4)
    inputs["dt"] = jnp.asarray(10 ** rng.uniform(-6, 3, inputs["dt"].shape), jnp.float32)
    inputs["A"] = inputs["A"].at[:5].set(0)
    segment_ids = segments(1, 50)
    results = value_and_gradients(segment_ids)(inputs, cotangents(inputs))
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), results))
    assert_is_the_reference(results, inputs, segment_ids)


@pytest.mark.skipif(dispatch.device().is_hopper, reason="only the interpreter tells races")
def test_no_races_and_no_uninitialised_memory(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "time_parts", lambda blocks, chunks: 2)
    inputs, segment_ids = make(time=70, channels=10, numbers=50), segments(1, 70)
    with races.checked_on_gpu():
        results = jax.block_until_ready(value_and_gradients(segment_ids)(inputs, cotangents(inputs)))
    assert_is_the_reference(results, inputs, segment_ids)


def test_a_cpu_takes_the_next_where_nobody_asks_it_to_interpret():
    inputs = make(time=4, channels=8)
    with mosaic_gpu.use_interpret(None):
        with pytest.raises(NotImplementedError, match="not for cpu"):
            selective_scan(**inputs, implementation="mosaic_gpu")
        y, _ = selective_scan(**inputs, implementation=("mosaic_gpu", "chunked"))
    assert y.shape == inputs["x"].shape


def test_what_it_does_not_do_is_said():
    inputs = make(time=4, channels=8)
    with pytest.raises(NotImplementedError, match="mosaic_gpu: dt is float16"):
        selective_scan(**inputs | {"dt": inputs["dt"].astype(jnp.float16)}, implementation="mosaic_gpu")
    for kind in ("NVIDIA A100-SXM4-40GB", "NVIDIA B200"):
        with dispatch.use_device(dispatch.Device("gpu", kind)), pytest.raises(NotImplementedError, match="Hopper"):
            selective_scan(**inputs, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="more than 64 numbers a channel"):
        selective_scan(**make(time=4, channels=8, numbers=65), implementation="mosaic_gpu")


COMPILED = {  # every number of numbers, both dtypes, parts of the time, packed rows
    "1": (dict(numbers=1, time=100, dtype=jnp.float32), True),
    "16": (dict(numbers=16, time=4000, dtype=jnp.bfloat16), False),
    "16-packed": (dict(numbers=16, batch=2, time=4000, dtype=jnp.float32), True),
    "32": (dict(numbers=32, time=100, dtype=jnp.bfloat16), True),
    "64": (dict(numbers=64, time=4000, dtype=jnp.float32), True),
}


@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_gpu(name, monkeypatch, capfd):
    device = hopper.h200()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    sizes, packed = COMPILED[name]
    args = abstract_call(SingleDeviceSharding(device), channels=1000, **sizes)
    segment_ids = jnp.ones((sizes.get("batch", 1), sizes["time"]), jnp.int32) if packed else None
    with dispatch.use_device(device):
        traced = value_and_gradients(segment_ids).trace(*args)
    compile_without_cache(traced.lower(lowering_platforms=("cuda",)))
    printed = "".join(capfd.readouterr())
    reports = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) reg", printed, re.S)
    kernels = {kernel.removesuffix("_mosaic_gpu_kernel") for kernel, _, _ in reports}
    expected = {"selective_scan_forward", "selective_scan_backward"}
    expected |= {"selective_scan_ends", "selective_scan_ends_reverse"} if sizes["time"] == 4000 else set()
    assert kernels == expected
    assert all(spilled == "0" for _, spilled, _ in reports), reports
    with capfd.disabled():
        for kernel, _, registers in reports:
            print(f"\n{kernel}: {registers} registers", end="")
