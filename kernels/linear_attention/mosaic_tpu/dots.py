"""Matmuls of a kernel: operands in the inputs' dtype, sums in float32."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu import lanes


class Dots:
    """float32 operands are multiplied at full precision (a TPU's default is one bfloat16 pass).

    Attributes:
      pack: heads of v in a slot of lanes (`lanes.py`).
      key_pack: heads of q and k in a slot: `pack`, or 1 where the heads of a slot share them.
    """

    def __init__(self, dtype, pack: int = 1, key_pack: int = 1):
        self.dtype = jnp.dtype(dtype)
        self.exact = self.dtype == jnp.float32
        self.pack, self.key_pack = pack, key_pack

    def nn(self, a: Array, b: Array) -> Array:
        """a b"""
        return self._dot(a, b, (1, 0))

    def nt(self, a: Array, b: Array) -> Array:
        """a b^T"""
        return self._dot(a, b, (1, 1))

    def tn(self, a: Array, b: Array) -> Array:
        """a^T b"""
        return self._dot(a, b, (0, 0))

    def outer(self, x: Array, y: Array) -> Array:
        """x^T y of each head: x [R, (h, X)], y [R, (h, Y)] -> [X, (h, Y)]"""
        return lanes.blocks(self.tn(x, y), self.pack)

    def count(self, keep: Callable[[Array, Array], Array], x: Array) -> Array:
        """Sums of the rows j of x for which keep(i, j): x float32, not rounded to more than 16 bits on its way."""
        size = x.shape[0]
        if self.exact:
            return self.nn(keep(*grid_index(size)).astype(jnp.float32), x)
        # The upper half of x's bits is a bfloat16, and a float32 that needs no conversion back.
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16), jnp.float32)
        if size < lanes.LANES:  # both fit into the rows of one matmul
            return self.nn(keep(*grid_index(size, 2)).astype(self.dtype), jnp.concatenate([high, x - high]))
        ones = keep(*grid_index(size)).astype(self.dtype)
        return self.nn(ones, high) + self.nn(ones, x - high)

    def of_keys(self, scores: Array, x: Array) -> Array:
        """scores^T x of each head: scores [i, (h, j)], x [(h, i), (h, X)] as `spread` or `stack` has it."""
        return self.tn(scores, x) if self.pack == 1 else self.nn(lanes.transpose(scores, self.pack), x)

    def spread(self, x: Array) -> Array:
        """Of v and its kin, [C, (h, V)] -> [(h, C), (h, V)]: an operand that keeps the heads of a slot apart."""
        return self._spread(x, self.pack)

    def stack(self, x: Array) -> Array:
        """Of q or k, [C, (h, K)] -> [(h, C), (h, K)]; copies, where the heads of a slot share them."""
        return self._spread(x, self.pack) if self.key_pack > 1 else self.copies(x.astype(self.dtype))

    def copies(self, x: Array) -> Array:
        """[C, X] -> [(h, C), X]: what multiplies something spread."""
        return jnp.concatenate([x] * self.pack)

    def state(self, x: Array) -> Array:
        """A state, [K, (h, V)] -> [(h, K), (h, V)], or transposed."""
        return self._spread(x, self.key_pack)

    def _spread(self, x, pack):  # rounded last: registers of bfloat16 are not masked
        return (lanes.spread(x.astype(jnp.float32), pack) if pack > 1 else x).astype(self.dtype)

    def _dot(self, a, b, contracted):
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            ((contracted[:1], contracted[1:]), ((), ())),
            precision=lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )


def grid_index(size: int, pack: int = 1) -> tuple[Array, Array]:
    """Row and column numbers of a [size, size] matrix, or of `pack` of them side by side."""
    shape = (size, pack * size)
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    return lax.broadcasted_iota(jnp.int32, shape, 0), column if pack == 1 else column & (size - 1)
