"""Soft caps of logits, cap tanh(x / cap), with a slope that keeps its digits where the cap holds.

The slope 1 - tanh^2(u) is a difference of numbers next to 1, and without a digit from |u| = 9 on (float32). As the
product 1 / cosh^2(u) = 4 sigmoid(2 u) sigmoid(-2 u) it keeps them, and so do its own derivatives.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap), of magnitude `cap` at most. All modes of differentiation."""
    return cap * jnp.tanh(x / cap)


def soft_cap_slope(x: jax.Array, cap: float) -> jax.Array:
    """Its derivative, 1 / cosh^2(x / cap)."""
    return 4 * jax.nn.sigmoid(2 * x / cap) * jax.nn.sigmoid(-2 * x / cap)


@soft_cap.defjvp
def _jvp(cap, primals, tangents):
    return soft_cap(primals[0], cap), soft_cap_slope(primals[0], cap) * tangents[0]
