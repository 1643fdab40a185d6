"""The convolution in chunks: a Toeplitz matrix inside each, complex states between them.

A chunk of C tokens that starts from the state h sees, with a = exp(log_a) and t, s = 0 ... C-1,

    y_t = sum_{s <= t} K_{t-s} x_s + 2 Re(c . a^{t+1} h)          K_t = 2 Re(sum_n c_n a_n^t b_n)
    h'  = a^C h + sum_s a^{C-1-s} b x_s

All three sums are matrix products, one for each channel and over all chunks of all rows at once, in real numbers; only
the states go from chunk to chunk in a loop. The powers of a are products of a, as the recurrence makes them:
exp(t log_a) would turn the phase of a fast oscillation by what float32 loses of t times its angle.

In packed rows the products differ from row to row, so there the taps K_0 ... K_{C-1} run as a short convolution that
stops at the starts of segments and of chunks; a chunk's state reaches its tokens before the first start in it, and
its own tokens after the last start make the next state.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Float, Inexact, Int
from kernels.segments import segment_starts
from kernels.short_conv import short_conv
from kernels.toeplitz import toeplitz

CHUNK_SIZE, PACKED_CHUNK_SIZE = 64, 32  # tokens; the taps of packed rows are not a matrix product


def chunked(
    x: Float[Array, "B T D"],
    log_a: Inexact[Array, "D N"],
    b: Inexact[Array, "D N"],
    c: Inexact[Array, "D N"],
    d: Float[Array, " D"] | None,
    *,
    initial_state: Inexact[Array, "B D N"] | None,
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
    """y [B, T, D] and the final state; see `diagonal_ssm`. Without an initial state one chunk needs no states."""
    batch, time, channels = x.shape
    if time == 1:
        return _one_token(x, log_a, b, c, d, initial_state)
    size = min(chunk_size or (CHUNK_SIZE if segment_ids is None else PACKED_CHUNK_SIZE), time)
    chunks = math.ceil(time / size)
    padding = chunks * size - time
    inputs = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding), (0, 0)))
    powers = _powers(jnp.exp(log_a), size)  # a^0 ... a^size: [size + 1, D, N]
    taps = _taps(jnp.exp(log_a), b * c, size)
    taps = taps if d is None else taps.at[0].add(d.astype(jnp.float32))

    # [B, chunks, size] masks: tokens that the chunk's first state reaches, and tokens that reach its last.
    reached = lasting = carries = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, padding))).reshape(batch, chunks, size)
        reached = jnp.cumsum(starts, -1) == 0
        lasting = jnp.flip(jnp.cumsum(jnp.flip(starts, -1), -1), -1) - starts == 0
        carries = reached[..., -1]

    by_chunk = jnp.moveaxis(inputs.reshape(batch, chunks, size, channels), 3, 0)  # channels first: products of rows
    if segment_ids is None:
        y = _product("dbct,dut->dbcu", by_chunk, toeplitz(taps.T))
    else:
        # A start of a chunk is a start too: number both kinds.
        own = jnp.cumsum(starts.at[:, :, 0].set(True).reshape(batch, -1), -1, dtype=jnp.int32)
        y = short_conv(inputs, jnp.flip(taps.T, -1), segment_ids=own)[0]
        y = jnp.moveaxis(y.reshape(batch, chunks, size, channels), 3, 0)

    writes = _by_channel(powers[:-1][::-1] * b)  # [D, size, 2 N]
    lasting_inputs = by_chunk if lasting is None else jnp.where(lasting, by_chunk, 0)
    before = None  # the states before chunks
    if chunks > 1 or initial_state is not None:
        if initial_state is None:
            initial_state = jnp.zeros((batch, *log_a.shape), jnp.complex64)
        written = _product("dbct,dtn->cbdn", lasting_inputs[:, :, :-1], writes)  # the last chunk's go nowhere
        before = _states(written, powers[-1], None if carries is None else carries[:, :-1], initial_state)
        reads = _by_channel(jnp.conj(powers[1:] * c))
        from_state = 2 * _product("cbdn,dtn->dbct", _parts(before), reads)
        y = y + (from_state if reached is None else jnp.where(reached, from_state, 0))

    last = size - padding  # tokens of the last chunk
    ending = lasting_inputs[:, :, -1, :last]
    final_state = _complex(_product("dbt,dtn->bdn", ending, writes[:, size - last :]))
    if before is not None:
        carried = powers[last] * before[-1]
        final_state += carried if carries is None else jnp.where(carries[:, -1, None, None], carried, 0)
    return jnp.moveaxis(y, 0, 3).reshape(batch, -1, channels)[:, :time].astype(x.dtype), final_state


def _one_token(x, log_a, b, c, d, initial_state):
    """The recurrence itself: a chunk of one token would be a matrix product of a few numbers for each channel."""
    inputs = x[:, 0].astype(jnp.float32)
    state = inputs[..., None] * b
    state = state if initial_state is None else jnp.exp(log_a) * initial_state + state
    state = lax.optimization_barrier(state)  # XLA would compute it twice, to be returned and to be read
    y = 2 * jnp.sum((state * c).real, axis=-1)  # by parts, XLA stores both
    y = y if d is None else y + d.astype(jnp.float32) * inputs
    return y[:, None].astype(x.dtype), state


def _taps(a, weights, count):
    """K_t = 2 Re(sum_n weights_n a_n^t), t = 0 ... count - 1: [count, D].

    With t = width i + j, a^t is (a^width)^i a^j: one matrix product in each channel, of 2 sqrt(count) powers.
    """
    width = math.ceil(math.sqrt(count))
    small = _powers(a, width)
    large = weights * _powers(small[-1], math.ceil(count / width) - 1)
    taps = 2 * _product("idn,jdn->ijd", _parts(jnp.conj(large)), _parts(small[:-1]))
    return taps.reshape(-1, len(a))[:count]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _powers(a, count):
    """a^0 ... a^count, [count + 1, ...], by doubling; their derivatives t a^(t-1) take no more than the powers."""
    powers, next_power = jnp.ones_like(a)[None], a  # next_power: a^len(powers)
    while len(powers) <= count:
        powers = jnp.concatenate([powers, powers * next_power])
        next_power = next_power * next_power
    return powers[: count + 1]


def _powers_forward(a, count):
    powers = _powers(a, count)
    return powers, powers[:-1]


def _powers_backward(count, powers, gradient):
    exponent = jnp.arange(1, count + 1, dtype=jnp.float32).reshape(-1, *(1,) * (powers.ndim - 1))
    return (jnp.sum(exponent * powers * gradient[1:], 0),)


_powers.defvjp(_powers_forward, _powers_backward)


def _states(written, decay, carries, initial_state):
    """The state before each chunk, [chunks, B, D, N]; `written` has all chunks but the last."""
    carries = jnp.ones(written.shape[:2], bool) if carries is None else carries.T

    def step(h, chunk):
        written, carries = chunk
        return decay * jnp.where(carries[:, None, None], h, 0) + _complex(written), h

    last, before = lax.scan(step, initial_state, (written, carries))
    return jnp.concatenate([before, last[None]])


def _by_channel(weights):
    """Complex [size, D, N] -> real [D, size, 2 N]."""
    return jnp.moveaxis(_parts(weights), 1, 0)


def _product(subscripts, left, right):
    return jnp.einsum(subscripts, left, right, precision="highest")


def _parts(z):
    """Real and imaginary parts side by side, [..., 2 N]: Re(conj(w) z) is the product of the parts of w and z."""
    return jnp.concatenate([z.real, z.imag], -1)


def _complex(parts):
    return lax.complex(*jnp.split(parts, 2, -1))
