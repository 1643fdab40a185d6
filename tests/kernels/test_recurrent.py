"""What makes the token-by-token forms fast on a CPU, and small."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import delta_rule, diagonal_ssm, dplr_delta_rule, fast_weights, linear_attention, selective_scan
from kernels.recurrent import CACHE_FLOATS, state_block, suffix_sums

HEADS, KEY_DIM, VALUE_DIM = 2, 24, 40


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def call(op, time):
    """The op's gradients of all floats as a compiled program."""
    rng = np.random.default_rng(0)
    keys, values = (1, time, HEADS, KEY_DIM), (1, time, HEADS, VALUE_DIM)
    arrays = [rng.standard_normal(keys), unit(rng, *keys), rng.standard_normal(values)]
    if op is delta_rule:
        arrays.append(rng.uniform(size=values[:3]))
    if op is dplr_delta_rule:
        arrays += [-unit(rng, *keys), 0.1 * unit(rng, *keys)]
    arrays = [jnp.asarray(x, jnp.float32) for x in (*arrays, -rng.uniform(size=keys))]

    def gradients(d_out, *arrays):
        out, pull = jax.vjp(lambda *arrays: op(*arrays, implementation="recurrent"), *arrays)
        return out, pull((d_out, jnp.ones_like(out[1])))

    return jax.jit(gradients).lower(arrays[2], *arrays).compile()


OPS = [linear_attention, delta_rule, dplr_delta_rule]
ROWS = 16  # whose states, HEADS of K by V, or 512 channels by N, are no core's cache to hold
KEYS, VALUES, CHANNELS = (ROWS, 1, HEADS, KEY_DIM), (ROWS, 1, HEADS, VALUE_DIM), (ROWS, 1, 512)
MATRICES, OF_CHANNELS, COMPLEX = (ROWS, HEADS, KEY_DIM, VALUE_DIM), (ROWS, 512, 16), jnp.complex64
ONE_TOKEN = {
    "linear_attention": (linear_attention, MATRICES, KEYS, KEYS, VALUES, KEYS),
    "one key of all heads": (
        linear_attention,
        MATRICES,
        (ROWS, 1, 1, KEY_DIM),
        (ROWS, 1, 1, KEY_DIM),
        VALUES,
        VALUES[:3],
    ),
    "delta_rule": (delta_rule, MATRICES, KEYS, KEYS, VALUES, VALUES[:3], KEYS),
    "dplr_delta_rule": (dplr_delta_rule, MATRICES, KEYS, KEYS, VALUES, KEYS, KEYS, KEYS),
    "fast_weights": (fast_weights, MATRICES, KEYS, KEYS, VALUES, KEYS, VALUES),
    "selective_scan": (selective_scan, OF_CHANNELS, CHANNELS, CHANNELS, (512, 16), (ROWS, 1, 16), (ROWS, 1, 16)),
    "diagonal_ssm": (diagonal_ssm, OF_CHANNELS, CHANNELS, (512, 16), (512, 16), (512, 16)),
}


@pytest.mark.parametrize("case", ONE_TOKEN)
def test_one_token_writes_the_states_over_in_place(case):
    """As decoding calls it, with states to give away: at most five passes over them, and no second array of them.

    With a bonus, of `linear_attention`, the old states are read beside their update, and XLA copies them once.
    """
    op, *shapes = ONE_TOKEN[case]
    places = (0, 2, 3, 4) if op is diagonal_ssm else ()
    arrays = [jax.ShapeDtypeStruct(x, COMPLEX if i in places else jnp.float32) for i, x in enumerate(shapes)]
    program = jax.jit(lambda state, *arrays: op(*arrays, initial_state=state), donate_argnums=0)
    compiled = program.lower(*arrays).compile()
    state, *others = (array.size * array.dtype.itemsize for array in arrays)
    assert "while(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * state
    assert compiled.cost_analysis()["bytes accessed"] < 5 * (state + sum(others))


@pytest.mark.parametrize("op", OPS)
def test_a_step_is_at_most_eight_kernels_and_copies_no_state(op):
    """What a comment in kernels/recurrent.py says XLA wants, of every sweep."""
    time = 80
    text = call(op, time).as_text()
    bodies = re.findall(rf'body=%([\w.-]+),.*"known_trip_count":{{"n":"{time}"}}', text)
    assert len(bodies) == {linear_attention: 3, delta_rule: 3, dplr_delta_rule: 4}[op]
    for body in bodies:
        lines = re.search(rf"^%{re.escape(body)} .*?^}}", text, re.M | re.S)[0].splitlines()[1:]
        kernels = [line for line in lines if re.search(r" (fusion|dot|copy|concatenate|slice|call|while)\(", line)]
        assert len(kernels) <= 8, kernels
        assert not any(re.search(rf"\[{HEADS},{KEY_DIM},{VALUE_DIM}\]\S* copy\(", line) for line in kernels), kernels


@pytest.mark.parametrize("op", OPS)
def test_memory_is_linear_in_time_and_holds_no_state_of_a_token(op):
    short, long = (call(op, time).memory_analysis().temp_size_in_bytes for time in (256, 512))
    assert long < 2.2 * short
    assert long < 4 * 512 * HEADS * KEY_DIM * VALUE_DIM, "a float32 state a token"


@pytest.mark.parametrize(
    "batch, num_heads, state_size", [(1, 4, 64 * 64), (6, 4, 32 * 64), (7, 3, 16), (2, 16, 32 * 32), (2, 2, 256**2)]
)
def test_blocks_of_states_divide_the_call_and_fit_the_cache(batch, num_heads, state_size):
    batch_block, head_block = state_block(batch, num_heads, state_size)
    assert batch % batch_block == 0 and num_heads % head_block == 0
    assert batch_block == 1 or head_block == num_heads
    assert batch_block * head_block * state_size <= max(CACHE_FLOATS, state_size)


def test_two_heads_of_tiny_gated_delta_net_go_together():
    """One by one they take 1.45 times as long."""
    assert state_block(8, 4, 48 * 96) == (1, 2)


@pytest.mark.parametrize("time", [1, 64, 150])
def test_suffix_sums_are_sums_to_the_end(time):
    x = np.random.default_rng(0).standard_normal((2, time, 3)).astype(np.float32)
    expected = np.cumsum(x[:, ::-1].astype(np.float64), axis=1)[:, ::-1]
    np.testing.assert_allclose(suffix_sums(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
