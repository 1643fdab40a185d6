"""The static cost of the TPU kernels is what is stored (`python -m benchmarks.tpu_static --check` does all shapes)."""

import copy
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks import tpu_cycles, tpu_static
from kernels.dispatch import Device
from kernels.linear_attention import specs
from tests.kernels.tpu import compile_for_tpu, devices


@pytest.mark.parametrize(
    "shape",
    ["square", *(pytest.param(name, marks=pytest.mark.slow) for name in ("square_per_key", "mamba_125m"))],
)
def test_no_kernel_takes_a_tenth_more_cycles_than_stored(shape):
    devices("v5e")
    stored = json.loads(tpu_static.RESULTS.read_text())["results"]
    job = tpu_static.Job("v5e", shape)
    assert not tpu_static.check(stored, [job])


def test_the_check_tells_a_slower_kernel(monkeypatch):
    stored = json.loads(tpu_static.RESULTS.read_text())["results"]
    slower = copy.deepcopy(stored["square v5e"])
    slower["backward"]["cycles"] *= 1.2
    monkeypatch.setattr(tpu_static, "measure", lambda job: slower)
    (problem,) = tpu_static.check(stored, [tpu_static.Job("v5e", "square")])
    assert "backward" in problem and "1.20 of the stored" in problem


def test_an_operation_runs_as_often_as_the_loops_around_it():
    def twice_nested(x):
        return jax.lax.map(lambda row: jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y @ y), row), x)

    device = SingleDeviceSharding(devices("v5e")[0])
    x = jax.ShapeDtypeStruct((3, 256, 256), jnp.float32, sharding=device)
    program = compile_for_tpu(jax.jit(twice_nested).lower(x)).as_text()
    assert set(tpu_cycles._times(program).values()) == {1, 3, 21}


@pytest.mark.parametrize(("kind", "step_heads"), [("TPU v5 lite", 8), ("TPU v5", 4), ("TPU v6 lite", 8)])
def test_heads_are_left_for_a_second_core(kind, step_heads):
    def heads(count, groups, width=128):
        slots = specs.slots(count, groups, 128, width, per_key=False)
        return specs.tiles(Device("tpu", kind), 4096, slots, jnp.dtype("bfloat16")).heads

    assert heads(8, 8) == step_heads
    assert heads(16, 16) == 8
    assert heads(24, 1) == 8  # one core adds up their dq and dk
    assert heads(24, 1, width=64) == 12  # of two


def test_narrow_heads_share_lanes():
    packs = {  # heads, groups, K, V, decays per key
        (32, 32, 64, 64, True): (2, 2),  # RWKV-6
        (24, 1, 128, 64, False): (2, 1),  # Mamba-2
        (8, 8, 32, 16, True): (4, 4),
        (3, 3, 64, 64, False): (1, 1),
        (8, 4, 64, 64, True): (1, 1),
        (8, 8, 64, 128, False): (1, 1),
    }
    for call, (pack, key_pack) in packs.items():
        slots = specs.slots(*call)
        assert (slots.pack, slots.key_pack) == (pack, key_pack), call
        assert slots.key_dim % 128 == slots.value_dim % 128 == 0
