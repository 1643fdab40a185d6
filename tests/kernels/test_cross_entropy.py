"""The loss of a language model's head, chunk by chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cross_entropy
from tests.kernels.conformance import error_ratio, normal

N, D, VOCAB = 37, 8, 50


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    targets = jnp.asarray(rng.integers(0, VOCAB, N), jnp.int32)
    weights = jnp.asarray(rng.random(N) * (rng.random(N) < 0.8), jnp.float32)
    return normal(rng, N, D), normal(rng, D, VOCAB), targets, weights


def results(arrays, **options):
    """Losses, and the gradients of hidden, head and weights against random cotangents."""

    @jax.jit
    def run(hidden, head, targets, weights):
        call = lambda hidden, head, weights: cross_entropy(hidden, head, targets, weights, **options)  # noqa: E731
        losses, pull = jax.vjp(call, hidden, head, weights)
        return losses, *pull(normal(np.random.default_rng(1), *losses.shape))

    return run(*arrays)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("chunk_size", [None, 37, 16, 1], ids=["default", "all", "some", "one"])
def test_losses_and_gradients_are_the_references(chunk_size, softcap):
    expected = results(inputs(), implementation="reference", softcap=softcap)
    for actual, wanted in zip(results(inputs(), chunk_size=chunk_size, softcap=softcap), expected, strict=True):
        assert actual.dtype == jnp.float32
        assert error_ratio(actual, wanted) < 2e-6


@pytest.mark.parametrize("chunk_size", [None, 16], ids=["one_chunk", "chunks"])
def test_bf16_is_close_to_float32(chunk_size):
    hidden, head, *rest = inputs()
    half = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), *rest
    exact = half[0].astype(jnp.float32), half[1].astype(jnp.float32), *rest
    losses, *gradients = results(half, chunk_size=chunk_size)
    expected, *expected_gradients = results(exact, implementation="reference")
    assert losses.dtype == jnp.float32 and error_ratio(losses, expected) < 5e-3
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert all(error_ratio(*pair) < 1e-2 for pair in zip(gradients, expected_gradients, strict=True))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 16}, {"implementation": "reference"}], ids=str)
def test_a_target_outside_the_vocabulary_is_nan_unless_it_has_no_weight(options):
    hidden, head, targets, _ = inputs()
    weights = jnp.ones(N).at[jnp.array([2, 4])].set(0)
    targets = targets.at[jnp.array([1, 2, 3, 4])].set(jnp.array([VOCAB, VOCAB, -1, -100]))
    losses = cross_entropy(hidden, head, targets, weights, **options)
    assert np.flatnonzero(np.isnan(losses)).tolist() == [1, 3]
    assert losses[2] == 0 and losses[4] == 0

    weights = weights.at[jnp.array([1, 3])].set(0)
    gradients = results((hidden, head, targets, weights), **options)[1:]
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.any(gradients[0][1:5])


def test_large_logits_are_exact():
    hidden, head, targets, weights = inputs()
    expected = results((hidden, 200 * head, targets, weights), implementation="reference")
    for actual, wanted in zip(results((hidden, 200 * head, targets, weights), chunk_size=16), expected, strict=True):
        assert np.isfinite(actual).all() and error_ratio(actual, wanted) < 1e-5


def test_two_runs_are_the_same_to_the_last_bit():
    first, second = (results(inputs(), chunk_size=16) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_logits_of_all_tokens_never_exist_at_once():
    tokens, vocab = 4096, 16384
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((tokens, D), jnp.float32),
            ((D, vocab), jnp.float32),
            ((tokens,), jnp.int32),
            ((tokens,), jnp.float32),
        )
    ]
    gradient = jax.jit(jax.grad(lambda *arrays: cross_entropy(*arrays).sum(), (0, 1)))
    temporary = gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < tokens * vocab * 4 / 8
