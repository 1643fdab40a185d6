"""The call around the kernels: padding, sums of log-decays, states between parts of the time, gradients of decays.

Long sequences are swept in parts, all at once, where they are too few to fill the GPU: a first sweep of each part from
a zero state gives what it adds, a scan over the few parts the state that each starts with, a second sweep the states of
all chunks. From right to left likewise. Then `read` and `gradients` have a block of threads for each chunk.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import mosaic_gpu as hopper
from kernels.array_typing import Array, Float, Int
from kernels.linear_attention.mosaic_gpu import launch
from kernels.linear_attention.mosaic_gpu.blocks import Plan
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, FASTEST
from kernels.segments import segment_starts

SMALLEST = 64  # K and V: smaller ones would be mostly padding
WIDEST_KEYS, WIDEST_VALUES = 256, 512
SEGMENT_START = -128.0  # exp of it is 0 in float32


def mosaic_gpu(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "..."],
    *,
    bonus: Float[Array, "H K"] | None,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`. Chunks have 64 tokens, whatever `chunk_size`; T, K and V are padded to multiples.
    A CPU interprets it inside of `mosaic_gpu.use_interpret`.

    Raises:
      NotImplementedError: another device, inputs that are not bfloat16, K not from 64 to 256 or V not from 64 to 512,
        or more than 65535 sequences or chunks.
    """
    how = hopper.interpret()
    batch, time, heads, value_dim = v.shape
    groups, key_dim = q.shape[2:]
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        raise NotImplementedError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected bfloat16")
    if not (SMALLEST <= key_dim <= WIDEST_KEYS and SMALLEST <= value_dim <= WIDEST_VALUES):
        wanted = f"K from {SMALLEST} to {WIDEST_KEYS}, V from {SMALLEST} to {WIDEST_VALUES}"
        raise NotImplementedError(f"K {key_dim}, V {value_dim}: expected {wanted}")
    per_key = log_decay.shape[-1] > 1
    chunks, keys, values = (-(-size // CHUNK) for size in (time, key_dim, value_dim))
    plan = Plan(batch, chunks * CHUNK, groups, heads, keys * CHUNK, values * CHUNK, scale, per_key, 1, how)
    parts = hopper.time_parts(plan.sequences * plan.key_tiles * plan.value_blocks, chunks)
    plan = dataclasses.replace(plan, parts=parts)
    if max(plan.sequences, chunks) > 65535:
        raise NotImplementedError(f"{plan.sequences} sequences of {chunks} chunks: more than 65535 of either")

    g = jnp.broadcast_to(log_decay, (batch, time, *log_decay.shape[2:])).astype(jnp.float32)
    starts = None if segment_ids is None else segment_starts(segment_ids)[:, :, None, None]
    if bonus is None:
        return in_whole_chunks(plan, q, k, v, g, starts, initial_state)
    # Token t reads what the recurrence without a bonus has at t with the keys, values and decays of t - 1.
    before = [jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1] for x in (k, v, g)]
    if starts is not None:
        before[0] = jnp.where(starts, 0, before[0])
    out, state = in_whole_chunks(plan, q, *before, starts, initial_state)
    last_k = jnp.repeat(k[:, -1], heads // groups, axis=1).astype(jnp.float32)
    state = jnp.exp(g[:, -1])[..., None] * state + last_k[..., None] * v[:, -1, :, None].astype(jnp.float32)
    own = (q.astype(jnp.float32) * k)[:, :, :, None] * bonus.reshape(groups, -1, key_dim)
    own = jnp.sum(own, axis=-1).reshape(batch, time, heads, 1)
    return (out + scale * own * v).astype(v.dtype), state


def in_whole_chunks(
    plan: Plan, q: Array, k: Array, v: Array, g: Array, starts: Array | None, initial_state: Array
) -> tuple[Array, Array]:
    """`attend`, after padding T, K and V to the plan's: padding has no decay, and keys of zero."""
    time, key_dim, value_dim = v.shape[1], k.shape[3], v.shape[3]
    if starts is not None:
        g = jnp.where(starts, SEGMENT_START, g)
    later, more_keys, more_values = plan.time - time, plan.key_dim - key_dim, plan.value_dim - value_dim
    q, k, v = pad(q, later, more_keys), pad(k, later, more_keys), pad(v, later, more_values)
    g = pad(g, later, more_keys if plan.per_key else 0)
    state = pad(initial_state.reshape(-1, key_dim, value_dim), more_keys, more_values)
    out, state = attend(plan, q, k, v, g, state)
    return out[:, :time, :, :value_dim], state[:, :key_dim, :value_dim].reshape(initial_state.shape)


def pad(x: Array, first: int, last: int) -> Array:
    """Zeros after axis 1 and the last one."""
    widths = [(0, 0)] * x.ndim
    widths[1], widths[-1] = (0, first), (0, last)
    return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q: Array, k: Array, v: Array, g: Array, initial_state: Array) -> tuple[Array, Array]:
    """q, k [B, T, G, K]; v [B, T, H, V]; g [B, T, H, K|1] float32; initial_state [B H, K, V] float32."""
    return attend_forward(plan, q, k, v, g, initial_state)[0]


def attend_forward(plan: Plan, q: Array, k: Array, v: Array, g: Array, initial_state: Array) -> tuple[Any, ...]:
    decay, totals = decays(plan, g)
    starts = part_starts(plan, False, k, v, decay, totals, initial_state)
    states, ends = launch.sweep(plan, False, k, v, decay, totals, starts, keep=True)
    pairs = launch.scores(plan, q, k, decay) if plan.per_key else None
    out = launch.read(plan, False, q, pairs if plan.per_key else k, v, decay, states)
    final_state = ends.reshape(plan.sequences, plan.parts, *ends.shape[1:])[:, -1]
    # Of decays per key, the halves that the kernels read, not g, which is as large.
    return (out, final_state), (q, k, v, decay, None if plan.per_key else g, totals, starts, pairs)


def attend_backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Array | None, ...]:
    q, k, v, decay, g, totals, starts, pairs = residuals
    d_out, d_final_state = cotangents[0].astype(jnp.bfloat16), cotangents[1].astype(jnp.float32)
    states, _ = launch.sweep(plan, False, k, v, decay, totals, starts, keep=True)
    d_starts = part_starts(plan, True, q, d_out, decay, totals, d_final_state)
    d_states, d_ends = launch.sweep(plan, True, q, d_out, decay, totals, d_starts, keep=True)
    dv = launch.read(plan, True, k, pairs if plan.per_key else q, d_out, decay, d_states)
    if plan.per_key:
        pairs, dq, dk, products = launch.products(plan, v, d_out, states, d_states)
        dq, dk, d_g = launch.key_gradients(plan, q, k, pairs, dq, dk, decay, totals * products)
    else:
        dq, dk, from_here_on, before, products = launch.gradients(plan, q, k, v, d_out, decay, states, d_states)
        d_g = log_decay_gradient(plan, from_here_on, before, totals * products)
        d_g = jnp.where(g > FASTEST, d_g, 0.0)
    d_initial_state = d_ends.reshape(plan.sequences, plan.parts, *d_ends.shape[1:])[:, 0]
    return sum_shared(plan, dq), sum_shared(plan, dk), dv, d_g, d_initial_state


