"""Shapes nobody thought of: values and gradients against the reference, at sizes and chunks drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_attention, linear_scan
from tests.kernels.conformance import CASES, error_ratio, log_gate, normal, supported

few = settings(max_examples=6, deadline=None, derandomize=True, database=None)


def assert_same(call, arrays, implementation):
    @jax.jit
    def run(arrays):
        expected, pull_expected = jax.vjp(lambda arrays: call("reference", **arrays), arrays)
        actual, pull = jax.vjp(lambda arrays: call(implementation, **arrays), arrays)
        rng = np.random.default_rng(1)
        cotangents = jax.tree.map(lambda x: normal(rng, *x.shape), expected)
        return (expected, pull_expected(cotangents)), (actual, pull(cotangents))

    expected, actual = run(arrays)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert error_ratio(a, b) < 1e-5


CASE = "linear_attention-vector-bonus"
TAKING_FLOAT32 = [name for name in CASES[CASE].implementations if name != "mosaic_gpu" and supported(CASE, name)]


@pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "mosaic_tpu")) for name in TAKING_FLOAT32],
)
@few
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 40),
    groups=st.integers(1, 2),
    heads_per_group=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    chunk_size=st.integers(1, 50),
    decay=st.sampled_from(["none", "fixed", "scalar", "vector"]),
    with_bonus=st.booleans(),
)
def test_linear_attention(
    implementation, batch, time, groups, heads_per_group, key_dim, value_dim, chunk_size, decay, with_bonus
):
    rng, heads = np.random.default_rng(0), groups * heads_per_group
    arrays = {
        "q": normal(rng, batch, time, groups, key_dim),
        "k": normal(rng, batch, time, groups, key_dim),
        "v": normal(rng, batch, time, heads, value_dim),
        "initial_state": normal(rng, batch, heads, key_dim, value_dim),
    }
    shapes = {"fixed": (heads,), "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}
    if decay != "none":
        arrays["log_decay"] = log_gate(rng, *shapes[decay])
    if with_bonus:
        arrays["bonus"] = normal(rng, heads, key_dim)
    segment_ids = jnp.asarray(np.cumsum(rng.random((batch, time)) < 0.1, axis=1), jnp.int32)

    def call(implementation, **arrays):
        return linear_attention(**arrays, segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)

    assert_same(call, arrays, implementation)


@few
@given(batch=st.integers(1, 3), time=st.integers(1, 40), channels=st.integers(1, 5), chunk_size=st.integers(1, 50))
def test_linear_scan(batch, time, channels, chunk_size):
    rng = np.random.default_rng(0)
    arrays = {
        "x": normal(rng, batch, time, channels),
        "log_decay": log_gate(rng, batch, time, channels),
        "initial_state": normal(rng, batch, channels),
    }

    def call(implementation, **arrays):
        return linear_scan(**arrays, chunk_size=chunk_size, implementation=implementation)

    assert_same(call, arrays, "chunked")
