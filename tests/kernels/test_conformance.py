"""What every op promises, in every implementation that runs on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.conformance import (
    BATCH,
    CASES,
    CUT,
    GATED,
    PAIRS,
    STATEFUL,
    TIME,
    assert_close,
    compiled,
    cotangents,
    error_ratio,
    random_segments,
    results,
)


@pytest.mark.parametrize("packed", [False, True], ids=["one_segment", "packed"])
@pytest.mark.parametrize("name, implementation", PAIRS)
def test_values_and_gradients_are_the_references(name, implementation, packed):
    inputs = CASES[name].make()
    segment_ids = random_segments() if packed else None
    actual = results(name, implementation, inputs, segment_ids)
    assert_close(actual, results(name, "reference", inputs, segment_ids))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, actual[1], inputs))


@pytest.mark.parametrize("name, implementation", STATEFUL)
def test_a_long_call_and_one_token_more_are_one_call(name, implementation):
    """The state is carried. Neither call has segment ids, the call that they are held to has."""
    case, inputs, run = CASES[name], CASES[name].make(), compiled(name, implementation)
    first, second = parts(name, inputs)
    out, dstate = cotangents(name, inputs)

    # The gradient of the carried state is what the second call gives back for it.
    (_, state), _ = run(first, None, (out[:, :CUT], dstate))
    (later, final_state), from_later = run(second | {case.state: state}, None, (out[:, CUT:], dstate))
    (earlier, _), from_earlier = run(first, None, (out[:, :CUT], from_later[case.state]))

    gradients = {case.state: from_earlier[case.state]}
    for key in inputs.keys() - {case.state}:
        pair = from_earlier[key], from_later[key]
        gradients[key] = jnp.concatenate(pair, 1) if key in case.over_time else pair[0] + pair[1]
    actual = (jnp.concatenate([earlier, later], 1), final_state), gradients
    assert_close(actual, results(name, implementation, inputs))


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_a_packed_row_is_its_documents(name, implementation):
    """One of many tokens and one of a single one."""
    case, packed = CASES[name], CASES[name].make()
    segment_ids = jnp.where(jnp.arange(TIME) < CUT, 4, 2) * jnp.ones((BATCH, 1), jnp.int32)
    (out, final_state), gradients = results(name, implementation, packed, segment_ids)
    out_cotangent, state_cotangent = cotangents(name, packed)

    first, last = parts(name, packed)
    cotangent, last_cotangent = (out_cotangent[:, :CUT], state_cotangent), (out_cotangent[:, CUT:], state_cotangent)
    if case.state:  # the final state of the first goes nowhere, the last starts from zero
        cotangent = cotangent[0], jnp.zeros_like(state_cotangent)
        last[case.state] = jnp.zeros_like(last[case.state])
    (first_out, _), first_gradients = compiled(name, implementation)(first, None, cotangent)
    (last_out, last_state), last_gradients = compiled(name, implementation)(last, None, last_cotangent)

    assert error_ratio(out, jnp.concatenate([first_out, last_out], 1)) < 1e-6
    for key in case.over_time:  # together: one token from a zero state has a decay without a gradient
        alone = jnp.concatenate([first_gradients[key], last_gradients[key]], 1)
        assert error_ratio(gradients[key], alone) < 1e-5, key
    if case.state:
        assert error_ratio(final_state, last_state) < 1e-6
        assert error_ratio(gradients[case.state], first_gradients[case.state]) < 1e-5


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_no_gradient_comes_from_the_future(name, implementation):
    inputs, now = CASES[name].make(), 22
    out, state = cotangents(name, inputs)
    only_now = out.at[:, :now].set(0).at[:, now + 1 :].set(0)
    ones = jnp.ones((BATCH, TIME), jnp.int32)
    _, gradients = compiled(name, implementation)(inputs, ones, (only_now, jax.tree.map(jnp.zeros_like, state)))
    for key in CASES[name].over_time:
        assert not np.any(gradients[key][:, now + 1 :]), key
        assert np.any(gradients[key][:, now - 1]) or key in ("q", "C"), key  # what reads
        assert np.any(gradients[key][:, now]) or key == "log_decay", key  # with a bonus the read is before the decay


@pytest.mark.parametrize("packed", [False, True], ids=["one_segment", "packed"])
@pytest.mark.parametrize("name, implementation", GATED)
def test_extreme_decays_are_exact(name, implementation, packed):
    inputs = CASES[name].make()
    rng = np.random.default_rng(3)
    for gate in CASES[name].gates:
        drawn = inputs[gate]
        kind = rng.integers(0, 3, drawn.shape)  # forget all (correct twice), keep all, or the gate drawn
        strongest = 2.0 if gate == "beta" else -1e4
        inputs[gate] = jnp.select([kind == 0, kind == 1], [drawn * 0 + strongest, drawn * 0], drawn)
    segment_ids = random_segments() if packed else None
    actual = results(name, implementation, inputs, segment_ids)
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), actual))
    assert_close(actual, results(name, "reference", inputs, segment_ids))


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_bf16_is_close_to_float32(name, implementation):
    case = CASES[name]
    inputs = case.make()
    if jnp.iscomplexobj(inputs.get("x", 0)):
        pytest.skip("complex64 has no half of bf16")
    half = {
        key: value if key in case.float32_inputs or jnp.iscomplexobj(value) else value.astype(jnp.bfloat16)
        for key, value in inputs.items()
    }
    exact = {key: value if jnp.iscomplexobj(value) else value.astype(jnp.float32) for key, value in half.items()}
    cotangents_half = cotangents(name, half)
    ones = jnp.ones((BATCH, TIME), jnp.int32)
    values, gradients = compiled(name, implementation)(half, ones, cotangents_half)
    widened = jax.tree.map(lambda x: x if jnp.iscomplexobj(x) else x.astype(jnp.float32), cotangents_half)
    expected, expected_gradients = compiled(name, "reference")(exact, ones, widened)
    for actual, wanted in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        assert error_ratio(actual, wanted) < 5e-3
    for key, wanted in expected_gradients.items():
        assert gradients[key].dtype == half[key].dtype, key
        assert error_ratio(gradients[key], wanted) < (2e-2 if key in case.gates else 1e-2), key


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_two_runs_are_the_same_to_the_last_bit(name, implementation):
    inputs = CASES[name].make()
    first, second = (results(name, implementation, inputs) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.step])
def test_steps_are_the_full_form(name):
    case, inputs = CASES[name], CASES[name].make()
    expected, expected_state = results(name, "reference", inputs)[0]
    step = jax.jit(case.step)
    state = inputs[case.state]
    constants = {key: value for key, value in inputs.items() if key not in (*case.over_time, case.state)}
    outputs = []
    for t in range(TIME):
        out, state = step(constants | {key: inputs[key][:, t] for key in case.over_time}, state)
        outputs.append(out)
    assert error_ratio(jnp.stack(outputs, 1), expected) < 1e-6
    assert error_ratio(state, expected_state) < 1e-6


def parts(name, inputs):
    """All tokens but one, and that one."""
    over_time = CASES[name].over_time
    return [
        {key: x[:, here] if key in over_time else x for key, x in inputs.items()}
        for here in (slice(None, CUT), slice(CUT, None))
    ]
