"""A call of which the state takes in a part: outputs are of all tokens, the state is that after the first few."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.zoo.cases import CASES, D_MODEL, applied, error_ratio
from zoo.mixers import CAUSAL, MIXERS
from zoo.taken import Segments

BATCH, BEFORE, TIME = 2, 6, 6
# What has a state of a kind of its own; the others are with the slow tests.
QUICK = ("attention", "attention-window=5", "h3", "mlstm", "gated_delta_product")
# Of bfloat16 in the order of its products: several tokens at once against one at a time. Measured: 9e-4 for dfw, at
# most 1e-7 for the others of 2026-11-29.
BOUNDS = {jnp.float32: 1e-6, jnp.bfloat16: 1e-2}


def parameters():
    for dtype in BOUNDS:
        for case, (family, _) in CASES.items():
            if CAUSAL not in MIXERS[family].directions:
                continue  # no state
            is_quick = case in QUICK and dtype == jnp.float32
            yield pytest.param(case, dtype, marks=[pytest.mark.slow] * (not is_quick), id=f"{case}-{dtype.__name__}")


def positions(start, length):
    return jnp.broadcast_to(jnp.arange(start, start + length), (BATCH, length))


def held(state):
    """A state without what it has no use for: slots of a cache that hold no token that it counts."""
    if not isinstance(state, dict) or "index" not in state:
        return state
    slots, index = np.arange(state["k"].shape[2]), np.asarray(state["index"])[:, None]
    used = (slots < index)[:, None, :, None]
    return state | {name: jnp.where(used, state[name], 0) for name in ("k", "v", "sums") if name in state}


def assert_rows_equal(state, row, other, other_row, bound):
    """bound: 0 for equal to the last bit."""

    def check(path, a, b):
        a, b = np.asarray(a[row], np.complex64), np.asarray(b[other_row], np.complex64)
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)
        assert error <= bound, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(check, held(state), held(other))


@pytest.mark.parametrize(("case", "dtype"), list(parameters()))
def test_the_state_is_that_after_the_tokens_taken(case, dtype):
    mixer, weights, call = applied(case, dtype)
    call = functools.partial(call, weights)
    x = jax.random.normal(jax.random.key(1), (BATCH, BEFORE + TIME + 1, D_MODEL)).astype(dtype)
    _, start = call(x[:, :BEFORE], None, positions(0, BEFORE), mixer.init_state(BATCH, BEFORE + 2 * TIME, dtype))
    here, at = x[:, BEFORE : BEFORE + TIME], positions(BEFORE, TIME)
    y, _ = call(here, None, at, start)
    fresh = [start]  # after each number of tokens, one by one
    for t in range(TIME):
        fresh.append(call(here[:, t : t + 1], None, positions(BEFORE + t, 1), fresh[-1])[1])

    for lengths in ([2, 0], [TIME, 3]):
        part, state = call(here, Segments.of(None, jnp.array(lengths), (BATCH, TIME)), at, start)
        assert error_ratio(part, y) <= max(BOUNDS[dtype] / 10, 1e-6)  # of all tokens, taken or not
        for row, length in enumerate(lengths):
            assert_rows_equal(state, row, fresh[length], row, BOUNDS[dtype])
        after = jnp.array([BEFORE + length for length in lengths])
        tokens = jnp.stack([x[row, t] for row, t in enumerate(after)])[:, None]
        next_y, _ = call(tokens, None, after[:, None], state)
        for row, length in enumerate(lengths):
            expected, _ = call(x[:, BEFORE + length :][:, :1], None, positions(BEFORE + length, 1), fresh[length])
            assert error_ratio(next_y[row], expected[row]) <= 5 * BOUNDS[dtype]

    # Row 0 takes in two tokens of a document that starts here, row 1 none of them.
    ids = jnp.broadcast_to((jnp.arange(TIME) >= 2).astype(jnp.int32), (BATCH, TIME))
    at = jnp.where(ids == 1, jnp.arange(TIME) - 2, at)
    _, state = call(here, Segments.of(ids, jnp.array([4, 2]), (BATCH, TIME)), at, start)
    begun = mixer.init_state(BATCH, BEFORE + 2 * TIME, dtype)
    for t in range(2):
        _, begun = call(here[:, 2 + t : 3 + t], None, positions(t, 1), begun)
    next_y, _ = call(here[:, -1:], None, jnp.array([[2], [BEFORE + 2]]), state)
    for row, (position, before) in enumerate(((2, begun), (BEFORE + 2, fresh[2]))):
        expected, _ = call(here[:, -1:], None, positions(position, 1), before)
        assert error_ratio(next_y[row], expected[row]) <= 5 * BOUNDS[dtype]

    _, state = call(here, Segments.of(None, jnp.zeros(BATCH, jnp.int32), (BATCH, TIME)), at, start)
    assert_rows_equal(state, 0, start, 0, 0)  # nothing taken in changes nothing
