"""Kernels of what a chunk makes of its keys alone, and of its queries: a block of threads for each chunk and head.

    inverse    (I + A)^-1, for both sweeps
    scores     of scalar decays: of q and k, for the sweep back
    gated      of decays per key: q and k times their decays, for the sweeps

Blocks and arrays are those of linear_attention/mosaic_gpu/launch.py; beta [B H, T] float32; scores [B H, T, 64],
inverses [2, B H, T, 64] (what bfloat16 holds of them, and the rest) and what is gated, [B, T, H, K], bfloat16.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Plan, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, PerKey, Scalar
from kernels.linear_attention.mosaic_gpu.launch import decay_inputs, indices, masks, store, turns
from kernels.mosaic_gpu import shared_tile


def stages(count: int) -> dict:
    """Scratch of `staged`."""
    return {f"stage_{i}": shared_tile(CHUNK, CHUNK) for i in range(count)}


def staged(refs: SimpleNamespace, count: int) -> list:
    return [getattr(refs, f"stage_{i}") for i in range(count)]


def inverse(plan: Plan, k: Array, beta: Array, decay: Array | tuple[Array, Array]) -> Array:
    inputs = {"k": k, "beta": beta, **decay_inputs(plan, decay)}
    of_keys = ("k", "high", "low") if plan.per_key else ("k",)
    fetches, once = Fetches(min(2, plan.key_tiles)), Fetches(barrier="once")
    for name in of_keys:
        fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    once.vector("beta_rows", *(() if plan.per_key else ("sums",)))
    scratch = stages(6) | fetches.scratch() | once.scratch()

    def body(refs, sequence, n, block):
        del block
        batch, head, group = indices(plan, sequence)
        tokens = pl.ds(n * CHUNK, CHUNK)
        copies = {"beta_rows": refs.beta.at[sequence, tokens]}
        if not plan.per_key:
            copies["sums"] = refs.decay.at[0, sequence, tokens]
        once.start(refs, 0, copies)

        def fetch(turn):
            keys = pl.ds(turn * CHUNK, CHUNK)
            sources = {x: getattr(refs, x).at[batch, tokens, group if x == "k" else head, keys] for x in of_keys}
            fetches.start(refs, turn, {f"{name}_tile": source for name, source in sources.items()})

        m, pairs = plan.machine(*staged(refs, 2)), None
        for tiles in turns(plan.key_tiles, fetches, refs, fetch):
            k = tiles["k_tile"]
            if plan.per_key:
                pairs = chunk.add_pairs_per_key(m, PerKey(tiles["high_tile"], tiles["low_tile"]), k, pairs)
            else:
                pairs = m.dots(pairs, (k, m.transposed(k)))
        vectors = once.wait(refs, 0)
        decay = None if plan.per_key else Scalar(vectors["sums"], None)
        a = chunk.corrections(m, decay, vectors["beta_rows"], pairs)
        tiles = staged(refs, 6)
        halves = chunk.stage_halves(plan.machine(*tiles[4:]), a)  # so that registers are left for other blocks
        result = chunk.invert(m, plan.machine(*tiles[2:4]), halves)
        for i, half in enumerate(chunk.stage_halves(m, result)):
            plgpu.copy_smem_to_gmem(half, refs.inverses.at[i, sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    outputs = {"inverses": ((2, plan.sequences, plan.time, CHUNK), jnp.bfloat16)}
    return launch(plan, body, inputs, outputs, scratch, (plan.sequences, plan.chunks, 1), "inverse")["inverses"]


def scores(plan: Plan, q: Array, k: Array, decay: Array) -> Array:
    """Of scalar decays, with the scale in them; linear_attention has those of decays per key."""
    inputs = {"q": q, "k": k, "decay": decay}
    fetches, once = Fetches(min(2, plan.key_tiles)), Fetches(barrier="once")
    for name in "qk":
        fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    once.vector("sums")
    scratch = stages(1) | fetches.scratch() | once.scratch()

    def body(refs, sequence, n, block):
        del block
        batch, _, group = indices(plan, sequence)
        tokens = pl.ds(n * CHUNK, CHUNK)
        once.start(refs, 0, {"sums": refs.decay.at[0, sequence, tokens]})

        def fetch(turn):
            keys = pl.ds(turn * CHUNK, CHUNK)
            fetches.start(refs, turn, {f"{x}_tile": getattr(refs, x).at[batch, tokens, group, keys] for x in "qk"})

        m, pairs = plan.machine(), None
        for tiles in turns(plan.key_tiles, fetches, refs, fetch):
            pairs = m.dots(pairs, (tiles["q_tile"], m.transposed(tiles["k_tile"])))
        values = chunk.scores(m, Scalar(once.wait(refs, 0)["sums"], None), plan.scale, pairs)
        store(values, refs.stage_0, refs.scores.at[sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    outputs = {"scores": ((plan.sequences, plan.time, CHUNK), jnp.bfloat16)}
    return launch(plan, body, inputs, outputs, scratch, (plan.sequences, plan.chunks, 1), "scores")["scores"]


GATES = {"read": "upto", "before": "before", "write": "after"}  # by the end of a name: the log-decays that count


def gated(plan: Plan, names: Sequence[str], arrays: dict[str, Array], decay: tuple[Array, Array]) -> dict[str, Array]:
    """By name, as "k_read" or "k_write": the array k, q with the scale in it, times its decays of GATES."""
    inputs = {**arrays, **decay_inputs(plan, decay)}
    fetches = Fetches()
    for name in inputs:
        fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    scratch = stages(len(names)) | masks(plan) | fetches.scratch()

    def body(refs, sequence, n, block):
        batch, head, group = indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        heads = dict.fromkeys(arrays, group) | {"high": head, "low": head}
        fetches.start(refs, 0, {f"{x}_tile": getattr(refs, x).at[batch, tokens, heads[x], keys] for x in inputs})
        m = plan.machine(masks=refs.masks)
        tiles = fetches.wait(refs, 0)
        decay = PerKey(tiles["high_tile"], tiles["low_tile"])
        for name, shared in zip(names, staged(refs, len(names)), strict=True):
            array, gate = name.split("_")
            x = m.load(tiles[f"{array}_tile"]) * (plan.scale if array == "q" else 1.0)
            x = x * jnp.exp(decay.sums(m, m.ones(GATES[gate])))
            store(x, shared, getattr(refs, name).at[batch, tokens, head, keys])
        plgpu.wait_smem_to_gmem(0)

    shape = (plan.batch, plan.time, plan.heads, plan.key_dim)
    outputs = dict.fromkeys(names, (shape, jnp.bfloat16))
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return launch(plan, body, inputs, outputs, scratch, grid, "gated")
