"""The sweeps over chunks: a block of threads for each sequence, head and 64 values, all keys of the state in registers.

    sweep      from left to right: U, S'
    pull       from right to left: E, R'
    read       all chunks at once: out of q, U, v and S; or dv of k, do, E and R

They read q, k, a and b with their decays (`gated` of delta_rule), [B, T, H, K], and what keys.py makes of them; U and E
[B, T, H, V] bfloat16.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_gpu.chunk import Inverse
from kernels.delta_rule.mosaic_gpu.keys import staged, stages
from kernels.delta_rule.mosaic_gpu.sweeps import HALVES, Chunks, next_state
from kernels.dplr_delta_rule.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Plan, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK
from kernels.linear_attention.mosaic_gpu.launch import indices, store

GATED = ("q_read", "a_before", "b_write", "k_write")


def sweep(
    plan: Plan, gated: dict[str, Array], v: Array, a_k: Array, inverses: Array, totals: Array, start: Array
) -> tuple[Array, Array, Array]:
    """U, the states before each chunk, and the state after the last, [B H, K, V] float32, as `start` is."""
    keys = ("a_before", "b_write", "k_write")
    inputs = {name: gated[name] for name in keys} | {"v": v, "a_k": a_k}
    inputs |= {"inverses": inverses, "totals": totals, "start": start}
    chunks = Chunks(plan, keys, ("v_tile", "a_k_tile"), others=2)

    def body(refs, sequence, part, block):
        del part
        batch, head, _ = indices(plan, sequence)
        values = pl.ds(block * CHUNK, CHUNK)
        m = plan.machine(*staged(refs, 2))

        def tokens(n):
            return batch, pl.ds(n * CHUNK, CHUNK), head, values

        def fetch(n):
            pairs = refs.a_k.at[sequence, pl.ds(n * CHUNK, CHUNK)]
            chunks.fetch(refs, sequence, n, n, {"v_tile": refs.v.at[tokens(n)], "a_k_tile": pairs})

        def step(n, state):
            chunks.keep(m, refs, state, refs.states, sequence, n, values)
            found = chunks.wait(refs, n)
            inverse = Inverse(*(found[name] for name in HALVES))
            v = found["v_tile"]
            u = m.stage(chunk.correct(m, inverse, found["a_before"], found["a_k_tile"], v, chunks.kept(refs)))
            plgpu.copy_smem_to_gmem(u, refs.u.at[tokens(n)])
            return next_state(m, state, found["total"], (found["b_write"], u), (found["k_write"], v))

        chunks.sweep(refs, sequence, values, fetch, step)

    outputs = {
        "u": (v.shape, jnp.bfloat16),
        "states": (plan.states_shape, jnp.bfloat16),
        "end": (start.shape, jnp.float32),
    }
    grid, scratch = (plan.sequences, 1, plan.value_dim // CHUNK), stages(2) | chunks.scratch()
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "corrections").values())


def pull(
    plan: Plan, gated: dict[str, Array], d_out: Array, q_b: Array, inverses: Array, totals: Array, start: Array
) -> tuple[Array, Array, Array]:
    """E, the gradients of the states after each chunk, and that of the first, as `start`, that of the last."""
    keys = ("q_read", "a_before", "b_write")
    inputs = {name: gated[name] for name in keys} | {"d_out": d_out, "q_b": q_b}
    inputs |= {"inverses": inverses, "totals": totals, "start": start}
    chunks = Chunks(plan, keys, ("d_out_tile", "q_b_tile"), others=2)

    def body(refs, sequence, part, block):
        del part
        batch, head, _ = indices(plan, sequence)
        values = pl.ds(block * CHUNK, CHUNK)
        m = plan.machine(*staged(refs, 2))

        def tokens(n):
            return batch, pl.ds(n * CHUNK, CHUNK), head, values

        def fetch(turn):
            n = plan.chunks - 1 - turn
            pairs = refs.q_b.at[sequence, pl.ds(n * CHUNK, CHUNK)]
            chunks.fetch(refs, sequence, turn, n, {"d_out_tile": refs.d_out.at[tokens(n)], "q_b_tile": pairs})

        def step(turn, d_state):
            n = plan.chunks - 1 - turn
            chunks.keep(m, refs, d_state, refs.d_states, sequence, n, values)
            found = chunks.wait(refs, turn)
            inverse = Inverse(*(found[name] for name in HALVES))
            d_out = found["d_out_tile"]
            e = m.stage(chunk.pull(m, inverse, found["b_write"], found["q_b_tile"], d_out, chunks.kept(refs)))
            plgpu.copy_smem_to_gmem(e, refs.e.at[tokens(n)])
            return next_state(m, d_state, found["total"], (found["q_read"], d_out), (found["a_before"], e))

        chunks.sweep(refs, sequence, values, fetch, step)

    outputs = {
        "e": (d_out.shape, jnp.bfloat16),
        "d_states": (plan.states_shape, jnp.bfloat16),
        "end": (start.shape, jnp.float32),
    }
    grid, scratch = (plan.sequences, 1, plan.value_dim // CHUNK), stages(2) | chunks.scratch()
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "corrections_reverse").values())


def read(plan: Plan, reverse: bool, x: Array, pairs: Sequence[Array], values: Sequence[Array], states: Array) -> Array:
    """[B, T, H, V] bfloat16: out, of q_read, (P_b, P_k), (U, v) and S; in reverse dv, of k_write, (P_k, A_k), (do, E)
    and R."""
    inputs = {"x": x, "states": states}
    for i in range(2):
        inputs |= {f"pairs_{i}": pairs[i], f"wide_{i}": values[i]}
    fetches = Fetches()
    fetches.tile("x_tiles", plan.key_tiles, CHUNK, CHUNK)
    fetches.tile("state_tiles", plan.key_tiles, CHUNK, plan.width)
    for i in range(2):
        fetches.tile(f"pairs_{i}_tile", CHUNK, CHUNK)
        fetches.tile(f"wide_{i}_tile", CHUNK, plan.width)

    def body(refs, sequence, n, block):
        batch, head, _ = indices(plan, sequence)
        tokens, values = pl.ds(n * CHUNK, CHUNK), pl.ds(block * plan.width, plan.width)

        def fetch(source, name, *index):
            plgpu.copy_gmem_to_smem(source, getattr(refs, name).at[0, *index], refs.barrier.at[0])

        for i in range(plan.key_tiles):
            fetch(refs.x.at[batch, tokens, head, pl.ds(i * CHUNK, CHUNK)], "x_tiles", i)
            fetch(refs.states.at[sequence, pl.ds(n * plan.key_dim + i * CHUNK, CHUNK), values], "state_tiles", i)
        for name in ("pairs_0", "pairs_1"):
            fetch(getattr(refs, name).at[sequence, tokens], f"{name}_tile")
        for name in ("wide_0", "wide_1"):
            fetch(getattr(refs, name).at[batch, tokens, head, values], f"{name}_tile")
        m = plan.machine()
        tiles = fetches.wait(refs, 0)
        x, state = ([tiles[name].at[i] for i in range(plan.key_tiles)] for name in ("x_tiles", "state_tiles"))
        pairs, wide = ([tiles[f"{name}_{i}_tile"] for i in range(2)] for name in ("pairs", "wide"))
        pairs = map(m.transposed, pairs) if reverse else pairs
        result = m.dots(None, *zip(x, state, strict=True), *zip(pairs, wide, strict=True))
        store(result, wide[0], refs.out.at[batch, tokens, head, values])
        plgpu.wait_smem_to_gmem(0)

    outputs = {"out": (values[0].shape, jnp.bfloat16)}
    grid = (plan.sequences, plan.chunks, plan.value_blocks)
    return launch(plan, body, inputs, outputs, fetches.scratch(), grid, "dv" if reverse else "out")["out"]
