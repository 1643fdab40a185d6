"""Kernels of what a chunk makes of its keys alone: a block of threads for each chunk and head.

    scores     P_b, P_k with the scale in them
    system     (I - A_b)^-1 and A_k

Arrays as in linear_attention/mosaic_gpu/launch.py, with a head of q, k, a and b for each of v; P_b, P_k and A_k
[B H, T, 64], inverses [2, B H, T, 64] (what bfloat16 holds of one, and the rest), bfloat16.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_gpu.chunk import before, invert, stage_halves
from kernels.delta_rule.mosaic_gpu.keys import staged, stages
from kernels.dplr_delta_rule.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Plan, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, PerKey
from kernels.linear_attention.mosaic_gpu.launch import decay_inputs, indices, store, turns


def _fetches(plan, inputs):
    fetches = Fetches(min(2, plan.key_tiles))
    for name in inputs:
        fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    return fetches


def _over_keys(plan, fetches, refs, inputs, sequence, n, add):
    """After add(decay, *tiles of the other inputs, sums) of each 64 keys, None at first."""
    batch, head, _ = indices(plan, sequence)

    def fetch(turn):
        columns = batch, pl.ds(n * CHUNK, CHUNK), head, pl.ds(turn * CHUNK, CHUNK)
        fetches.start(refs, turn, {f"{name}_tile": getattr(refs, name).at[columns] for name in inputs})

    sums = None
    for tiles in turns(plan.key_tiles, fetches, refs, fetch):
        *keys, high, low = (tiles[f"{name}_tile"] for name in inputs)
        sums = add(PerKey(high, low), *keys, sums)
    return sums


def scores(plan: Plan, q: Array, b: Array, k: Array, decay: tuple[Array, Array]) -> tuple[Array, Array]:
    inputs = {"q": q, "b": b, "k": k, **decay_inputs(plan, decay)}
    fetches = _fetches(plan, inputs)

    def body(refs, sequence, n, block):
        del block
        m = plan.machine(*staged(refs, 2))
        found = _over_keys(plan, fetches, refs, inputs, sequence, n, functools.partial(chunk.add_scores, m))
        staged_scores = m.stage_all(*(plan.scale * x for x in found))
        for shared, target in zip(staged_scores, (refs.q_b, refs.q_k), strict=True):
            plgpu.copy_smem_to_gmem(shared, target.at[sequence, pl.ds(n * CHUNK, CHUNK)])
        plgpu.wait_smem_to_gmem(0)

    outputs = dict.fromkeys(("q_b", "q_k"), ((plan.sequences, plan.time, CHUNK), jnp.bfloat16))
    scratch, grid = stages(2) | fetches.scratch(), (plan.sequences, plan.chunks, 1)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "scores").values())


def system(plan: Plan, a: Array, b: Array, k: Array, decay: tuple[Array, Array]) -> tuple[Array, Array]:
    inputs = {"a": a, "b": b, "k": k, **decay_inputs(plan, decay)}
    fetches = _fetches(plan, inputs)

    def body(refs, sequence, n, block):
        del block
        tokens, tiles = pl.ds(n * CHUNK, CHUNK), staged(refs, 7)
        m = plan.machine(*tiles[:3])
        a_b, a_k = _over_keys(plan, fetches, refs, inputs, sequence, n, functools.partial(chunk.add_system, m))
        store(a_k, tiles[6], refs.a_k.at[sequence, tokens])
        halves = stage_halves(plan.machine(*tiles[4:6]), before(m, -a_b))  # so that registers are left for other blocks
        result = invert(m, plan.machine(*tiles[2:4]), halves)
        for i, half in enumerate(stage_halves(m, result)):
            plgpu.copy_smem_to_gmem(half, refs.inverses.at[i, sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    outputs = {
        "inverses": ((2, plan.sequences, plan.time, CHUNK), jnp.bfloat16),
        "a_k": ((plan.sequences, plan.time, CHUNK), jnp.bfloat16),
    }
    scratch, grid = stages(7) | fetches.scratch(), (plan.sequences, plan.chunks, 1)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "system").values())
