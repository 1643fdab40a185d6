"""The call around the kernels: layout.

Heads lie in the lanes, [B, T, H, X] viewed as [B, T, H * X], X padded where several heads do not share 128 lanes
(`linear_attention.specs.slots`) and it is no multiple of those.
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
from kernels.delta_rule.specs import WIDEST_HEAD
from kernels.dplr_delta_rule import specs
from kernels.dplr_delta_rule.mosaic_tpu import launch
from kernels.linear_attention.mosaic_tpu.op import from_slots, to_slots
from kernels.linear_attention.mosaic_tpu.plan import FASTEST, SEGMENT_START, Plan
from kernels.linear_attention.specs import Tiles, slots
from kernels.mosaic_tpu import interpret
from kernels.segments import segment_starts

_tiles: contextvars.ContextVar[Tiles | None] = contextvars.ContextVar("tiles", default=None)


@contextlib.contextmanager
def use(*, tiles: Tiles | None) -> Iterator[None]:
    """While tracing: other tiles than `specs.tiles` chooses. Their chunk is 128 / (heads that share lanes)."""
    token = _tiles.set(tiles)
    try:
        yield
    finally:
        _tiles.reset(token)


def mosaic_tpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`. Chunks are of 128 tokens, of 64 or 32 where two heads or four share the lanes, of
    whatever `chunk_size`: their scores are as wide as a register. On a CPU it is interpreted.

    Raises:
      NotImplementedError: a GPU, inputs that are neither float32 nor bfloat16, or a head too wide for VMEM.
    """
    device, how, dtype = dispatch.device(), interpret(), v.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"inputs are {dtype}, expected float32 or bfloat16")
    batch, time, num_heads, value_dim = v.shape
    key_dim = q.shape[3]
    if max(key_dim, value_dim) > WIDEST_HEAD:
        raise NotImplementedError(f"K {key_dim}, V {value_dim}: states of more than {WIDEST_HEAD} a side")
    of_heads = slots(num_heads, num_heads, key_dim, value_dim, per_key=True)
    key_width, value_width = of_heads.key_dim // of_heads.pack, of_heads.value_dim // of_heads.pack
    plan = Plan(
        batch=batch,
        time=time,
        **dataclasses.asdict(of_heads),
        dtype=dtype,
        scale=scale,
        tiles=_tiles.get() or specs.tiles(device, time, of_heads, dtype),
        per_key=True,
        bonus=False,
        starts=False,
        constant=False,
        interpret=how,
    )

    def lanes(x, width, dtype=dtype):  # [B, T, heads, X] -> [B, T, heads * width]
        x = jnp.pad(x.astype(dtype), ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))
        return x.reshape(*x.shape[:2], -1)

    decay = jnp.maximum(log_decay.astype(jnp.float32), -1e30 if dtype == jnp.float32 else FASTEST)
    if segment_ids is not None:  # a segment's first token finds nothing, before its decay and after it
        starts = segment_starts(segment_ids)[:, :, None, None]
        a, decay = jnp.where(starts, 0, a), jnp.where(starts, SEGMENT_START, decay)
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, key_width - key_dim), (0, value_width - value_dim)))
    keys = (lanes(x, key_width) for x in (q, k, a, b))
    out, state = correct(plan, *keys, lanes(v, value_width), lanes(decay, key_width, jnp.float32), state)
    out = out.reshape(batch, time, num_heads, -1)[..., :value_dim]
    return out, state[:, :, :key_dim, :value_dim]


OPERANDS = ("q", "k", "a", "b", "v", "decay")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def correct(
    plan: Plan, q: Array, k: Array, a: Array, b: Array, v: Array, decay: Array, initial_state: Array
) -> tuple[Array, Array]:
    """q, k, a, b, decay [B, T, H K]; v [B, T, H V]; states [B, H, K, V]."""
    operands = dict(zip(OPERANDS, (q, k, a, b, v, decay), strict=True))
    result = launch.forward(plan, keep=False, **operands, initial_state=to_slots(plan, initial_state))
    return result["out"], from_slots(plan, result["state"])


def correct_forward(plan: Plan, *args: Any) -> tuple[Any, ...]:
    operands = dict(zip(OPERANDS, args[:-1], strict=True))
    result = launch.forward(plan, keep=True, **operands, initial_state=to_slots(plan, args[-1]))
    kept = {name: result[name] for name in ("corrections", "resolvent", "kept")}
    return (result["out"], from_slots(plan, result["state"])), (operands, kept)


def correct_backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    operands, kept = residuals
    d_out, d_final_state = cotangents[0].astype(plan.dtype), cotangents[1].astype(jnp.float32)
    gradients = launch.backward(plan, **operands, **kept, d_out=d_out, d_final_state=to_slots(plan, d_final_state))
    names = ("dq", "dk", "da", "db", "dv", "d_decay")
    return *(gradients[name] for name in names), from_slots(plan, gradients["d_state"])


correct.defvjp(correct_forward, correct_backward)
