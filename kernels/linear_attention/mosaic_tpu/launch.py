"""The Pallas calls: operands and results of each kernel."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu.bodies import backward_kernel, forward_kernel
from kernels.linear_attention.mosaic_tpu.plan import Plan
from kernels.mosaic_tpu import heads


def forward(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    starts: Array | None,
    initial_state: Array,
    keep_states: bool,
) -> tuple[Array | None, ...]:
    """out [B, T, H * V]; final state [B, slots, ...]; those at the starts of time blocks [B, N, slots, ...] or None."""
    inputs = _inputs(plan, q=q, k=k, v=v, decay=decay, bonus=bonus, starts=starts, initial_state=initial_state)
    outputs = {
        "out": (v.shape, plan.dtype),
        "state": (initial_state.shape, jnp.float32),
    }
    if keep_states:
        outputs["kept"] = ((plan.batch, plan.blocks, plan.heads, *plan.state_shape), jnp.float32)
    result = _call(plan, forward_kernel, inputs, outputs)
    return result["out"], result["state"], result.get("kept")


def backward(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    starts: Array | None,
    kept: Array,
    d_out: Array,
    d_final_state: Array,
) -> dict[str, Array]:
    """The gradients by name; of scalar decays `changes`, whose sums over later tokens of a chunk they are."""
    inputs = _inputs(
        plan, q=q, k=k, v=v, d_out=d_out, decay=decay, bonus=bonus, starts=starts, kept=kept,
        d_final_state=d_final_state,
    )  # fmt: skip
    tiles, step_heads = plan.tiles, plan.tiles.heads
    outputs = {
        "dq": (q.shape, plan.dtype),
        "dk": (k.shape, plan.dtype),
        "dv": (v.shape, plan.dtype),
        "d_state": (d_final_state.shape, jnp.float32),
    }
    steps = plan.outer * plan.inner
    if plan.per_key:
        outputs["d_decay"] = (decay.shape, jnp.float32)
    else:
        chunks, rows = plan.blocks * tiles.block // tiles.chunk, 8 * pl.cdiv(step_heads, 8)
        outputs["changes"] = ((plan.batch, steps, chunks, rows, plan.pack * tiles.chunk), jnp.float32)
    if plan.bonus:
        outputs["d_bonus"] = ((plan.batch, plan.heads, 1, plan.key_dim), jnp.float32)
    scratch = {"states": pltpu.VMEM((tiles.block // tiles.chunk + 1, step_heads, *plan.state_shape), plan.dtype)}
    scratch |= heads.key_sums(plan)
    if plan.per_key:
        scratch["sums"] = pltpu.VMEM((tiles.block, step_heads * plan.key_dim), jnp.float32)
    return _call(plan, backward_kernel, inputs, outputs, scratch, reverse=True)


def _inputs(plan, **arrays):
    return {name: array for name, array in arrays.items() if array is not None}


def _call(plan, kernel, inputs, outputs, scratch=None, reverse=False):
    block = functools.partial(_block, plan)
    return heads.call(plan, "linear_attention", kernel, inputs, outputs, block, scratch, reverse)


def _block(plan, spec, name, shape):
    """Of operands that only this op has."""
    tiles = plan.tiles
    chunks = tiles.block // tiles.chunk
    if name in ("decay", "changes") and not plan.per_key:
        batched, constant = shape[0] > 1, name == "decay" and plan.constant

        def place(b, p, n, h):
            return (b if batched else 0, h, 0 if constant else n, 0, 0)

        return spec((None, None, shape[2] if constant else chunks, *shape[3:]), place)
    if name == "starts":
        return spec((None, chunks, *shape[2:]), lambda b, p, n, h: (b, n, 0, 0))
    if name == "bonus":
        return spec((tiles.heads, 1, plan.key_dim), lambda b, p, n, h: (h, 0, 0))
    return None
