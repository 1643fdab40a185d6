"""The conformance suite of the mixers itself: broken mixers fail it."""

import jax
import jax.numpy as jnp
import pytest

from tests.zoo import cases
from tests.zoo import test_mixers as suite

CASE = "gla"


def fails(test, broken, monkeypatch):
    """`test` of a mixer whose results `broken` changes does not pass."""

    def applied(case, dtype=jnp.float32):
        mixer, parameters, call = cases.applied(case, dtype)
        return mixer, parameters, lambda *args: broken(call, *args)

    monkeypatch.setattr(suite, "applied", applied)
    x = jax.random.normal(jax.random.key(1), (suite.BATCH, suite.TIME, cases.D_MODEL))
    with pytest.raises(AssertionError):
        test(CASE, x)


@pytest.mark.parametrize("test", [suite.test_is_causal])
def test_zeros_fail(test, monkeypatch):
    fails(test, lambda call, *args: jax.tree.map(jnp.zeros_like, call(*args)), monkeypatch)


@pytest.mark.parametrize(
    "test", [suite.test_prefill_and_decoding_equal_the_full_pass, suite.test_a_packed_row_equals_its_documents_alone]
)
@pytest.mark.parametrize("end", ["given", "returned"])
def test_a_dropped_state_fails(test, end, monkeypatch):
    def broken(call, parameters, x, segment_ids=None, positions=None, state=None):
        if end == "given":
            state = jax.tree.map(jnp.zeros_like, state)
        y, state = call(parameters, x, segment_ids, positions, state)
        return y, jax.tree.map(jnp.zeros_like, state) if end == "returned" else state

    fails(test, broken, monkeypatch)


@pytest.mark.parametrize("shift", [1, -1])
def test_documents_that_see_each_other_fail(shift, monkeypatch):
    """A boundary one token off."""

    def broken(call, parameters, x, segment_ids=None, positions=None, state=None):
        segment_ids = None if segment_ids is None else jnp.roll(segment_ids, shift, axis=1)
        return call(parameters, x, segment_ids, positions, state)

    fails(suite.test_a_packed_row_equals_its_documents_alone, broken, monkeypatch)
