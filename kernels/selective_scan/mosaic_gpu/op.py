"""The call around the kernels: padding, the layout of channels, and states between parts of the time.

N is padded to a power of 2 and channels to what blocks of threads hold: with A = B = C = 0 and dt = x = 0 the states of
the padding stay zero. T is padded with steps of no time and no input.

Where sequences and groups of channels are too few to fill the GPU, parts of the time run at once: first each from a
zero state, which gives what it adds, then, after a scan over the few parts, from the state that it starts with.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels import mosaic_gpu as hopper
from kernels.array_typing import Array, Float, Int
from kernels.segments import segment_starts
from kernels.selective_scan.mosaic_gpu import launch
from kernels.selective_scan.mosaic_gpu.recurrence import Tile
from kernels.selective_scan.pallas import START_STEP, check_supported, rates

SMALLEST_STATE = 8  # N


def mosaic_gpu(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None,
    *,
    initial_state: Float[Array, "B D N"],
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """y [B, T, D] and the final state; see `selective_scan`. `chunk_size` has no meaning here.

    A CPU interprets it inside of `mosaic_gpu.use_interpret`. In packed rows rates above 0 count as 0, and what is not
    finite passes the starts of segments.

    Raises:
      NotImplementedError: another device, x or dt that is neither float32 nor bfloat16, states of more than 64 numbers
        a channel, or more than 65535 sequences.
    """
    del chunk_size
    how = hopper.interpret()
    check_supported(x, dt, A)
    batch, time, channels = x.shape
    numbers = A.shape[1]
    if batch > 65535:
        raise NotImplementedError(f"{batch} sequences: more than 65535")
    state = max(SMALLEST_STATE, 1 << (numbers - 1).bit_length())
    block = Tile(state, interpret=how is not None).channels_shape
    groups, chunks = -(-channels // math.prod(block)), -(-time // launch.CHUNK)
    parts = hopper.time_parts(batch * groups, chunks)
    plan = launch.Plan(batch, chunks * launch.CHUNK, groups, state, parts, segment_ids is not None, how)

    def by_channel(array):  # [..., D] -> [..., G, 4, W]
        padding = groups * math.prod(block) - channels
        array = jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, padding),))
        return array.reshape(*array.shape[:-1], groups, *block)

    def by_number(array):  # [..., D, N] -> [..., G, 4, N, W]
        array = jnp.pad(array.astype(jnp.float32), ((0, 0),) * (array.ndim - 1) + ((0, state - numbers),))
        return jnp.moveaxis(by_channel(array.mT), -4, -2)

    def over_time(array):
        return jnp.pad(array, ((0, 0), (0, plan.time - time)) + ((0, 0),) * (array.ndim - 2))

    def rows(array):
        array = over_time(array.astype(jnp.float32))
        return jnp.pad(array, ((0, 0), (0, 0), (0, state - numbers)))

    starts = None
    if plan.packed:
        starts = over_time(segment_starts(segment_ids).astype(jnp.float32) * START_STEP)
        starts = jnp.tile(starts.reshape(batch, chunks, launch.CHUNK), 2)
    D = jnp.zeros(channels, jnp.float32) if D is None else D.astype(jnp.float32)
    y, final_state = scan(
        plan,
        by_channel(over_time(x)),
        by_channel(over_time(dt)),
        by_number(A),
        rows(B),
        rows(C),
        by_channel(D),
        by_number(initial_state),
        starts,
    )
    final_state = jnp.moveaxis(final_state, -2, -4).reshape(batch, state, -1)[:, :numbers, :channels].mT
    return y.reshape(batch, plan.time, -1)[:, :time, :channels], final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    plan: launch.Plan,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array,
    starts: Array | None,
) -> tuple[Array, Array]:
    """Arrays as in launch.py, of one part; A in place of A2."""
    return _forward(plan, x, dt, A, B, C, D, initial_state, starts, keep=False)[0]


def _forward(plan, x, dt, A, B, C, D, initial_state, starts, keep=True):
    A2 = rates(A, plan.packed)
    states = _part_starts(plan, False, x, dt, A2, B, starts, initial_state)
    y, final_states, kept = launch.forward(plan, x, dt, A2, B, C, D, starts, states, keep)
    return (y, final_states[:, -1]), (x, dt, A, B, C, D, starts, kept)


def _backward(plan, residuals, cotangents):
    x, dt, A, B, C, D, starts, kept = residuals
    dy, d_final_state = cotangents
    A2 = rates(A, plan.packed)
    d_states = _part_starts(plan, True, dy, dt, A2, C, starts, d_final_state)
    d = launch.backward(plan, x, dt, A2, B, C, D, starts, kept, dy, d_states)
    dB, dC = (d[name].sum(1).reshape(B.shape) for name in ("dB", "dC"))
    dA, dD = (d[name].sum((0, 1)) for name in ("dA", "dD"))
    return d["dx"], d["ddt"], dA, dB, dC, dD, d["d_states"][:, 0], None


scan.defvjp(_forward, _backward)


def _part_starts(plan, reverse, x, dt, A2, B, starts, state):
    """The state that each part starts with (its gradient at each part's end), [B, P, G, 4, N, W], from the first's."""
    if plan.parts == 1:
        return state[:, None]
    added = launch.ends(plan, reverse, x, dt, A2, B, starts)
    elapsed = dt.astype(jnp.float32)
    if starts is not None:
        elapsed += starts[..., : launch.CHUNK].reshape(plan.batch, plan.time, 1, 1, 1)
    elapsed = jnp.pad(elapsed, ((0, 0), (0, plan.parts * plan.part_chunks * launch.CHUNK - plan.time), *((0, 0),) * 3))
    elapsed = elapsed.reshape(plan.batch, plan.parts, -1, *elapsed.shape[2:]).sum(2)
    decays = jnp.exp2(elapsed[..., None, :] * A2)
    parts = jnp.moveaxis(decays, 1, 0), jnp.moveaxis(added, 1, 0)
    _, states = jax.lax.scan(lambda state, part: (part[0] * state + part[1], state), state, parts, reverse=reverse)
    return jnp.moveaxis(states, 0, 1)
