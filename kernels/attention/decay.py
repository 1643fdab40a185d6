"""Sums of log-decays over time, whose differences keep their digits.

A logit gains sum_{s < u <= t} g_u = G_t - G_s. As one float32, G of 16,384 tokens at a half-life of 10 is -1,100, with
a resolution of 1e-4 that every logit would have too. So G is a pair, its rounded value and what the rounding lost.
"""

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Float

Pair = tuple[Array, Array]


def sums(log_decay: Float[Array, "B T H"]) -> Float[Array, "B T H 2"]:
    """Of each token's log-decay and of those before it, at least float32: two numbers whose sum it is."""
    return jnp.stack(lax.associative_scan(add, pair(log_decay), axis=1), axis=-1)


def pair(log_decay: Float[Array, "..."]) -> Pair:
    log_decay = log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32))
    return log_decay, jnp.zeros_like(log_decay)


def add(left: Pair, right: Pair) -> Pair:
    """Associative but for rounding: Knuth's sum of two numbers, with its error, which has no derivative."""
    (a, lost_a), (b, lost_b) = left, right
    total = a + b
    of_b = total - a
    lost = (a - (total - of_b)) + (b - of_b)
    return total, lax.stop_gradient(lost + lost_a + lost_b)


def between(of_queries: Float[Array, "... 2"], of_keys: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """What the logits gain."""
    difference = of_queries - of_keys
    return difference[..., 0] + difference[..., 1]
