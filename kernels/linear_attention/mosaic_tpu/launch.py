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
from kernels.linear_attention.mosaic_tpu.bodies import backward_kernel, forward_kernel
from kernels.linear_attention.mosaic_tpu.plan import Plan

VMEM_LIMIT = 100 * 2**20  # bytes; of 128 MiB on v5e and v6e


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
    if plan.inner > 1:
        for name in ("dq_sum", "dk_sum"):
            scratch[name] = pltpu.VMEM((tiles.block, plan.key_dim), jnp.float32)
    if plan.per_key:
        scratch["sums"] = pltpu.VMEM((tiles.block, step_heads * plan.key_dim), jnp.float32)
    return _call(plan, backward_kernel, inputs, outputs, scratch, reverse=True)


def _inputs(plan, **arrays):
    return {name: array for name, array in arrays.items() if array is not None}


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
        name=f"linear_attention_{'per_key' if plan.per_key else 'scalar'}_{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _with_names(kernel, plan, names, *refs):
    kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True))))


def _block(plan, name, shape, reverse):
    """The block of an operand that a step sees, by what the operand is."""
    tiles = plan.tiles
    chunks = tiles.block // tiles.chunk

    def time(n):
        return plan.blocks - 1 - n if reverse else n

    def step(p, s):
        return p * plan.inner + s

    if name in ("q", "k", "dq", "dk"):
        return pl.BlockSpec((None, tiles.block, plan.step_groups * plan.key_dim), lambda b, p, n, s: (b, time(n), p))
    if name in ("v", "out", "d_out", "dv") or (name in ("decay", "d_decay") and plan.per_key):
        width = tiles.heads * (plan.key_dim if "decay" in name else plan.value_dim)
        return pl.BlockSpec((None, tiles.block, width), lambda b, p, n, s: (b, time(n), step(p, s)))
    if name in ("decay", "changes"):
        batch = (lambda b: b) if shape[0] > 1 else (lambda b: 0)
        if name == "decay" and plan.constant:
            return pl.BlockSpec((None, None, *shape[2:]), lambda b, p, n, s: (batch(b), step(p, s), 0, 0, 0))
        block = (None, None, chunks, *shape[3:])
        return pl.BlockSpec(block, lambda b, p, n, s: (batch(b), step(p, s), time(n), 0, 0))
    if name == "starts":
        return pl.BlockSpec((None, chunks, *shape[2:]), lambda b, p, n, s: (b, time(n), 0, 0))
    if name == "kept":
        block = (None, None, tiles.heads, *plan.state_shape)
        return pl.BlockSpec(block, lambda b, p, n, s: (b, time(n), step(p, s), 0, 0))
    if name == "bonus":
        return pl.BlockSpec((tiles.heads, 1, plan.key_dim), lambda b, p, n, s: (step(p, s), 0, 0))
    # States and their kin: of all heads of the inner axis, in place for the whole sequence.
    return pl.BlockSpec((None, plan.inner * tiles.heads, *shape[2:]), lambda b, p, n, s: (b, p, 0, 0))
