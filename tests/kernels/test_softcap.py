"""Soft caps where they hold: derivatives keep their digits, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention, cross_entropy
from kernels.softcap import soft_cap
from tests.kernels.conformance import error_ratio

CAP = 3.0
SATURATED = np.array([-20.0, -10.0, -5.0, -1.0, 0.0, 0.5, 5.0, 10.0, 20.0])  # times the cap


def slope(u):
    return 1 / np.cosh(u) ** 2


def test_first_and_second_derivatives_keep_their_digits():
    x = jnp.asarray(CAP * SATURATED, jnp.float32)
    derivative = jax.grad(lambda x: soft_cap(x, CAP))
    for first in (derivative, jax.jacfwd(lambda x: soft_cap(x, CAP))):
        np.testing.assert_allclose(jax.vmap(first)(x), slope(SATURATED), rtol=1e-5)
    expected = -2 * np.tanh(SATURATED) * slope(SATURATED) / CAP
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(derivative))(x), expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(soft_cap(x, CAP), CAP * np.tanh(SATURATED), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}, {"implementation": "reference"}], ids=str)
def test_cross_entropy(options):
    @jax.jit
    @jax.grad
    def gradient(hidden, head):
        return cross_entropy(hidden, head, jnp.asarray(targets), jnp.ones(9), softcap=CAP, **options).sum()

    hidden, targets = np.linspace(0.9, 1.1, 9)[:, None], np.arange(9) % 7
    for times in (5, 10, 20):
        head = CAP * times * np.array([[1.05, -1.02, 1.01, -1.0, 0.99, 0.98, -0.95]])
        p = np.exp(CAP * np.tanh(hidden @ head / CAP))
        p /= p.sum(1, keepdims=True)
        expected = ((p - np.eye(7)[targets]) * slope(hidden @ head / CAP)) @ head.T
        assert error_ratio(gradient(*(jnp.asarray(x, jnp.float32) for x in (hidden, head))), expected) < 2e-5


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_attention(implementation):
    @jax.jit
    @jax.grad
    def gradient(q, k, v):
        q, k, v = (x.reshape(1, 6, 1, 1) for x in (q, k, v))
        return attention(q, k, v, scale=1.0, softcap=CAP, implementation=implementation).sum()

    q, v = np.linspace(0.9, 1.1, 6), np.arange(6.0)
    for times in (5, 10, 20):
        k = CAP * times * np.array([1.02, -1.01, 0.99, 0.98, -0.97, 1.0])
        u = np.outer(q, k) / CAP
        p = np.tril(np.exp(CAP * np.tanh(u)))
        p /= p.sum(1, keepdims=True)
        expected = (p * (v - p @ v[:, None]) * slope(u)) @ k  # of the sum of the outputs
        assert error_ratio(gradient(*(jnp.asarray(x, jnp.float32) for x in (q, k, v))), expected) < 3e-5
