"""The call around the kernels: layout, sums of scalar log-decays, and the gradient of the decays.

Heads lie in the lanes: [B, T, H, X] is viewed as [B, T, H * X], X padded where several heads do not share 128 lanes
(`specs.slots`) and it is no multiple of those. The
sums of scalar log-decays within chunks, and the gradient's sums over later tokens, are small (one number a token and
head) and are matmuls with a triangle of ones in XLA; those of decays per key are made in the kernels.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.linear_attention import specs
from kernels.linear_attention.mosaic_tpu import launch
from kernels.linear_attention.mosaic_tpu.lanes import LANES
from kernels.linear_attention.mosaic_tpu.plan import FASTEST, LOG2E, SEGMENT_START, Plan, SlotGrid
from kernels.mosaic_tpu import interpret
from kernels.segments import segment_starts

_tiles: contextvars.ContextVar[specs.Tiles | None] = contextvars.ContextVar("tiles", default=None)


@contextlib.contextmanager
def use(*, tiles: specs.Tiles | None) -> Iterator[None]:
    """While tracing: other tiles than `specs.tiles` chooses."""
    token = _tiles.set(tiles)
    try:
        yield
    finally:
        _tiles.reset(token)


def mosaic_tpu(
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
    """Arguments as in `reference`; `chunk_size` is rounded up to 128 or 256, or to what of it the heads
    that share lanes leave. On a CPU it is
    interpreted.

    Raises:
      NotImplementedError: a GPU, inputs that are neither float32 nor bfloat16, or a head too wide for VMEM.
    """
    device, how = dispatch.device(), interpret()
    if v.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"inputs are {v.dtype}, expected float32 or bfloat16")
    batch, time, num_heads, value_dim = v.shape
    groups, key_dim = q.shape[2:]
    if max(key_dim, value_dim) > specs.WIDEST_HEAD:
        raise NotImplementedError(f"K {key_dim}, V {value_dim}: states of more than {specs.WIDEST_HEAD} a side")
    # A bonus reads a state before its decay, key by key: so do scalar decays that have one.
    per_key = log_decay.shape[-1] > 1 or bonus is not None
    time_wise = per_key or segment_ids is not None
    slots = specs.slots(num_heads, groups, key_dim, value_dim, per_key)
    key_width, value_width = slots.key_dim // slots.key_pack, slots.value_dim // slots.pack
    tiles = _tiles.get() or specs.tiles(device, time, slots, v.dtype, chunk_size)
    constant = not time_wise and log_decay.shape[1] == 1 and (time % tiles.block == 0)
    plan = Plan(
        batch=batch,
        time=time,
        **dataclasses.asdict(slots),
        dtype=v.dtype,
        scale=scale,
        tiles=tiles,
        per_key=per_key,
        bonus=bonus is not None,
        starts=per_key and segment_ids is not None,
        constant=constant,
        interpret=how,
    )

    def lanes(x, width, dtype=v.dtype):  # [B, T, heads, X] -> [B, T, heads * width]
        x = jnp.pad(x.astype(dtype), ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))
        return x.reshape(*x.shape[:2], -1)

    if per_key:
        log_decay = jnp.broadcast_to(log_decay, (batch, time, num_heads, key_dim))
        decay = lanes(log_decay, key_width, jnp.float32)
    else:
        decay = log_decay[..., 0].astype(jnp.float32)  # [B|1, T|1, H]
    starts = None if segment_ids is None else segment_starts(segment_ids).astype(jnp.float32)
    if bonus is not None:
        bonus = jnp.pad(bonus.astype(jnp.float32), ((0, 0), (0, key_width - key_dim))).reshape(plan.heads, 1, -1)
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, key_width - key_dim), (0, value_width - value_dim)))
    out, state = attend(
        plan, lanes(q, key_width), lanes(k, key_width), lanes(v, value_width), decay, bonus, state, starts
    )
    out = out.reshape(batch, time, num_heads, -1)[..., :value_dim]
    return out, state[:, :, :key_dim, :value_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    initial_state: Array,
    starts: Array | None,
) -> tuple[Array, Array]:
    """q, k [B, T, G K]; v [B, T, H V]; decay [B, T, H K], or [B|1, T|1, H]; bonus [slots, 1, ...]; starts [B, T]."""
    return _forward(plan, q, k, v, decay, bonus, initial_state, starts, keep_states=False)[:2]


def _forward(plan, q, k, v, decay, bonus, initial_state, starts, keep_states):
    state = to_slots(plan, initial_state)
    sums = decay if plan.per_key else decay_sums(plan, decay, starts)
    out, state, kept = launch.forward(plan, q, k, v, sums, bonus, start_rows(plan, starts), state, keep_states)
    return out, from_slots(plan, state), kept


def attend_forward(plan: Plan, *args: Any) -> tuple[Any, ...]:
    out, state, kept = _forward(plan, *args, keep_states=True)
    q, k, v, decay, bonus, _, starts = args
    return (out, state), (q, k, v, decay, bonus, starts, kept)


def attend_backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Array | None, ...]:
    q, k, v, decay, bonus, starts, kept = residuals
    d_out, d_final_state = cotangents[0].astype(plan.dtype), cotangents[1].astype(jnp.float32)
    sums = decay if plan.per_key else decay_sums(plan, decay, starts)
    gradients = launch.backward(
        plan, q, k, v, sums, bonus, start_rows(plan, starts), kept, d_out, to_slots(plan, d_final_state)
    )
    if plan.per_key:
        d_decay = gradients["d_decay"]
    else:
        d_decay = scalar_decay_gradient(plan, gradients["changes"], starts, decay)
    d_bonus = None if bonus is None else jnp.sum(gradients["d_bonus"], axis=0)
    d_state = from_slots(plan, gradients["d_state"])
    return gradients["dq"], gradients["dk"], gradients["dv"], d_decay, d_bonus, d_state, None


attend.defvjp(attend_forward, attend_backward)


def to_slots(plan: SlotGrid, state: Array) -> Array:
    """[B, H, K, V] -> [B, slots, K, (h, V)], or of decays per key [B, slots, V, (h, K)]."""
    state = state.mT if plan.per_key else state
    state = state.reshape(plan.batch, plan.heads, plan.pack, *state.shape[2:]).swapaxes(2, 3)
    return state.reshape(plan.batch, plan.heads, *plan.state_shape)


def from_slots(plan: SlotGrid, state: Array) -> Array:
    """The inverse of `to_slots`."""
    rows = state.shape[2]
    state = state.reshape(plan.batch, plan.heads, rows, plan.pack, -1).swapaxes(2, 3)
    state = state.reshape(plan.batch, plan.heads * plan.pack, rows, -1)
    return state.mT if plan.per_key else state


def start_rows(plan: Plan, starts: Array | None) -> Array | None:
    """[B, chunks, 8, C or 128], for decays per key."""
    if not plan.starts:
        return None
    chunk = plan.tiles.chunk
    starts = jnp.pad(starts, ((0, 0), (0, -plan.time % plan.tiles.block))).reshape(plan.batch, -1, 1, chunk)
    starts = jnp.pad(starts, ((0, 0), (0, 0), (0, 0), (0, -chunk % LANES)))
    return jnp.broadcast_to(starts, (*starts.shape[:2], 8, starts.shape[3]))


def decay_sums(plan: Plan, decay: Array, starts: Array | None) -> Array:
    """Sums of scalar log-decays within each chunk, [B|1, steps, chunks, rows, (h, C)]: see `scalar.decays`."""
    tiles, exact = plan.tiles, plan.dots.exact
    num_heads = plan.heads * plan.pack
    decay = jnp.maximum(decay, -1e30 if exact else FASTEST)
    if plan.constant:
        decay = jnp.broadcast_to(decay, (1, tiles.chunk, num_heads))
    else:
        decay = jnp.broadcast_to(decay, (decay.shape[0], plan.time, num_heads))
        if starts is not None:
            decay = decay + SEGMENT_START * starts[..., None]
        decay = jnp.pad(decay, ((0, 0), (0, plan.blocks * tiles.block - plan.time), (0, 0)))
    batch, steps = decay.shape[0], plan.outer * plan.inner
    g = decay.reshape(batch, -1, tiles.chunk, steps, tiles.heads, plan.pack).transpose(0, 3, 1, 4, 5, 2)
    g = g.reshape(*g.shape[:4], plan.pack * tiles.chunk)
    upto, after = chunk_triangles(plan)
    rows = [_matmul(g, upto if exact else LOG2E * upto)]
    if exact:
        rows += [_matmul(g, after), g]
    rows = jnp.concatenate(rows, axis=3)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, -rows.shape[3] % 8), (0, 0)))


def chunk_triangles(plan: Plan) -> tuple[Array, Array]:
    """Of a row [(h, C)] they make the sums up to a token of a chunk, and the sums after it."""
    upto = jnp.triu(jnp.ones((plan.tiles.chunk, plan.tiles.chunk), jnp.float32))
    own = jnp.eye(plan.pack, dtype=jnp.float32)
    return jnp.kron(own, upto), jnp.kron(own, 1 - upto)


def scalar_decay_gradient(plan: Plan, changes: Array, starts: Array | None, decay: Array) -> Array:
    """Sums of `changes` over later tokens of a chunk; 0 at the start of a segment.

    A chunk's last token stands for all later ones, by sum(S' dS') at its end: roundings do not add up over chunks.
    """
    batch, steps, chunks = changes.shape[:3]
    upto, _ = chunk_triangles(plan)
    sums = _matmul(changes[:, :, :, : plan.tiles.heads], upto.T)
    sums = sums.reshape(batch, steps, chunks, plan.tiles.heads, plan.pack, plan.tiles.chunk)
    sums = sums.transpose(0, 2, 5, 1, 3, 4).reshape(batch, chunks * plan.tiles.chunk, -1)[:, : plan.time]
    if starts is not None:
        sums = jnp.where(starts[..., None] > 0, 0.0, sums)
    axes = tuple(axis for axis in (0, 1) if decay.shape[axis] == 1 != sums.shape[axis])
    return jnp.sum(sums, axis=axes, keepdims=True)


def _matmul(x, ones):
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)
