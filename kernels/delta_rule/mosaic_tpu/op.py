"""The call around the kernels: layout, sums of scalar log-decays, and the gradients of what is one number a token.

Heads lie in the lanes: [B, T, H, X] is viewed as [B, T, H * X], X padded where several heads do not share 128 lanes
(linear attention's `specs.slots`) and it is no multiple of those. The betas, and the sums of scalar log-decays within
chunks, are rows of a few kilobytes; the gradient's sums over later tokens are matmuls with a triangle of ones in XLA.
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
from kernels.delta_rule import specs
from kernels.delta_rule.mosaic_tpu import launch
from kernels.delta_rule.mosaic_tpu.columns import padded
from kernels.delta_rule.mosaic_tpu.plan import Plan
from kernels.linear_attention.mosaic_tpu.op import from_slots, to_slots
from kernels.linear_attention.mosaic_tpu.plan import FASTEST, LOG2E, SEGMENT_START
from kernels.linear_attention.specs import slots
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
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"] | None,
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`; `chunk_size` is rounded up to 64 or 128, or to what the heads that share lanes leave
    of 128. On a CPU it is interpreted.

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
    if log_decay is None:
        log_decay = jnp.zeros((batch, time, num_heads, 1), jnp.float32)
    per_key = log_decay.shape[-1] > 1
    of_heads = slots(num_heads, groups, key_dim, value_dim, per_key=True)  # heads that share q and k are padded
    widths = of_heads.key_dim // of_heads.pack, of_heads.value_dim // of_heads.pack
    plan = Plan(
        batch=batch,
        time=time,
        **dataclasses.asdict(of_heads),
        dtype=v.dtype,
        scale=scale,
        tiles=_tiles.get() or specs.tiles(device, time, of_heads, v.dtype, per_key, chunk_size),
        per_key=per_key,
        interpret=how,
    )

    def lanes(x, width):  # [B, T, heads, X] -> [B, T, heads * width]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))
        return x.reshape(*x.shape[:2], -1)

    decay = jnp.maximum(log_decay.astype(jnp.float32), -1e30 if v.dtype == jnp.float32 else FASTEST)
    if segment_ids is not None:
        decay = jnp.where(segment_starts(segment_ids)[:, :, None, None], SEGMENT_START, decay)
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, widths[0] - key_dim), (0, widths[1] - value_dim)))
    out, state = correct(
        plan,
        lanes(q.astype(v.dtype), widths[0]),
        lanes(k.astype(v.dtype), widths[0]),
        lanes(v, widths[1]),
        beta.astype(jnp.float32),
        lanes(decay, widths[0]) if per_key else decay[..., 0],
        state,
    )
    out = out.reshape(batch, time, num_heads, -1)[..., :value_dim]
    return out, state[:, :, :key_dim, :value_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def correct(
    plan: Plan, q: Array, k: Array, v: Array, beta: Array, decay: Array, initial_state: Array
) -> tuple[Array, Array]:
    """q, k [B, T, G K]; v [B, T, H V]; beta [B, T, H]; decay [B, T, H K] or [B, T, H]; states [B, H, K, V]."""
    state = to_slots(plan, initial_state)
    result = launch.forward(plan, keep=False, **operands(plan, q, k, beta, decay), v=v, initial_state=state)
    return result["out"], from_slots(plan, result["state"])


def correct_forward(plan: Plan, *args: Any) -> tuple[Any, ...]:
    q, k, v, beta, decay, initial_state = args
    state = to_slots(plan, initial_state)
    result = launch.forward(plan, keep=True, **operands(plan, q, k, beta, decay), v=v, initial_state=state)
    kept = {name: result[name] for name in ("error", "resolvent", "kept")}
    return (result["out"], from_slots(plan, result["state"])), (q, k, beta, decay, kept)


def correct_backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    q, k, beta, decay, kept = residuals
    d_out, d_final_state = cotangents[0].astype(plan.dtype), to_slots(plan, cotangents[1].astype(jnp.float32))
    gradients = launch.backward(
        plan, **operands(plan, q, k, beta, decay), **kept, d_out=d_out, d_final_state=d_final_state
    )
    changes = gradients["changes"]
    heads = plan.tiles.heads
    if plan.per_key:
        d_decay, changes = gradients["d_decay"], (changes[:, :, :heads],)
    else:
        changes = changes[:, :, :heads], changes[:, :, heads : 2 * heads]
        d_decay = tokens(plan, chunk_sums(plan, changes[0], jnp.tril))
    d_beta = tokens(plan, changes[-1])
    d_state = from_slots(plan, gradients["d_state"])
    return gradients["dq"], gradients["dk"], gradients["dv"], d_beta, d_decay, d_state


correct.defvjp(correct_forward, correct_backward)


def operands(plan: Plan, q: Array, k: Array, beta: Array, decay: Array) -> dict[str, Array]:
    """What both kernels read. `rows` [B, steps, rows, (tiles, h, C)]: betas; sums of scalar log-decays (scalar.py)."""
    kinds = [step_rows(plan, beta)]
    if not plan.per_key:
        exact = plan.dots.exact
        g = step_rows(plan, decay if exact else LOG2E * decay)
        kinds += [chunk_sums(plan, g, jnp.triu), chunk_sums(plan, g, lambda ones: jnp.tril(ones, -1))] + [g] * exact
    rows = jnp.concatenate(kinds, axis=2)
    return {"q": q, "k": k, "rows": rows} | ({"decay": decay} if plan.per_key else {})


def step_rows(plan: Plan, x: Array) -> Array:
    """[B, T, H] -> [B, steps, slots of a step and padding, (tiles, h, C)], T padded"""
    x = jnp.pad(x, ((0, 0), (0, plan.blocks * plan.tiles.block - plan.time), (0, 0)))
    x = x.reshape(plan.batch, -1, plan.tokens, plan.heads, plan.pack).transpose(0, 3, 1, 4, 2)
    x = x.reshape(plan.batch, plan.outer * plan.inner, plan.tiles.heads, -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded(plan.tiles.heads) - plan.tiles.heads), (0, 0)))


def tokens(plan: Plan, x: Array) -> Array:
    """The inverse of `step_rows`."""
    x = x.reshape(plan.batch, plan.heads, -1, plan.pack, plan.tokens).transpose(0, 2, 4, 1, 3)
    return x.reshape(plan.batch, -1, plan.heads * plan.pack)[:, : plan.time]


def chunk_sums(plan: Plan, x: Array, triangle: Any) -> Array:
    """Of each chunk of the last axis, x times a triangle of ones."""
    ones = triangle(jnp.ones((plan.tiles.chunk, plan.tiles.chunk), jnp.float32))
    parts = x.reshape(*x.shape[:-1], -1, plan.tiles.chunk)
    return jnp.matmul(parts, ones, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)
