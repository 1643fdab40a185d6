"""The conformance suite that every mixer of the registry passes (DESIGN: the contract of `zoo.mixers.base`)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kernels import dispatch
from tests.zoo.cases import CASES, D_MODEL, PARAMETERS, TIME_INVARIANT, applied, build, config_of, error_ratio
from tests.zoo.count_flops import dot_flops
from zoo.config import Config, from_json, to_json
from zoo.mixers import MIXERS
from zoo.states import put_rows, take_rows

# By case, so that its tests follow each other and share its programs.
pytestmark = pytest.mark.parametrize("case", PARAMETERS, scope="module")
BATCH, TIME, CUT = 2, 14, 6  # CUT: where documents, and calls that carry a state, are cut


def positions(start, length):
    return jnp.broadcast_to(jnp.arange(start, start + length), (BATCH, length))


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(1), (BATCH, TIME, D_MODEL))


def test_output_has_the_shape_and_dtype_of_the_input_and_no_state_without_one(case, inputs):
    for dtype in (jnp.float32, jnp.bfloat16):
        _, parameters, call = applied(case, dtype)
        y, state = jax.eval_shape(call, parameters, inputs.astype(dtype))
        assert (y.shape, y.dtype, state) == (inputs.shape, dtype, None)


def test_state_keeps_its_structure_and_shapes(case, inputs):
    mixer, parameters, call = applied(case)
    state = mixer.init_state(BATCH, 2 * TIME, jnp.float32)
    _, after = jax.eval_shape(call, parameters, inputs, None, positions(0, TIME), state)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_no_array_is_twice_in_a_fresh_state(case):
    """One that is could not be given away to the program that writes it over."""
    leaves = jax.tree.leaves(applied(case)[0].init_state(BATCH, TIME, jnp.float32))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_is_causal(case, inputs):
    """An output sees its token and the one before, and to the last bit nothing of those after it."""
    _, parameters, call = applied(case)
    full, t = np.asarray(call(parameters, inputs)[0]), TIME // 2

    def with_others(*places):
        x = np.array(inputs)
        x[:, places] *= -2
        return np.asarray(call(parameters, x)[0])

    np.testing.assert_array_equal(with_others(*range(t + 1, TIME))[:, : t + 1], full[:, : t + 1])
    for seen in (t - 1, t):
        assert (with_others(seen)[:, t] != full[:, t]).any()


@pytest.mark.slow
def test_no_gradient_comes_from_the_future(case, inputs):
    """Of ops tests/kernels/test_conformance.py holds it, for all implementations."""
    _, parameters, call = applied(case)
    t = TIME // 2
    gradient = jax.grad(lambda x: jnp.sum(call(parameters, x)[0][:, t] ** 2))(inputs)
    influence = jnp.abs(gradient).sum((0, 2))
    assert float(influence[t + 1 :].max()) == 0.0
    assert float(influence[t - 1 : t + 1].min()) > 0.0


def test_prefill_and_decoding_equal_the_full_pass(case, inputs):
    mixer, parameters, call = applied(case)
    full, _ = call(parameters, inputs)
    state, pieces, start = mixer.init_state(BATCH, TIME, jnp.float32), [], 0
    for length in (CUT, CUT, 1, 1):  # prefill, a second chunk of it, then token by token
        y, state = call(parameters, inputs[:, start : start + length], None, positions(start, length), state)
        pieces.append(y)
        start += length
    assert start == TIME
    assert error_ratio(jnp.concatenate(pieces, 1), full) < 2e-6


def test_a_row_moves_between_batches(case, inputs):
    """Of two batches at different lengths, a row of the one takes a place of the other; each goes on as before."""
    mixer, parameters, call = applied(case)

    def step(t, state):
        return call(parameters, inputs[:, t : t + 1], None, positions(t, 1), state)

    def of_model(state):
        return {"position": jnp.zeros(BATCH, jnp.int32), "layers": [[state]], "input": {}}

    _, short = call(parameters, inputs[:, :CUT], None, positions(0, CUT), mixer.init_state(BATCH, TIME, jnp.float32))
    _, long = step(CUT + 1, step(CUT, short)[1])
    move = jax.jit(lambda state, other: put_rows(state, [0], take_rows(other, [1])))
    mixed = move(of_model(long), of_model(short))["layers"][0][0]
    x, at = np.asarray(inputs)[1, [CUT, CUT + 2]][:, None], jnp.array([[CUT], [CUT + 2]])
    y, after = call(parameters, x, None, at, mixed)
    for row, (t, before) in enumerate(((CUT, short), (CUT + 2, long))):
        expected, expected_after = step(t, before)
        np.testing.assert_array_equal(y[row], expected[1])
        jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[1]), after, expected_after)


def test_a_packed_row_equals_its_documents_alone(case, inputs):
    """Documents alone are the beginnings of rows as long as the packed one, for which one program serves."""
    mixer, parameters, call = applied(case)
    alone, _ = call(parameters, inputs)
    turned = jnp.concatenate([inputs[:, CUT:], inputs[:, :CUT]], 1)  # begins with the second document
    second, _ = call(parameters, turned)
    segment_ids = jnp.where(jnp.arange(TIME) < CUT, 1, 2) * jnp.ones((BATCH, 1), jnp.int32)
    at = jnp.concatenate([positions(0, CUT), positions(0, TIME - CUT)], 1)
    packed, _ = call(parameters, inputs, segment_ids, at)
    assert error_ratio(packed, jnp.concatenate([alone[:, :CUT], second[:, : TIME - CUT]], 1)) < 2e-6

    # and with a state: it continues the first segment, and what comes back is the second's
    state = mixer.init_state(BATCH, 2 * TIME, jnp.float32)
    _, state = call(parameters, inputs[:, :CUT], None, positions(0, CUT), state)
    rest = TIME - CUT
    continuing = jnp.concatenate([inputs[:, CUT:], inputs[:, : TIME - rest]], 1)  # `rest` tokens, then a document
    segment_ids = jnp.where(jnp.arange(TIME) < rest, 1, 2) * jnp.ones((BATCH, 1), jnp.int32)
    at = jnp.concatenate([positions(CUT, rest), positions(0, TIME - rest)], 1)
    continued, state = call(parameters, continuing, segment_ids, at, state)
    assert error_ratio(continued[:, :rest], alone[:, CUT:]) < 5e-6
    assert error_ratio(continued[:, rest:], alone[:, : TIME - rest]) < 2e-6
    one_more, _ = call(parameters, inputs[:, TIME - rest :][:, :1], None, positions(TIME - rest, 1), state)
    assert error_ratio(one_more, alone[:, TIME - rest :][:, :1]) < 2e-6


def test_a_token_alone_in_any_batch_gives_the_same_output(case, inputs):
    """Other lengths are the subject of the tests of prefill."""
    _, parameters, call = applied(case)
    full, _ = call(parameters, inputs)
    y, _ = call(parameters, jnp.broadcast_to(inputs[:1, :1], (3, 1, D_MODEL)))
    assert error_ratio(y, jnp.broadcast_to(full[:1, :1], y.shape)) < 2e-6


def test_learns_a_copy_task_and_every_parameter_gets_a_finite_gradient(case):
    """A marked first token is to be copied to the next four places; content finds it, so no family needs positions.

    Families that cannot look for content copy each token to the next place.
    """
    mixer = build(case)
    graphdef, parameters = nnx.split(mixer)
    table, marker = jax.random.normal(jax.random.key(2), (8, D_MODEL)), jax.random.normal(jax.random.key(3), (D_MODEL,))
    optimizer = optax.adam(1e-2)
    time_invariant = CASES[case][0] in TIME_INVARIANT

    def loss(parameters, tokens):
        y, _ = nnx.merge(graphdef, parameters)(table[tokens].at[:, 0].add(3 * marker))
        logits = (y[:, 1:] @ table.T) / D_MODEL**0.5
        target = tokens[:, :-1] if time_invariant else jnp.broadcast_to(tokens[:, :1], logits.shape[:2])
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    @jax.jit
    def step(parameters, optimizer_state, key):
        tokens = jax.random.randint(key, (16, 5), 0, 8)
        value, gradient = jax.value_and_grad(loss)(parameters, tokens)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), optimizer_state, value, gradient

    optimizer_state, losses = optimizer.init(parameters), []
    for i in range(60):
        parameters, optimizer_state, value, gradient = step(parameters, optimizer_state, jax.random.key(i))
        losses.append(float(value))
        if i in (0, 20):
            for path, leaf in jax.tree.leaves_with_path(gradient):
                assert np.isfinite(leaf).all(), f"gradient of {jax.tree_util.keystr(path)} at step {i}"
                assert np.abs(leaf).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)} at step {i}"
    # Kernels of a few slow states tell neighbours apart slowly.
    assert np.mean(losses[-5:]) < (0.8 if time_invariant else 0.5) * losses[0]


def test_parameter_count_equals_its_formula(case):
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(build(case), nnx.Param)))
    assert counted == MIXERS[CASES[case][0]].num_parameters(config_of(case), D_MODEL)


def test_flops_equal_the_dot_products_of_the_definition(case):
    """Counted on the reference implementations: the chunked ones spend more, by their choice of chunk."""
    d_model, time = 64, 32
    mixer = build(case, d_model=d_model)
    with dispatch.use_implementation("reference"):
        counted = dot_flops(lambda x: mixer(x)[0], jnp.zeros((1, time, d_model))) / time
    stated = MIXERS[CASES[case][0]].flops_per_token(config_of(case), d_model, time)
    assert stated == pytest.approx(counted, rel=0.02)


def test_config_survives_json(case):
    config, name = Config(), CASES[case][0]
    setattr(config.model, name, config_of(case))
    assert from_json(to_json(config)) == config
    assert json.loads(to_json(config))["model"][name] == dataclasses.asdict(config_of(case))


def test_settings_of_a_case_are_valid(case):
    assert MIXERS[CASES[case][0]].check(config_of(case), D_MODEL) == []
