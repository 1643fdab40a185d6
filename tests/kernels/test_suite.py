"""The conformance suite itself: broken kernels fail it."""

import jax
import jax.numpy as jnp
import pytest

from tests.kernels import conformance
from tests.kernels import test_conformance as suite

ONE_OF_EACH_OP = {name.partition("-")[0]: name for name in conformance.CASES}.values()
VALUES = [
    lambda *pair: suite.test_values_and_gradients_are_the_references(*pair, packed=False),
    lambda *pair: suite.test_values_and_gradients_are_the_references(*pair, packed=True),
    suite.test_no_gradient_comes_from_the_future,
    suite.test_bf16_is_close_to_float32,
]
STATE = [
    suite.test_a_long_call_and_one_token_more_are_one_call,
    lambda *pair: suite.test_values_and_gradients_are_the_references(*pair, packed=False),
]


def fails(test, name, broken, monkeypatch):
    """`test` of the reference, whose results `broken` changes, does not pass."""
    reference = conformance.compiled(name, "reference")

    def compiled(name, implementation):
        return reference if implementation == "reference" else lambda *args: broken(reference, *args)

    monkeypatch.setattr(suite, "compiled", compiled)
    monkeypatch.setattr(conformance, "compiled", compiled)
    with pytest.raises(AssertionError):
        test(name, "broken")


@pytest.mark.parametrize("name", ONE_OF_EACH_OP)
def test_zeros_fail(name, monkeypatch):
    for test in VALUES:
        fails(test, name, lambda reference, *args: jax.tree.map(jnp.zeros_like, reference(*args)), monkeypatch)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH_OP if conformance.CASES[name].state])
def test_a_dropped_state_fails(name, monkeypatch):
    """Whether it is the one that comes in, the one that goes out, or the gradient of either."""
    state = conformance.CASES[name].state

    def no_initial_state(reference, inputs, *rest):
        return reference(inputs | {state: jnp.zeros_like(inputs[state])}, *rest)

    def no_final_state(reference, *args):
        (out, final_state), gradients = reference(*args)
        return (out, jnp.zeros_like(final_state)), gradients

    def no_gradient_of_the_initial_state(reference, *args):
        values, gradients = reference(*args)
        return values, gradients | {state: jnp.zeros_like(gradients[state])}

    def no_gradient_of_the_final_state(reference, inputs, segment_ids, cotangents):
        return reference(inputs, segment_ids, (cotangents[0], jnp.zeros_like(cotangents[1])))

    for broken in (
        no_initial_state,
        no_final_state,
        no_gradient_of_the_initial_state,
        no_gradient_of_the_final_state,
    ):
        for test in STATE:
            fails(test, name, broken, monkeypatch)
