"""`diagonal_ssm` beyond the conformance suite: real states, chunks, extreme decays, long rows, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import diagonal_ssm
from tests.kernels.conformance import (
    CASES,
    assert_close,
    complex_normal,
    cotangents,
    error_ratio,
    normal,
    random_segments,
    results,
)

NAME = "diagonal_ssm-skip"


def in_float64(inputs, segment_ids=None):
    v = {name: np.asarray(value).astype(np.complex128) for name, value in inputs.items()}
    y, h = np.zeros(v["x"].shape), v["initial_state"].copy()
    for b, t in np.ndindex(*y.shape[:2]):
        if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
            h[b] = 0
        h[b] = np.exp(v["log_a"]) * h[b] + v["b"] * v["x"][b, t][:, None]
        y[b, t] = (2 * np.sum(v["c"] * h[b], -1) + v["d"] * v["x"][b, t]).real
    return y, h


def test_the_reference_is_the_equation_in_float64():
    inputs, segment_ids = CASES[NAME].make(), random_segments()
    y, final_state = diagonal_ssm(**inputs, segment_ids=segment_ids, implementation="reference")
    expected, expected_state = in_float64(inputs, np.asarray(segment_ids))
    assert error_ratio(y, expected) < 1e-6
    assert error_ratio(final_state, expected_state) < 1e-6


def test_from_a_zero_state_it_is_the_convolution_of_the_docstring():
    v = CASES[NAME].make()
    y, _ = diagonal_ssm(**{name: value for name, value in v.items() if name != "initial_state"})
    time = np.arange(y.shape[1])
    log_a, b, c = (np.asarray(v[name]).astype(np.complex128) for name in ("log_a", "b", "c"))
    kernel = 2 * np.einsum("dn,dnt->dt", b * c, np.exp(log_a[..., None] * time)).real
    kernel[:, 0] += np.asarray(v["d"])
    expected = [[np.convolve(kernel[d], np.asarray(v["x"])[i, :, d])[: len(time)] for d in range(4)] for i in range(2)]
    assert error_ratio(y, np.moveaxis(np.asarray(expected), 1, 2)) < 1e-6


@pytest.mark.parametrize("chunk_size", [16, 64], ids=["chunks", "one_chunk"])
@pytest.mark.parametrize("packed", [False, True], ids=["one_segment", "packed"])
def test_no_initial_state_is_a_zero_state(packed, chunk_size):
    inputs, segment_ids = CASES[NAME].make(), random_segments() if packed else None
    zero = jnp.zeros_like(inputs.pop("initial_state"))

    @jax.jit
    def run(inputs, state, cotangents):
        def call(inputs):
            return diagonal_ssm(**inputs, initial_state=state, segment_ids=segment_ids, chunk_size=chunk_size)

        values, pull = jax.vjp(call, inputs)
        return values, pull(cotangents)[0]

    expected = results(NAME, "reference", inputs | {"initial_state": zero}, segment_ids)
    del expected[1]["initial_state"]
    assert_close(run(inputs, None, cotangents(NAME, inputs)), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["one_segment", "packed"])
@pytest.mark.parametrize("chunk_size", [1, 9, 64])
def test_any_chunk_gives_the_same(chunk_size, packed):
    inputs, segment_ids = CASES[NAME].make(), random_segments() if packed else None

    @jax.jit
    def run(inputs, cotangents):
        call = lambda inputs: diagonal_ssm(**inputs, segment_ids=segment_ids, chunk_size=chunk_size)  # noqa: E731
        values, pull = jax.vjp(call, inputs)
        return values, pull(cotangents)[0]

    assert_close(run(inputs, cotangents(NAME, inputs)), results(NAME, "reference", inputs, segment_ids))


def test_states_that_are_real():
    rng = np.random.default_rng(0)
    x, log_a, b, c = normal(rng, 2, 20, 4), -jnp.exp(normal(rng, 4, 3)), normal(rng, 4, 3), normal(rng, 4, 3)
    y, state = diagonal_ssm(x, log_a, b, c, chunk_size=8)
    expected, expected_state = diagonal_ssm(x, log_a, b, c, implementation="reference")
    assert error_ratio(y, expected) < 1e-6 and error_ratio(state, expected_state) < 1e-6
    assert not np.any(state.imag)


@pytest.mark.parametrize("packed", [False, True], ids=["one_segment", "packed"])
def test_extreme_decays_are_exact(packed):
    inputs, segment_ids = CASES[NAME].make(), random_segments() if packed else None
    kind = np.random.default_rng(3).integers(0, 3, inputs["log_a"].shape)  # forget all, keep all, or as drawn
    real = jnp.select([kind == 0, kind == 1], [jnp.full(kind.shape, -1e4), jnp.zeros(kind.shape)], inputs["log_a"].real)
    inputs["log_a"] = jax.lax.complex(real, inputs["log_a"].imag)
    actual = results(NAME, "chunked", inputs, segment_ids)
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), actual))
    assert_close(actual, results(NAME, "reference", inputs, segment_ids))


def test_a_long_row_of_fast_and_slow_turns_is_the_recurrence_in_float64():
    """S4D-Lin from a memory of 2000 tokens, over which float32 loses 2000 roundings of a, to 10 radians a token."""
    rng = np.random.default_rng(1)
    rate = np.asarray([-0.5 + 1j * np.pi * np.arange(32)]) * np.asarray([[1e-3], [1e-1]])
    log_a = jnp.asarray(rate, jnp.complex64)
    inputs = {
        "x": normal(rng, 1, 3000, 2),
        "log_a": log_a,
        "b": complex_normal(rng, 2, 32),
        "c": complex_normal(rng, 2, 32),
        "d": normal(rng, 2),
        "initial_state": complex_normal(rng, 1, 2, 32),
    }
    y, state = diagonal_ssm(**inputs)
    expected, expected_state = in_float64(inputs)
    assert error_ratio(y, expected) < 1e-4
    assert error_ratio(state, expected_state) < 1e-4
    reference, reference_state = diagonal_ssm(**inputs, implementation="reference")  # loses the same
    assert error_ratio(y, reference) < 2e-5
    assert error_ratio(state, reference_state) < 2e-5


@pytest.mark.slow
def test_a_million_tokens_are_the_convolution_in_float64():
    """T = 2^20: one call, and two that carry the state; values, and the gradient of x."""
    time, rng = 2**20, np.random.default_rng(5)
    inputs = {
        "log_a": jnp.asarray([[-1e-4 + 0.02j, -1e-2 + 1j, -1e-1 + 3j]], jnp.complex64),  # up to 10,000 tokens
        "b": complex_normal(rng, 1, 3),
        "c": complex_normal(rng, 1, 3),
    }
    x, d_y = normal(rng, 1, time, 1), normal(rng, 1, time, 1)
    b, c = (np.asarray(inputs[name][0]).astype(np.complex128) for name in "bc")
    a = np.asarray(jnp.exp(inputs["log_a"]))[0].astype(np.complex128)  # float32 loses its digits here, and only here
    taps = 2 * ((b * c) @ a[:, None] ** np.arange(time)).real

    def convolve(x):
        return np.fft.irfft(np.fft.rfft(taps, 2 * time) * np.fft.rfft(x, 2 * time), 2 * time)[:time]

    y, pull = jax.vjp(jax.jit(lambda x: diagonal_ssm(x, **inputs)[0]), x)
    assert error_ratio(y[0, :, 0], convolve(np.asarray(x, np.float64)[0, :, 0])) < 1e-4
    d_x = convolve(np.asarray(d_y, np.float64)[0, ::-1, 0])[::-1]
    assert error_ratio(pull(d_y)[0][0, :, 0], d_x) < 1e-4
    first, state = diagonal_ssm(x[:, : time // 2], **inputs)
    second, _ = diagonal_ssm(x[:, time // 2 :], **inputs, initial_state=state)
    assert error_ratio(jnp.concatenate([first, second], 1), y) < 1e-5


def test_memory_is_linear_in_time_and_far_below_a_state_a_token():
    channels, state_size = 16, 32

    def temporaries(time):
        def loss(x, log_a):
            return diagonal_ssm(x, log_a, jnp.ones_like(log_a), jnp.ones_like(log_a))[0].sum()

        shapes = jax.ShapeDtypeStruct((1, time, channels), jnp.float32), jnp.ones((channels, state_size), jnp.complex64)
        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(2**12), temporaries(2**14)
    assert long < 4.5 * short
    assert long < 8 * 2**14 * channels * state_size / 2
