"""The Pallas calls: operands and results of each kernel, and the block of each that a grid step sees."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.delta_rule.specs import TILE
from kernels.dplr_delta_rule.mosaic_tpu.bodies import backward_kernel, forward_kernel
from kernels.linear_attention.mosaic_tpu.launch import VMEM_LIMIT
from kernels.linear_attention.mosaic_tpu.plan import Plan


def forward(plan: Plan, keep: bool, **inputs: Array) -> dict[str, Array]:
    """out [B, T, H V]; state [B, slots, V, (h, K)]; to keep: U as `corrections` [B, T, H V], Y as `resolvent`
    [B, T, slots TILE] and the states before chunks `kept` [B, N, slots, V, (h, K)]."""
    state = inputs["initial_state"].shape
    outputs = {"out": (inputs["v"].shape, plan.dtype), "state": (state, jnp.float32)}
    if keep:
        outputs["corrections"] = inputs["v"].shape, jnp.float32
        outputs["resolvent"] = (plan.batch, plan.time, plan.heads * TILE), jnp.float32
        chunks = plan.blocks * plan.tiles.block // plan.tiles.chunk
        outputs["kept"] = (plan.batch, chunks, *state[1:]), plan.dtype
    return _call(plan, forward_kernel, inputs, outputs)


def backward(plan: Plan, **inputs: Array) -> dict[str, Array]:
    """The gradients by name."""
    outputs = {f"d{name}": (inputs[name].shape, plan.dtype) for name in ("q", "k", "v", "a", "b")}
    outputs["d_decay"] = inputs["decay"].shape, jnp.float32
    outputs["d_state"] = inputs["d_final_state"].shape, jnp.float32
    return _call(plan, backward_kernel, inputs, outputs, reverse=True)


def _call(plan, kernel, inputs, outputs, reverse=False):
    names = [*inputs, *outputs]
    results = pl.pallas_call(
        functools.partial(_with_names, kernel, plan, names),
        grid=(plan.batch, plan.outer, plan.blocks),
        in_specs=[_block(plan, array.shape, reverse) for array in inputs.values()],
        out_specs=[_block(plan, shape, reverse) for shape, _ in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=plan.interpret,
        name=f"dplr_delta_rule_{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _with_names(kernel, plan, names, *refs):
    kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True))))


def _block(plan, shape, reverse):
    """The block of an operand that a step sees, by its axes."""
    tiles, slots = plan.tiles, plan.tiles.heads

    def time(n):
        return plan.blocks - 1 - n if reverse else n

    if len(shape) == 3:  # [B, T, slots X]
        return pl.BlockSpec((None, tiles.block, slots * (shape[2] // plan.heads)), lambda b, p, n: (b, time(n), p))
    if len(shape) == 5:  # states before chunks
        block = (None, tiles.block // tiles.chunk, slots, *shape[3:])
        return pl.BlockSpec(block, lambda b, p, n: (b, time(n), p, 0, 0))
    return pl.BlockSpec((None, slots, *shape[2:]), lambda b, p, n: (b, p, 0, 0))  # in place for the whole sequence
