"""Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx


def rms_norm(width: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, statistics in float32.

    On [..., heads, width] it is a norm per head, with one scale for all heads.
    """
    scale_init = nnx.with_partitioning(jax.nn.initializers.ones, ("norm",), decay=False)
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, scale_init=scale_init, rngs=rngs)
