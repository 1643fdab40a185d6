"""The recurrence token by token, on a state that stays in the cache; chunks of time for the backward pass.

    a_t = exp(dt_t A),  u_t = dt_t x_t        h_t = a_t h_{t-1} + u_t B_t        y_t = C_t . h_t + D x_t

Nothing here is a matrix product, and a_t is another number for each channel, state and token: T D N exponentials are
the work, and the only question is how far they travel. A step that reads one token's row of each input, updates a
state of [N, D] in place and reads it moves nothing else. The state lies with its channels along the rows, so that the
step's vectors are whole rows and its sums over N are sums of rows.

Backward, with G_t the gradient of h_t through everything later and W_t = a_t G_t what it hands on,

    G_t = C_t dy_t + W_{t+1},   W_{T+1} = dh_T        dC_t = sum_d dy_t h_t        dB_t = sum_d u_t G_t
    du_t = B_t . G_t            d(dt_t A) = W_t h_{t-1}                            dh_0 = W_1

needs h from right to left. The forward pass keeps the state before each chunk; a chunk's states and decays are
computed again from it into a buffer of [chunk, N, D] that stays in the cache too. The start of a segment is a_t = 0.

Sequences and blocks of channels are independent. On a CPU they run one after the other: batched over sequences, the
step's vector-matrix products take twice as long, even where a state is small. A GPU runs all of them at once, and 16
tokens without a loop, sums in place of matrix products: XLA makes 3 to 5 kernels of such a chunk, and 7 to 48 of its
backward pass (compiled for an H200), where token after token, sequence after sequence takes hundreds of times as many.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.divisors import largest_divisor
from kernels.segments import segment_starts


def _one_by_one(function, *arrays):
    return lax.map(lambda arrays: function(*arrays), arrays)


def _at_once(function, *arrays):
    return jax.vmap(function)(*arrays)


@dataclasses.dataclass(frozen=True)
class Loops:
    """How a device runs the recurrence."""

    chunk_size: int  # tokens between two states that are kept, if the caller does not say
    state_floats: int  # of the channels of a block
    over: Callable  # sequences, and blocks of channels
    unroll: int  # tokens
    matmul: Callable


def _sums(a, b):
    return (a[:, None] * b).sum(0) if a.ndim == 1 else (a * b).sum(1)


# Channels that run together stay in a core's cache, with their chunk's buffers.
CPU = Loops(32, 8 * 1024, _one_by_one, 1, functools.partial(jnp.matmul, precision="highest"))
GPU = Loops(16, 2**31, _at_once, 16, _sums)


def chunked(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None,
    *,
    initial_state: Float[Array, "B D N"],
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """y [B, T, D] and the final state; see `selective_scan`."""
    batch, time, channels = x.shape
    if time == 1:
        return _one_token(x, dt, A, B, C, D, initial_state)
    loops = GPU if dispatch.device().platform == "gpu" else CPU
    size = chunk_size or loops.chunk_size
    size = -(-time // -(-time // size))  # as many chunks, all of one size: 65 tokens are 3 of 22, not 3 of 32
    width = largest_divisor(channels, loops.state_floats // A.shape[1])

    def over_time(array):  # [B, T, X] -> [B, chunks, chunk, X]; steps of size 0 leave the state alone
        array = jnp.pad(array, ((0, 0), (0, -time % size), (0, 0)))
        return array.reshape(batch, -1, size, array.shape[-1])

    def by_channel(array):  # [B, ..., D] -> [B, blocks, ..., width]
        return jnp.moveaxis(array.reshape(*array.shape[:-1], -1, width), -2, 1)

    starts = None if segment_ids is None else over_time(segment_starts(segment_ids)[..., None])
    D = jnp.zeros(channels, A.dtype) if D is None else D
    y, state = _scan(
        loops,
        by_channel(over_time(x)),
        by_channel(over_time(dt)),
        by_channel(A.T[None])[0],
        over_time(B),
        over_time(C),
        by_channel(D[None])[0],
        by_channel(initial_state.mT),
        starts,
    )
    y = jnp.moveaxis(y, 1, -2).reshape(batch, -1, channels)[:, :time]
    return y, jnp.moveaxis(state, 1, -2).reshape(batch, -1, channels).mT


def _one_token(x, dt, A, B, C, D, state):
    """The recurrence itself, on states as they come: turned round, read block by block, they are copied at each."""
    x32, dt, A, B, C = _float32((x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0]))
    state = jnp.exp(dt[..., None] * A) * state + (dt * x32)[..., None] * B[:, None]
    y = jnp.einsum("bdn,bn->bd", state, C, precision="highest")
    y = y if D is None else y + D.astype(jnp.float32) * x32
    return y[:, None].astype(x.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(loops, x, dt, A, B, C, D, state, starts):
    """x, dt [B, blocks, chunks, chunk, width]; A [blocks, N, width]; B, C [B, chunks, chunk, N]; D [blocks, width];
    state [B, blocks, N, width]; starts [B, chunks, chunk, 1] -> y, final state."""
    return _forward(loops, x, dt, A, B, C, D, state, starts)[0]


def _forward(loops, x, dt, A, B, C, D, state, starts):
    y, final_state, before = _blocks(loops, _forward_block, (B, C, starts), (x, dt, state), (A, D))
    return (y, final_state), (x, dt, A, B, C, D, before, starts)


def _backward(loops, residuals, gradients):
    x, dt, A, B, C, D, before, starts = residuals
    of_both = x, dt, before, *gradients
    dx, ddt, dA, dB, dC, dD, dstate = _blocks(loops, _backward_block, (B, C, starts), of_both, (A, D))
    dA, dD = dA.sum(0).astype(A.dtype), dD.sum(0).astype(D.dtype)
    return dx, ddt, dA, dB.sum(1).astype(B.dtype), dC.sum(1).astype(C.dtype), dD, dstate, None


_scan.defvjp(_forward, _backward)


def _blocks(loops, function, of_sequence, of_both, of_channels):
    """`function` of each sequence and block of channels: results [B, blocks, ...]."""

    def sequence(of_sequence, of_both):
        return loops.over(functools.partial(function, loops, of_sequence), of_both, of_channels)

    return loops.over(sequence, of_sequence, of_both)


def _advance(h, x, dt, A, B, start):
    """Decay and next state, [N, width]."""
    decay = jnp.exp(dt * A)
    decay = decay if start is None else jnp.where(start, 0, decay)
    return decay, decay * h + B[:, None] * (dt * x)


def _forward_block(loops, of_sequence, of_both, of_channels):
    (B, C, starts), (x, dt, state), (A, D) = of_sequence, of_both, _float32(of_channels)

    def step(h, token):
        x, dt, B, C = _float32(token[:4])
        _, h = _advance(h, x, dt, A, B, token[4])
        return h, (loops.matmul(C, h) + D * x).astype(token[0].dtype)

    def chunk(h, tokens):
        final, y = lax.scan(step, h, tokens, unroll=loops.unroll)
        return final, (y, h)

    final_state, (y, before) = lax.scan(chunk, state, (x, dt, B, C, starts))
    return y, final_state, before


def _backward_block(loops, of_sequence, of_both, of_channels):
    (B, C, starts), (x, dt, before, dy, dstate), (A, D) = of_sequence, of_both, _float32(of_channels)

    def again(h, token):
        x, dt, B = _float32(token[:3])
        decay, after = _advance(h, x, dt, A, B, token[3])
        return after, (decay, h)

    def step(carry, token):
        W, dA, dD, h = carry
        (x, dt, B, C, dy), (decay, h_before) = _float32(token[:5]), token[5]
        G = C[:, None] * dy + W
        dC, dB, du = loops.matmul(h, dy), loops.matmul(G, dt * x), loops.matmul(B, G)
        W = decay * G
        through_decay = W * h_before
        ddt = jnp.sum(A * through_decay, 0) + du * x
        gradients = (dt * du + D * dy).astype(token[0].dtype), ddt.astype(token[1].dtype), dB, dC
        return (W, dA + dt * through_decay, dD + dy * x, h_before), gradients

    def chunk(carry, tokens):
        x, dt, B, C, start, dy, before = tokens
        after, again_computed = lax.scan(again, before, (x, dt, B, start), unroll=loops.unroll)
        tokens = x, dt, B, C, dy, again_computed
        carry, gradients = lax.scan(step, (*carry, after), tokens, reverse=True, unroll=loops.unroll)
        return carry[:3], gradients

    carry = dstate, jnp.zeros_like(A), jnp.zeros_like(D)
    (dstate, dA, dD), (dx, ddt, dB, dC) = lax.scan(chunk, carry, (x, dt, B, C, starts, dy, before), reverse=True)
    return dx, ddt, dA, dB, dC, dD, dstate


def _float32(arrays):
    return tuple(array.astype(jnp.float32) for array in arrays)
