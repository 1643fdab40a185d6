"""Matmuls of a kernel: operands in the inputs' dtype, sums in float32."""

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array

LANES = 128


class Dots:
    """float32 operands are multiplied at full precision (a TPU's default is one bfloat16 pass)."""

    def __init__(self, dtype):
        self.dtype = jnp.dtype(dtype)
        self.exact = self.dtype == jnp.float32

    def nn(self, a: Array, b: Array) -> Array:
        """a b"""
        return self._dot(a, b, (1, 0))

    def nt(self, a: Array, b: Array) -> Array:
        """a b^T"""
        return self._dot(a, b, (1, 1))

    def tn(self, a: Array, b: Array) -> Array:
        """a^T b"""
        return self._dot(a, b, (0, 0))

    def count(self, ones: Array, x: Array) -> Array:
        """ones x, for a matrix of zeros and ones: x float32, not rounded to more than 16 bits on its way."""
        if self.exact:
            return self.nn(ones, x)
        # The upper half of x's bits is a bfloat16, and a float32 that needs no conversion back.
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16), jnp.float32)
        return self.nn(ones, high) + self.nn(ones, x - high)

    def _dot(self, a, b, contracted):
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            ((contracted[:1], contracted[1:]), ((), ())),
            precision=lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )


def over_lanes(x: Array, width: int) -> Array:
    """x [C, 128] of equal lanes, on `width` lanes."""
    return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x[:, :width]


def grid_index(size: int) -> tuple[Array, Array]:
    """Row and column numbers of a [size, size] matrix."""
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
