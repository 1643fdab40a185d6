"""Long sequences in pieces, for the memory of the backward pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Inexact
from zoo import sharding

PIECE = 4096  # tokens; a sequence of no more is one piece, as is one that is spread over devices


def in_pieces(function: Callable, *arrays: Inexact[Array, "B T ..."]):
    """function(*arrays), of each token alone: arrays [B, T, ...] to arrays [B, T, ...].

    Of a sequence longer than `PIECE` the backward pass computes the inner values again, a piece at a time, and nothing
    but the arguments waits for it. `jax.checkpoint` by itself would not do: XLA drops its barriers on a CPU, finds that
    both computations are the same and keeps the first.
    """
    batch, time = arrays[0].shape[:2]
    if time <= PIECE or sharding.axis_size("time") > 1:
        return function(*arrays)
    pieces = -(-time // PIECE)

    def split(array):
        array = jnp.pad(array, ((0, 0), (0, pieces * PIECE - time), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(array.reshape(batch, pieces, PIECE, *array.shape[2:]), 1, 0)

    def join(array):
        return jnp.moveaxis(array, 0, 1).reshape(batch, pieces * PIECE, *array.shape[3:])[:, :time]

    of_piece = jax.checkpoint(lambda piece: function(*piece), prevent_cse=False)  # a loop's body needs no barrier
    return jax.tree.map(join, jax.lax.map(of_piece, tuple(map(split, arrays))))
