"""The references against the equations in float64, token by token, in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import (
    attention,
    cross_entropy,
    delta_rule,
    dplr_delta_rule,
    fast_weights,
    linear_attention,
    linear_scan,
    short_conv,
)
from kernels.segments import segment_numbers, segment_starts, tokens_since_start
from tests.kernels.conformance import BATCH, CASES, TIME, error_ratio, random_segments

SEGMENTS = np.asarray(random_segments())


def double(inputs):
    wide = lambda x: np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)  # noqa: E731
    return {name: wide(value) for name, value in inputs.items()}


def starts(b, t):
    return t > 0 and SEGMENTS[b, t] != SEGMENTS[b, t - 1]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("linear_attention")])
def test_linear_attention(name):
    inputs = CASES[name].make()
    out, final_state = linear_attention(**inputs, segment_ids=random_segments(), scale=0.7, implementation="reference")
    x = double(inputs)
    (batch, time, groups, key_dim), (heads, value_dim) = x["q"].shape, x["v"].shape[2:]
    expected = np.zeros((batch, time, heads, value_dim))
    states = x["initial_state"].copy()
    decay = np.exp(x.get("log_decay", np.zeros(heads)))
    for b in range(batch):
        for h in range(heads):
            state, g = states[b, h], h // (heads // groups)
            for t in range(time):
                q, k, v = x["q"][b, t, g], x["k"][b, t, g], x["v"][b, t, h]
                if starts(b, t):
                    state = np.zeros_like(state)
                before = state
                a = decay[h] if decay.ndim == 1 else decay[b, t, h]
                state = np.broadcast_to(a, key_dim)[:, None] * before + np.outer(k, v)
                read = before + np.outer(x["bonus"][h] * k, v) if "bonus" in x else state
                expected[b, t, h] = 0.7 * q @ read
            states[b, h] = state
    assert error_ratio(out, expected) < 1e-6
    assert error_ratio(final_state, states) < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("delta_rule")])
def test_delta_rule(name):
    inputs = CASES[name].make()
    out, final_state = delta_rule(**inputs, segment_ids=random_segments(), scale=0.7, implementation="reference")
    x = double(inputs)
    expected, states = np.zeros(x["v"].shape), x["initial_state"].copy()
    shared = x["v"].shape[2] // x["q"].shape[2]
    for b, t, h in np.ndindex(*x["v"].shape[:3]):
        q, k, beta = x["q"][b, t, h // shared], x["k"][b, t, h // shared], x["beta"][b, t, h]
        decay = np.exp(x["log_decay"][b, t, h]) * np.ones(len(k)) if "log_decay" in x else np.ones(len(k))
        before = 0 * states[b, h] if starts(b, t) else states[b, h]
        transition = (np.eye(len(k)) - beta * np.outer(k, k)) @ np.diag(decay)
        states[b, h] = transition @ before + beta * np.outer(k, x["v"][b, t, h])
        expected[b, t, h] = 0.7 * q @ states[b, h]
    assert error_ratio(out, expected) < 1e-6
    assert error_ratio(final_state, states) < 1e-6


def test_dplr_delta_rule():
    inputs = CASES["dplr_delta_rule"].make()
    out, final_state = dplr_delta_rule(**inputs, segment_ids=random_segments(), scale=0.7, implementation="reference")
    x = double(inputs)
    expected, states = np.zeros(x["v"].shape), x["initial_state"].copy()
    for b, t, h in np.ndindex(*x["v"].shape[:3]):
        q, k, v, read, write, g = (x[name][b, t, h] for name in ("q", "k", "v", "a", "b", "log_decay"))
        before = 0 * states[b, h] if starts(b, t) else states[b, h]
        states[b, h] = (np.diag(np.exp(g)) + np.outer(write, read)) @ before + np.outer(k, v)
        expected[b, t, h] = 0.7 * q @ states[b, h]
    assert error_ratio(out, expected) < 1e-6
    assert error_ratio(final_state, states) < 1e-6


def test_fast_weights():
    inputs = CASES["fast_weights"].make()
    out, final_state = fast_weights(**inputs, segment_ids=random_segments(), scale=0.7, implementation="reference")
    x = double(inputs)
    expected, states = np.zeros(x["v"].shape), x["initial_state"].copy()
    for b, t, h in np.ndindex(*x["v"].shape[:3]):
        gate = np.exp(np.add.outer(x["key_log_decay"][b, t, h], x["value_log_decay"][b, t, h]))
        before = 0 if starts(b, t) else gate * states[b, h]
        states[b, h] = before + np.outer(x["k"][b, t, h], x["v"][b, t, h])
        expected[b, t, h] = 0.7 * x["q"][b, t, h] @ states[b, h]
    assert error_ratio(out, expected) < 1e-6
    assert error_ratio(final_state, states) < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("linear_scan")])
def test_linear_scan(name):
    inputs = CASES[name].make()
    h, final_state = linear_scan(**inputs, segment_ids=random_segments(), implementation="reference")
    x = double(inputs)
    expected = np.zeros(x["x"].shape, x["initial_state"].dtype)
    state = x["initial_state"].copy()
    decay = np.broadcast_to(np.exp(x["log_decay"]), x["x"].shape)
    for t in range(expected.shape[1]):
        for b in range(len(state)):
            state[b] = (0 if starts(b, t) else decay[b, t] * state[b]) + x["x"][b, t]
        expected[:, t] = state
    assert error_ratio(h, expected) < 1e-6
    assert error_ratio(final_state, state) < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("short_conv")])
def test_short_conv(name):
    inputs = CASES[name].make()
    activation = "silu" if "silu" in name else None
    y, final_state = short_conv(
        **inputs, activation=activation, segment_ids=random_segments(), implementation="reference"
    )
    x = double(inputs)
    (batch, time, channels), taps = x["x"].shape, x["weight"].shape[1]
    expected = np.zeros((batch, time, channels))
    expected_state = np.zeros((batch, taps - 1, channels))
    for b in range(batch):
        window = np.concatenate([np.zeros((1, channels)), x["initial_state"][b]])
        for t in range(time):
            if starts(b, t):
                window = np.zeros_like(window)
            window = np.concatenate([window[1:], x["x"][b, t][None]])
            expected[b, t] = (x["weight"].T * window).sum(0) + x.get("bias", 0)
        expected_state[b] = window[1:]
    if activation:
        expected = expected / (1 + np.exp(-expected))
    assert error_ratio(y, expected) < 1e-6
    assert error_ratio(final_state, expected_state) < 1e-6


@pytest.mark.parametrize("time", [1, 5, 17, 23, 24, 25])  # from 17 to 24 a matrix product, unless a state is given
def test_short_conv_of_more_taps_than_tokens_starts_from_zeros(time):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, time, 3), (3, 24)))

    @jax.jit
    def results(x, weight, state):
        values, pull = jax.vjp(lambda x, weight: short_conv(x, weight, initial_state=state), x, weight)
        return values, pull(jax.tree.map(jnp.cos, values))

    actual, expected = results(x, weight, None), results(x, weight, jnp.zeros((2, 23, 3)))
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert error_ratio(got, wanted) < 1e-6


def test_attention():
    rng = np.random.default_rng(0)
    inputs = CASES["attention-causal"].make()
    time = inputs["q"].shape[1]
    positions = rng.integers(0, 30, (2, 2, time))
    out = attention(
        **inputs,
        window=9,
        segment_ids=(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS[:, ::-1])),
        q_positions=jnp.asarray(positions[0], jnp.int32),
        kv_positions=jnp.asarray(positions[1], jnp.int32),
        scale=0.9,
        softcap=1.5,
        implementation="reference",
    )
    x = double(inputs)
    expected = np.zeros(out.shape)
    for b, t, h in np.ndindex(*out.shape[:3]):
        distance = positions[0][b, t] - positions[1][b]
        keys = np.flatnonzero((SEGMENTS[b, t] == SEGMENTS[b, ::-1]) & (distance >= 0) & (distance < 9))
        if len(keys):
            logits = 1.5 * np.tanh(0.9 * x["k"][b, keys, h // 2] @ x["q"][b, t, h] / 1.5)
            weights = np.exp(logits - logits.max())
            expected[b, t, h] = weights @ x["v"][b, keys, h // 2] / weights.sum()
    assert 0 < (expected == 0).all(-1).mean() < 0.5  # some queries see nothing
    assert error_ratio(out, expected) < 1e-6


def test_attention_starts_a_segment_where_the_id_changes():
    inputs = CASES["attention-causal"].make()
    out = attention(**inputs, segment_ids=random_segments(), implementation="reference")
    x, numbers = double(inputs), np.cumsum([[starts(b, t) for t in range(TIME)] for b in range(BATCH)], axis=1)
    assert any(len(set(row)) > len(set(ids)) for row, ids in zip(numbers, SEGMENTS, strict=True))  # ids come back
    expected = np.zeros(out.shape)
    for b, t, h in np.ndindex(*out.shape[:3]):
        keys = [s for s in range(t + 1) if numbers[b, s] == numbers[b, t]]
        weights = np.exp(x["k"][b, keys, h // 2] @ x["q"][b, t, h] / 8**0.5)
        expected[b, t, h] = weights @ x["v"][b, keys, h // 2] / weights.sum()
    assert error_ratio(out, expected) < 1e-6


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_ids_of_segments_may_be_any_integers(dtype):
    ids = jnp.asarray(np.array([[5, 5, -2, 5, 0, 0, 0]]).astype(dtype))
    assert segment_starts(ids).tolist() == [[False, False, True, True, True, False, False]]
    assert segment_numbers(ids).tolist() == [[0, 0, 1, 2, 3, 3, 3]]
    assert tokens_since_start(ids, before=4).tolist() == [[4, 5, 0, 0, 0, 1, 2]]
    assert tokens_since_start(ids, before=jnp.array([9])).tolist() == [[9, 10, 0, 0, 0, 1, 2]]


@pytest.mark.parametrize("name", {name.split("-")[0]: name for name in CASES}.values())
def test_references_differentiate_in_every_mode(name):
    inputs = CASES[name].make()

    def loss(inputs):
        return sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(CASES[name].run(inputs, None, "reference")))

    gradient = jax.grad(loss)
    jax.eval_shape(lambda x: jax.jvp(gradient, (x,), (x,)), inputs)
    jax.eval_shape(jax.grad(lambda x: sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.tree.leaves(gradient(x)))), inputs)


def test_cross_entropy():
    rng = np.random.default_rng(0)
    hidden, head, weights = rng.standard_normal((11, 5)), rng.standard_normal((5, 7)), rng.random(11)
    targets = rng.integers(0, 7, 11)
    logits = 3 * np.tanh(hidden @ head / 3)
    expected = weights * (np.log(np.exp(logits).sum(1)) - logits[np.arange(11), targets])
    single = [jnp.asarray(x, jnp.float32) for x in (hidden, head, weights)]
    losses = cross_entropy(*single[:2], jnp.asarray(targets), single[2], softcap=3.0, implementation="reference")
    assert error_ratio(losses, expected) < 1e-6
