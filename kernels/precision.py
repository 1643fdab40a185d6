"""Matmuls in full precision (GPUs and TPUs round float32 operands if not asked not to), and roundings that stay."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.array_typing import Array


def exact(dtype: DTypeLike) -> jax.lax.Precision:
    """What keeps the digits of operands of `dtype`; bfloat16 ones lose none anyway."""
    return jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def dot(equation: str, a: Array, b: Array, like: Array) -> Array:
    """A matmul of operands in like's dtype, its sums (and its result) in float32 or wider."""
    result = jnp.promote_types(like.dtype, jnp.float32)
    a, b = a.astype(like.dtype), b.astype(like.dtype)
    return jnp.einsum(equation, a, b, precision=exact(like.dtype), preferred_element_type=result)


def narrow(x: Array, dtype: DTypeLike) -> Array:
    """x in a dtype no wider, and in memory so. Without the barrier XLA, for which more digits are as good, drops a
    rounding that is undone after it, and what waits for a sum over x waits in float32."""
    return x if x.dtype == dtype else jax.lax.optimization_barrier(x.astype(dtype))
