"""Elementwise work between products, without the roundings that bfloat16 would put between its steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float


def rounded_once(function: Callable[..., jax.Array], *arrays: Float[Array, "..."]) -> jax.Array:
    """function(*arrays), computed in float32 from arrays as they are and rounded once, to the first one's dtype.

    The backward pass keeps the arrays, not what lies between: in float32 that would be twice their bytes. Nothing
    changes for arrays of float32.
    """
    dtype = arrays[0].dtype
    if dtype.itemsize >= 4:
        return function(*arrays).astype(dtype)

    def of_narrow(*arrays):
        return function(*(array.astype(jnp.float32) for array in arrays)).astype(dtype)

    # As in `in_pieces`, without a barrier: where the compiler finds both computations, either result is the same.
    return jax.checkpoint(of_narrow, prevent_cse=False)(*arrays)
