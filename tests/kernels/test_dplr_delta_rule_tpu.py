"""The TPU kernels of the general delta rule, as those of the delta rule: test_delta_rule_tpu.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from kernels import dispatch, dplr_delta_rule
from kernels.dplr_delta_rule import mosaic_tpu
from kernels.linear_attention.specs import Tiles
from tests.kernels import races
from tests.kernels.conformance import log_gate, normal, unit
from tests.kernels.test_delta_rule_tpu import (
    assert_the_reference,
    cotangents,
    errors_on_a_tpu,
    segments,
    value_and_gradients,
)
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, devices


def make(*, time=300, heads=2, key_dim=16, value_dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shape = (1, time, heads, key_dim)
    kappa, rate = unit(rng, *shape), jax.nn.sigmoid(normal(rng, *shape))
    arrays = {"q": normal(rng, *shape), "k": normal(rng, *shape), "v": normal(rng, 1, time, heads, value_dim)}
    arrays |= {"a": -kappa, "b": kappa * rate}
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    return arrays | {
        "log_decay": log_gate(rng, *shape),
        "initial_state": normal(rng, 1, heads, key_dim, value_dim),
    }


CASES = {  # ways that heads share lanes, that chunks and slots lie in a step; test_delta_rule.py has the usual one
    "four-heads-share-lanes": ({"heads": 8}, Tiles(32, 64, 1, 2, 1)),
    "two-heads-share-lanes": ({"heads": 6, "key_dim": 40, "value_dim": 64}, Tiles(64, 256, 3, 4, 2)),
    "odd-heads": ({"heads": 3, "value_dim": 64}, None),
    "wide": ({"key_dim": 130, "value_dim": 200}, Tiles(128, 256, 2, 2, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_chunks_are_the_reference(name):
    sizes, tiles = CASES[name]
    inputs = make(**sizes)
    segment_ids = segments(inputs["v"].shape[1])
    with mosaic_tpu.use(tiles=tiles):
        results = jax.jit(value_and_gradients("mosaic_tpu", segment_ids))(inputs, cotangents(inputs))
    assert_the_reference(inputs, results, segment_ids)


@pytest.mark.slow
def test_near_parallel_keys_are_right_on_a_tpu_too(monkeypatch):
    assert max(errors_on_a_tpu(monkeypatch, "near_parallel_keys_beta_2", "general", jnp.float32, passes=6)) < 1e-4


@pytest.mark.slow
def test_near_parallel_keys_in_bfloat16_cost_what_rounding_them_costs(monkeypatch):
    """Of out and the final state, with inputs that are rounded too."""
    errors = errors_on_a_tpu(monkeypatch, "near_parallel_keys_beta_2", "general", jnp.bfloat16, passes=6)
    assert max(errors[:2]) < 2.5e-2


@pytest.mark.slow
def test_no_races_and_no_uninitialised_memory():
    inputs = make(time=200, heads=8)
    with races.checked(), mosaic_tpu.use(tiles=Tiles(32, 64, 1, 1, 1)):
        results = jax.jit(value_and_gradients("mosaic_tpu", segments(200)))(inputs, cotangents(inputs))
    assert_the_reference(inputs, results, segments(200))


def test_what_it_does_not_do_is_said():
    inputs = make(time=4)
    with pytest.raises(NotImplementedError, match="mosaic_tpu: inputs are float16"):
        dplr_delta_rule(**{k: x.astype(jnp.float16) for k, x in inputs.items()}, implementation="mosaic_tpu")
    with dispatch.use_device(dispatch.Device("gpu", "NVIDIA H200")):
        with pytest.raises(NotImplementedError, match="a kernel for TPUs"):
            dplr_delta_rule(**inputs, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="more than 256 a side"):
        dplr_delta_rule(**make(time=4, key_dim=257), implementation="mosaic_tpu")


def _chips():
    for width in (64, 128):
        for chip in TOPOLOGIES:
            for dtype in (jnp.bfloat16, jnp.float32):
                quick = chip == "v5e" and dtype == jnp.bfloat16 and width == 64
                yield pytest.param(chip, width, dtype, marks=[pytest.mark.slow] * (not quick))


@pytest.mark.parametrize("chip, width, dtype", list(_chips()))
def test_compiles_ahead_of_time(chip, width, dtype):
    """Forward and backward, at a length that is no multiple of anything."""
    device = devices(chip)[0]
    inputs = jax.eval_shape(lambda: make(time=200, heads=2, key_dim=width, value_dim=width, dtype=dtype))
    sharding = SingleDeviceSharding(device)
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (inputs, jax.eval_shape(cotangents, inputs)),
    )
    segment_ids = jnp.ones((1, 200), jnp.int32)
    with dispatch.use_device(device):
        compiled = compile_for_tpu(jax.jit(value_and_gradients(None, segment_ids)).lower(*args))
    assert compiled.as_text().count("tpu_custom_call") >= 2
