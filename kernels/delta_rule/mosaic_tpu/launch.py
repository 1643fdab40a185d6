"""The Pallas calls: operands and results of each kernel."""

import functools

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.bodies import backward_kernel, forward_kernel
from kernels.delta_rule.mosaic_tpu.plan import Plan
from kernels.delta_rule.specs import TILE
from kernels.mosaic_tpu import heads


def forward(plan: Plan, keep: bool, **inputs: Array) -> dict[str, Array]:
    """out [B, T, H V]; state [B, slots, ...]; to keep: e as `error` [B, T, H V], X as `resolvent` [B, ., slots TILE]
    and the states at the starts of time blocks `kept` [B, N, slots, ...]."""
    time = plan.blocks * plan.tiles.block
    outputs = {"out": (inputs["v"].shape, plan.dtype), "state": (inputs["initial_state"].shape, jnp.float32)}
    if keep:
        outputs["error"] = inputs["v"].shape, jnp.float32
        outputs["resolvent"] = (plan.batch, time // plan.chunks, plan.heads * TILE), jnp.float32
        outputs["kept"] = (plan.batch, plan.blocks, *inputs["initial_state"].shape[1:]), jnp.float32
    return _call(plan, forward_kernel, inputs, outputs)


def backward(plan: Plan, **inputs: Array) -> dict[str, Array]:
    """The gradients by name; of beta and scalar decays `changes`."""
    tiles, state, time = plan.tiles, inputs["d_final_state"].shape, plan.blocks * plan.tiles.block
    rows = tiles.heads * (1 if plan.per_key else 2)
    outputs = {
        "dq": (inputs["q"].shape, plan.dtype),
        "dk": (inputs["k"].shape, plan.dtype),
        "dv": (inputs["d_out"].shape, plan.dtype),
        "d_state": (state, jnp.float32),
        "changes": ((plan.batch, plan.outer * plan.inner, rows + -rows % 8, time * plan.pack), jnp.float32),
    }
    if plan.per_key:
        outputs["d_decay"] = inputs["decay"].shape, jnp.float32
    chunks = tiles.block // tiles.chunk
    scratch = {"states": pltpu.VMEM((chunks + 1, tiles.heads, *state[2:]), plan.dtype)}
    scratch |= heads.key_sums(plan)
    return _call(plan, backward_kernel, inputs, outputs, scratch, reverse=True)


def _call(plan, kernel, inputs, outputs, scratch=None, reverse=False):
    block = functools.partial(_block, plan)
    return heads.call(plan, "delta_rule", kernel, inputs, outputs, block, scratch, reverse)


def _block(plan, spec, name, shape):
    """Of operands that only this op has."""
    tiles = plan.tiles
    if name == "error":
        return heads.values_block(plan, spec, plan.value_dim)
    if name == "resolvent":
        block = (None, tiles.block // plan.chunks, tiles.heads * TILE)
        return spec(block, lambda b, p, n, h: (b, n, h))
    if name in ("rows", "changes"):
        return spec((None, None, shape[2], tiles.block * plan.pack), lambda b, p, n, h: (b, h, 0, n))
    return None