attend.defvjp(attend_forward, attend_backward)


def decays(plan: Plan, g: Array) -> tuple[Array | tuple[Array, Array], Array]:
    """What launch.py calls decays and totals."""
    g = jnp.where(g == SEGMENT_START, g, jnp.maximum(g, FASTEST))
    chunks = g.reshape(plan.batch, plan.chunks, CHUNK, plan.heads, -1)
    totals = jnp.exp(jnp.sum(chunks, axis=2)).transpose(0, 2, 1, 3)
    totals = jnp.broadcast_to(totals, (*totals.shape[:3], plan.key_dim)).reshape(plan.sequences, -1)
    if plan.per_key:
        high = jax.lax.reduce_precision(g, exponent_bits=8, mantissa_bits=7)
        return (high.astype(jnp.bfloat16), (g - high).astype(jnp.bfloat16)), totals
    sums = over_chunk(plan, g[..., 0].transpose(0, 2, 1), "upto")
    write = jnp.exp(jnp.minimum(sums[..., -1:] - sums, 0.0))
    return jnp.stack([sums, jnp.exp(sums), write]).reshape(3, plan.sequences, plan.time), totals


def over_chunk(plan: Plan, x: Array, counted: str) -> Array:
    """Sums of [..., T] over tokens of each one's chunk, [B H, N, 64]: those "upto" it, "from" it on, or "before" it."""
    t, i = jnp.indices((CHUNK, CHUNK))
    ones = {"upto": t <= i, "from": t >= i, "before": t < i}[counted].astype(jnp.float32)
    return jnp.matmul(x.reshape(plan.sequences, plan.chunks, CHUNK), ones, precision=jax.lax.Precision.HIGHEST)


def part_starts(
    plan: Plan, reverse: bool, x: Array, y: Array, decay: Array | tuple[Array, Array], totals: Array, state: Array
) -> Array:
    """The state that each part starts with (its gradient at each part's end), [B H P, K, V], from the first's."""
    if plan.parts == 1:
        return state
    shape = (plan.sequences, plan.parts, plan.key_dim, plan.value_dim)
    zeros = jnp.zeros((shape[0] * shape[1], *shape[2:]), jnp.float32)
    _, added = launch.sweep(plan, reverse, x, y, decay, totals, zeros, keep=False)
    totals = totals.reshape(plan.sequences, plan.chunks, plan.key_dim)
    missing = plan.parts * plan.part_chunks - plan.chunks
    totals = jnp.pad(totals, ((0, 0), (0, missing), (0, 0)), constant_values=1.0)
    totals = jnp.prod(totals.reshape(plan.sequences, plan.parts, -1, plan.key_dim), axis=2)[..., None]
    xs = jnp.moveaxis(totals, 1, 0), jnp.moveaxis(added.reshape(shape), 1, 0)
    _, starts = jax.lax.scan(lambda state, x: (x[0] * state + x[1], state), state, xs, reverse=reverse)
    return jnp.moveaxis(starts, 0, 1).reshape(zeros.shape)


def log_decay_gradient(plan: Plan, from_here_on: Array, before: Array, later: Array) -> Array:
    """The gradient of scalar log-decays, [B, T, H, 1]: chunk.py's three terms, the last of which is [B H, N K]."""
    sums = over_chunk(plan, jnp.sum(from_here_on, axis=0), "from") + over_chunk(plan, jnp.sum(before, axis=0), "before")
    sums += jnp.sum(later.reshape(plan.sequences, plan.chunks, -1), axis=-1, keepdims=True)
    return sums.reshape(plan.batch, plan.heads, plan.time).transpose(0, 2, 1)[..., None]


def sum_shared(plan: Plan, gradient: Array) -> Array:
    """Of [B, T, H, K], over the heads that share a head of q and k."""
    gradient = gradient.reshape(*gradient.shape[:2], plan.groups, -1, plan.key_dim)
    return jnp.sum(gradient, axis=3, dtype=jnp.float32).astype(gradient.dtype)
