"""One token of the recurrence and of its gradient, and how a block of threads holds them.

A warp holds N x W numbers, the states of W = 512 / N channels, 4 x 4 of them a thread; the four warps of a block hold
neighbouring channels, h [4, N, W]. What belongs to a channel (dt, u, dy) is [4, W], the same in all lanes of N; what
belongs to a number of the state (B, C) is [N], the same in all lanes of channels. So a sum over N or over a warp's
channels is mostly one over registers, and the rest 8 x log2(32) = 40 shuffles a token, whatever N.

Rates come times log2 e, `A2`: a GPU's exponential is one of base 2.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.mosaic_gpu import load, store

WARPS = 4
STATES = 512  # numbers that a warp holds
THREAD = 4  # rows and columns of a thread's tile


@dataclasses.dataclass(frozen=True)
class Tile:
    """Loads, stores and broadcasts. Interpreted, arrays have no layout."""

    numbers: int  # N
    interpret: bool

    @property
    def warp_channels(self) -> int:
        return STATES // self.numbers

    @property
    def shape(self) -> tuple[int, int, int]:
        return WARPS, self.numbers, self.warp_channels

    @property
    def channels_shape(self) -> tuple[int, int]:
        return WARPS, self.warp_channels

    @property
    def layout(self) -> Any:
        # Tiled, a block is [warp, lane, lane, 4, 4], after two axes of one number.
        tiling = plgpu.Tiling((self.shape, (THREAD, THREAD)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-4, -3), vector_dim=-1)

    def states(self, ref: Any) -> Array:
        return self._load(ref, self.layout)

    def channels(self, ref: Any) -> Array:
        return self._load(ref, self.layout.reduce((1,))).astype(jnp.float32)

    def of_number(self, ref: Any) -> Array:
        return self._load(ref, self.layout.reduce((0, 2)))

    def store(self, ref: Any, x: Array) -> None:
        if self.interpret:
            ref[...] = x.astype(ref.dtype)
        else:
            store(ref, x.astype(ref.dtype))

    def no_states(self) -> Array:
        return self._zeros(self.shape, self.layout)

    def no_channels(self) -> Array:
        return self._zeros(self.channels_shape, self.layout.reduce((1,)))

    def over_numbers(self, x: Array) -> Array:
        """[4, W] -> [4, N, W]"""
        return self._broadcast(x, (0, 2))

    def over_channels(self, x: Array) -> Array:
        """[N] -> [4, N, W]"""
        return self._broadcast(x, (1,))

    def _load(self, ref, layout):
        return ref[...] if self.interpret else load(ref, layout)

    def _broadcast(self, x, axes):
        return self._cast(lax.broadcast_in_dim(x, self.shape, axes), self.layout)

    def _zeros(self, shape, layout):
        return self._cast(jnp.zeros(shape, jnp.float32), layout)

    def _cast(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)


def decay(tile: Tile, dt: Array, A2: Array) -> Array:
    return jnp.exp2(tile.over_numbers(dt) * A2)


def advance(tile: Tile, h: Array, decay: Array | float, u: Array, B: Array) -> Array:
    """h_t = exp(dt A) h_{t-1} + u B"""
    return decay * h + tile.over_channels(B) * tile.over_numbers(u)


def read(tile: Tile, h: Array, C: Array) -> Array:
    """C . h, [4, W]"""
    return jnp.sum(tile.over_channels(C) * h, axis=1)


def pull(
    tile: Tile,
    W: Array,
    dA: Array,
    h_before: Array,
    h: Array,
    decay: Array,
    dt: Array,
    u: Array,
    dy: Array,
    A2: Array,
    B: Array,
    C: Array,
) -> tuple[Array, ...]:
    """The gradient of a token, given what all later ones say of its state, W = W_{t+1} [4, N, W].

    G = C dy + W_{t+1}      W_t = a G      P = W_t h_{t-1}      dA += dt P

    Returns W_t, dA, du = B . G and A2 . P [4, W], and u G and dy h, summed over a warp's channels [4, N]: dB and dC.
    """
    dy, u = tile.over_numbers(dy), tile.over_numbers(u)
    G = tile.over_channels(C) * dy + W
    W = decay * G
    P = W * h_before
    du, through_decay = jnp.sum(tile.over_channels(B) * G, axis=1), jnp.sum(A2 * P, axis=1)
    dB, dC = jnp.sum(u * G, axis=2), jnp.sum(dy * h, axis=2)
    return W, dA + tile.over_numbers(dt) * P, du, through_decay, dB, dC
