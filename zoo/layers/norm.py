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


class GatedRMSNorm(nnx.Module):
    """norm(x * silu(z)) * scale, over each of `groups` parts of the last axis; statistics in float32 (Mamba-2's)."""

    def __init__(self, width: int, *, groups: int, epsilon: float, dtype: jnp.dtype):
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones((width,)), out_sharding=("norm",), decay=False)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        parts = x.reshape(*x.shape[:-1], self.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts**2, -1, keepdims=True) + self.epsilon)
        return (parts.reshape(x.shape) * self.scale[...]).astype(self.dtype)
