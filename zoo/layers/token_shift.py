"""The previous token's features (RWKV; Peng et al. 2023, arXiv:2305.13048)."""

import jax

from kernels.array_typing import Array, Float, Int
from zoo import ops
from zoo.layers.rounded_once import rounded_once


def token_shift(
    x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, last: Float[Array, "B D"] | None
) -> tuple[jax.Array, jax.Array]:
    """(x_{t-1} at each t, and x_T, to be the `last` of the next call). Zero before a segment's first token.

    `last` belongs to the segment of token 0; None is zero.
    """
    return ops.previous(x, initial_state=last, segment_ids=segment_ids)


def mixture(x: jax.Array, shifted: jax.Array, *mixes: jax.Array) -> jax.Array:
    """x + (shifted - x) * (the sum of `mixes`), rounded once: near a mix of 1 the digits of x cancel."""
    return rounded_once(lambda x, shifted, *mixes: x + (shifted - x) * sum(mixes), x, shifted, *mixes)
