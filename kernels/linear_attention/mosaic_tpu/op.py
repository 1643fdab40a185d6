"""The call around the kernels: layout, sums of scalar log-decays, and the gradient of the decays.

Heads lie in the lanes: [B, T, H, X] is viewed as [B, T, H * X], X padded to a multiple of 128 where it is none. The
sums of scalar log-decays within chunks, and the gradient's sums over later tokens, are small (one number a token and
head) and are matmuls with a triangle of ones in XLA; those of decays per key are made in the kernels.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.linear_attention import specs
from kernels.linear_attention.mosaic_tpu import launch, scalar
from kernels.linear_attention.mosaic_tpu.dots import LANES, Dots
from kernels.linear_attention.mosaic_tpu.plan import FASTEST, SEGMENT_START, Plan
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
    """Arguments as in `reference`; `chunk_size` is rounded up to a multiple of 128, 256 at most. On a CPU it is
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
    padded = [dim + -dim % LANES for dim in (key_dim, value_dim)]
    tiles = _tiles.get() or specs.tiles(device, time, num_heads, groups, *padded, v.dtype, chunk_size)
    constant = not time_wise and log_decay.shape[1] == 1 and (time % tiles.block == 0)
    plan = Plan(
        batch=batch,
        time=time,
        groups=groups,
        heads=num_heads,
        key_dim=padded[0],
        value_dim=padded[1],
        dtype=v.dtype,
        scale=scale,
        tiles=tiles,
        per_key=per_key,
        bonus=bonus is not None,
        starts=per_key and segment_ids is not None,
        constant=constant,
        interpret=how,
    )

    def lanes(x, width):  # [B, T, heads, X] -> [B, T, heads * width]
        x = jnp.pad(x.astype(v.dtype), ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))
        return x.reshape(*x.shape[:2], -1)

    if per_key:
        log_decay = jnp.broadcast_to(log_decay, (batch, time, num_heads, key_dim)).astype(jnp.float32)
        decay = jnp.pad(log_decay, ((0, 0), (0, 0), (0, 0), (0, padded[0] - key_dim))).reshape(batch, time, -1)
    else:
        decay = log_decay[..., 0].astype(jnp.float32)  # [B|1, T|1, H]
    starts = None if segment_ids is None else segment_starts(segment_ids).astype(jnp.float32)
    if bonus is not None:
        bonus = jnp.pad(bonus.astype(jnp.float32), ((0, 0), (0, padded[0] - key_dim)))[:, None]
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, padded[0] - key_dim), (0, padded[1] - value_dim)))
    out, state = attend(
        plan, lanes(q, padded[0]), lanes(k, padded[0]), lanes(v, padded[1]), decay, bonus, state, starts
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
    """q, k [B, T, G K]; v [B, T, H V]; decay [B, T, H K], or [B|1, T|1, H]; bonus [H, 1, K]; starts [B, T]."""
    return _forward(plan, q, k, v, decay, bonus, initial_state, starts, keep_states=False)[:2]


def _forward(plan, q, k, v, decay, bonus, initial_state, starts, keep_states):
    state = initial_state.mT if plan.per_key else initial_state
    sums = decay if plan.per_key else decay_sums(plan, decay, starts)
    out, state, kept = launch.forward(plan, q, k, v, sums, bonus, start_rows(plan, starts), state, keep_states)
    return out, state.mT if plan.per_key else state, kept


def attend_forward(plan: Plan, *args: Any) -> tuple[Any, ...]:
    out, state, kept = _forward(plan, *args, keep_states=True)
    q, k, v, decay, bonus, _, starts = args
    return (out, state), (q, k, v, decay, bonus, starts, kept)


def attend_backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Array | None, ...]:
    q, k, v, decay, bonus, starts, kept = residuals
    d_out, d_final_state = cotangents[0].astype(plan.dtype), cotangents[1].astype(jnp.float32)
    sums = decay if plan.per_key else decay_sums(plan, decay, starts)
    gradients = launch.backward(
        plan, q, k, v, sums, bonus, start_rows(plan, starts), kept, d_out,
        d_final_state.mT if plan.per_key else d_final_state,
    )  # fmt: skip
    if plan.per_key:
        d_decay, d_state = gradients["d_decay"], gradients["d_state"].mT
    else:
        d_decay, d_state = scalar_decay_gradient(plan, gradients["changes"], starts, decay), gradients["d_state"]
    d_bonus = None if bonus is None else jnp.sum(gradients["d_bonus"], axis=0)
    return gradients["dq"], gradients["dk"], gradients["dv"], d_decay, d_bonus, d_state, None


attend.defvjp(attend_forward, attend_backward)


def start_rows(plan: Plan, starts: Array | None) -> Array | None:
    """[B, 8, T padded], for decays per key."""
    if not plan.starts:
        return None
    starts = jnp.pad(starts, ((0, 0), (0, -plan.time % plan.tiles.block)))
    return jnp.broadcast_to(starts[:, None], (plan.batch, 8, starts.shape[1]))


def decay_sums(plan: Plan, decay: Array, starts: Array | None) -> Array:
    """Sums of scalar log-decays within each chunk, [B|1, steps, rows, T padded | chunk]: see `scalar.decays`."""
    tiles, exact = plan.tiles, Dots(plan.dtype).exact
    decay = jnp.maximum(decay, -1e30 if exact else FASTEST)
    if plan.constant:
        decay = jnp.broadcast_to(decay, (1, tiles.chunk, plan.heads))
    else:
        decay = jnp.broadcast_to(decay, (decay.shape[0], plan.time, plan.heads))
        if starts is not None:
            decay = decay + SEGMENT_START * starts[..., None]
        decay = jnp.pad(decay, ((0, 0), (0, plan.blocks * tiles.block - plan.time), (0, 0)))
    g = decay.transpose(0, 2, 1).reshape(decay.shape[0], plan.outer * plan.inner, tiles.heads, -1, tiles.chunk)
    upto = jnp.triu(jnp.ones((tiles.chunk, tiles.chunk), jnp.float32))
    rows = [_matmul(g, upto)]
    if exact:
        rows += [_matmul(g, 1 - upto), g]
    rows = jnp.concatenate(rows, axis=2).reshape(*g.shape[:2], scalar.rows_per_head(Dots(plan.dtype)) * tiles.heads, -1)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 8), (0, 0)))


def scalar_decay_gradient(plan: Plan, changes: Array, starts: Array | None, decay: Array) -> Array:
    """Sums of `changes` over later tokens of a chunk; 0 at the start of a segment.

    A chunk's last token stands for all later ones, by sum(S' dS') at its end: roundings do not add up over chunks.
    """
    batch, _, _, length = changes.shape
    changes = changes[:, :, : plan.tiles.heads].reshape(batch, plan.heads, -1, plan.tiles.chunk)
    sums = _matmul(changes, jnp.tril(jnp.ones((plan.tiles.chunk, plan.tiles.chunk), jnp.float32)))
    sums = sums.reshape(batch, plan.heads, length)[:, :, : plan.time].transpose(0, 2, 1)
    if starts is not None:
        sums = jnp.where(starts[..., None] > 0, 0.0, sums)
    axes = tuple(axis for axis in (0, 1) if decay.shape[axis] == 1 != sums.shape[axis])
    return jnp.sum(sums, axis=axes, keepdims=True)


def _matmul(x, ones):
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)
