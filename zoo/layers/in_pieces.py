"""Long sequences in pieces, for the memory of the backward pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Inexact
from zoo import sharding

PIECE = 4096  # tokens on a device; a sequence of no more is one piece


def in_pieces(function: Callable, *arrays: Inexact[Array, "B T ..."]):
    """function(*arrays), of each token alone: arrays [B, T, ...] to arrays [B, T, ...].

    Of a sequence longer than `PIECE` the backward pass computes the inner values again, a piece at a time, and nothing
    but the arguments waits for it. `jax.checkpoint` by itself would not do: XLA drops its barriers on a CPU, finds that
    both computations are the same and keeps the first.
    """
    batch, time = arrays[0].shape[:2]
    parts = sharding.axis_size("time") if time % sharding.axis_size("time") == 0 else 1
    length = time // parts  # a piece takes as many tokens from each device's part of the sequence
    if length <= PIECE:
        return function(*arrays)
    pieces = -(-length // PIECE)

    def split(array):
        array = array.reshape(batch, parts, length, *array.shape[2:])
        array = jnp.pad(array, ((0, 0), (0, 0), (0, pieces * PIECE - length), *((0, 0),) * (array.ndim - 3)))
        array = jnp.moveaxis(array.reshape(batch, parts, pieces, PIECE, *array.shape[3:]), 2, 0)
        return array.reshape(pieces, batch, parts * PIECE, *array.shape[4:])

    def join(array):
        array = jnp.moveaxis(array.reshape(pieces, batch, parts, PIECE, *array.shape[3:]), 0, 2)
        return array.reshape(batch, parts, pieces * PIECE, *array.shape[4:])[:, :, :length].reshape(
            batch, time, *array.shape[4:]
        )

    of_piece = jax.checkpoint(lambda piece: function(*piece), prevent_cse=False)  # a loop's body needs no barrier
    return jax.tree.map(join, jax.lax.map(of_piece, tuple(map(split, arrays))))
