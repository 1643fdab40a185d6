"""The Pallas calls: operands and results of each kernel."""

import functools

import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.delta_rule.specs import TILE
from kernels.dplr_delta_rule.mosaic_tpu.bodies import backward_kernel, forward_kernel
from kernels.linear_attention.mosaic_tpu.plan import Plan
from kernels.mosaic_tpu import heads


def forward(plan: Plan, keep: bool, **inputs: Array) -> dict[str, Array]:
    """out [B, T, H V]; state [B, slots, V, (h, K)]; to keep: U as `corrections` [B, T, H V], Y as `resolvent`
    [B, T, slots TILE] and the states before chunks `kept` [B, N, slots, V, (h, K)]."""
    state = inputs["initial_state"].shape
    outputs = {"out": (inputs["v"].shape, plan.dtype), "state": (state, jnp.float32)}
    if keep:
        outputs["corrections"] = inputs["v"].shape, jnp.float32
        outputs["resolvent"] = (plan.batch, plan.time, plan.heads * TILE), jnp.float32
        outputs["kept"] = (plan.batch, plan.blocks * _chunks(plan), *state[1:]), plan.dtype
    return heads.call(plan, "dplr_delta_rule", forward_kernel, inputs, outputs, functools.partial(_block, plan))


def backward(plan: Plan, **inputs: Array) -> dict[str, Array]:
    """The gradients by name."""
    outputs = {f"d{name}": (inputs[name].shape, plan.dtype) for name in ("q", "k", "v", "a", "b")}
    outputs["d_decay"] = inputs["decay"].shape, jnp.float32
    outputs["d_state"] = inputs["d_final_state"].shape, jnp.float32
    block = functools.partial(_block, plan)
    return heads.call(plan, "dplr_delta_rule", backward_kernel, inputs, outputs, block, reverse=True)


def _chunks(plan):  # of a block
    return plan.tiles.block // plan.tiles.chunk


def _block(plan, spec, name, shape):
    """Of operands that only this op has, or has more of."""
    widths = dict.fromkeys(("a", "b", "da", "db"), plan.key_dim) | {"corrections": plan.value_dim, "resolvent": TILE}
    if name in widths:
        return heads.values_block(plan, spec, widths[name])
    if name == "kept":
        return spec((None, _chunks(plan), plan.tiles.heads, *shape[3:]), lambda b, p, n, h: (b, n, h, 0, 0))
    return None
