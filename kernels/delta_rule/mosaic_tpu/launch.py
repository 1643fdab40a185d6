"""The Pallas calls: operands and results of each kernel, and the block of each that a grid step sees.

A step loads a block of tokens of a few heads. q, k, v stay as [B, T, heads * X], of which a block of lanes is some
heads: nothing is transposed in memory.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.bodies import backward_kernel, forward_kernel
from kernels.delta_rule.mosaic_tpu.plan import Plan
from kernels.delta_rule.specs import TILE

VMEM_LIMIT = 100 * 2**20  # bytes; of 128 MiB on v5e and v6e


def forward(plan: Plan, keep: bool, **inputs: Array) -> dict[str, Array]:
    """out [B, T, H V]; state [B, H, ...]; to keep: e as `error` [B, T, H V], X as `resolvent` [B, ., H TILE] and the
    states at the starts of time blocks `kept` [B, N, H, ...]."""
    time = plan.blocks * plan.tiles.block
    outputs = {"out": (inputs["v"].shape, plan.dtype), "state": (inputs["initial_state"].shape, jnp.float32)}
    if keep:
        outputs["error"] = inputs["v"].shape, jnp.float32
        outputs["resolvent"] = (plan.batch, time // TILE * plan.tiles.chunk, plan.heads * TILE), jnp.float32
        outputs["kept"] = (plan.batch, plan.blocks, *inputs["initial_state"].shape[1:]), jnp.float32
    return _call(plan, forward_kernel, inputs, outputs)


def backward(plan: Plan, **inputs: Array) -> dict[str, Array]:
    """The gradients by name; of beta and scalar decays `changes`."""
    tiles, state = plan.tiles, inputs["d_final_state"].shape
    rows = tiles.heads * (1 if plan.per_key else 2)
    outputs = {
        "dq": (inputs["q"].shape, plan.dtype),
        "dk": (inputs["k"].shape, plan.dtype),
        "dv": (inputs["d_out"].shape, plan.dtype),
        "d_state": (state, jnp.float32),
        "changes": ((plan.batch, plan.outer * plan.inner, rows + -rows % 8, plan.blocks * tiles.block), jnp.float32),
    }
    if plan.per_key:
        outputs["d_decay"] = inputs["decay"].shape, jnp.float32
    chunks = tiles.block // tiles.chunk
    scratch = {"states": pltpu.VMEM((chunks + 1, tiles.heads, *state[2:]), plan.dtype)}
    if plan.inner > 1:
        for name in ("dq_sum", "dk_sum"):
            scratch[name] = pltpu.VMEM((tiles.block, plan.key_dim), jnp.float32)
    return _call(plan, backward_kernel, inputs, outputs, scratch, reverse=True)


def _call(plan, kernel, inputs, outputs, scratch=None, reverse=False):
    scratch = scratch or {}
    names = [*inputs, *outputs, *scratch]
    results = pl.pallas_call(
        functools.partial(_with_names, kernel, plan, names),
        grid=(plan.batch, plan.outer, plan.blocks, plan.inner),
        in_specs=[_block(plan, name, array.shape, reverse) for name, array in inputs.items()],
        out_specs=[_block(plan, name, shape, reverse) for name, (shape, _) in outputs.items()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=plan.interpret,
        name=f"delta_rule_{'per_key' if plan.per_key else 'scalar'}_{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _with_names(kernel, plan, names, *refs):
    kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True))))


def _block(plan, name, shape, reverse):
    """The block of an operand that a step sees, by what the operand is."""
    tiles = plan.tiles

    def time(n):
        return plan.blocks - 1 - n if reverse else n

    def step(p, s):
        return p * plan.inner + s

    if name in ("q", "k", "dq", "dk"):
        return pl.BlockSpec((None, tiles.block, plan.step_groups * plan.key_dim), lambda b, p, n, s: (b, time(n), p))
    if name in ("v", "out", "d_out", "dv", "error", "decay", "d_decay"):
        width = tiles.heads * (plan.key_dim if "decay" in name else plan.value_dim)
        return pl.BlockSpec((None, tiles.block, width), lambda b, p, n, s: (b, time(n), step(p, s)))
    if name == "resolvent":
        block = (None, tiles.block // TILE * tiles.chunk, tiles.heads * TILE)
        return pl.BlockSpec(block, lambda b, p, n, s: (b, time(n), step(p, s)))
    if name in ("rows", "changes"):
        return pl.BlockSpec((None, None, shape[2], tiles.block), lambda b, p, n, s: (b, step(p, s), 0, time(n)))
    if name == "kept":
        return pl.BlockSpec((None, None, tiles.heads, *shape[3:]), lambda b, p, n, s: (b, time(n), step(p, s), 0, 0))
    # States and their kin: of all heads of the inner axis, in place for the whole sequence.
    return pl.BlockSpec((None, plan.inner * tiles.heads, *shape[2:]), lambda b, p, n, s: (b, p, 0, 0))
