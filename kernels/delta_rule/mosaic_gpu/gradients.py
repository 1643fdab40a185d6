"""What U adds to the gradients of k, of beta and of the decay: a block of threads for each chunk, head and 64 keys.

    gradients      scalar decays: all of it
    products       decays per key: sums over V, for
    key_gradients  decays per key: the levels, as linear attention's

Arrays as in keys.py and sweeps.py. dk [B, T, H, K] bfloat16 comes in as linear attention's.
"""

from types import SimpleNamespace

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_gpu import chunk
from kernels.delta_rule.mosaic_gpu.keys import staged, stages
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Plan, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, PerKey, Scalar
from kernels.linear_attention.mosaic_gpu.launch import decay_inputs, indices, masks, store, turns

PRODUCT_TILES = ("d_y_tile", "u_tile", "v_tile", "state_tile")


def _product_fetches(plan):
    fetches = Fetches(min(2, plan.value_dim // CHUNK))
    for name in PRODUCT_TILES:
        fetches.tile(name, CHUNK, CHUNK)
    return fetches


def _sum_products(plan, fetches, refs, sequence, n, block):
    """`chunk.Products` of a chunk and 64 keys."""
    batch, head, _ = indices(plan, sequence)
    tokens, rows = pl.ds(n * CHUNK, CHUNK), pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)

    def fetch(turn):
        values = pl.ds(turn * CHUNK, CHUNK)
        tiles = {f"{x}_tile": getattr(refs, x).at[batch, tokens, head, values] for x in ("d_y", "u", "v")}
        tiles["state_tile"] = refs.states.at[sequence, rows, values]
        fetches.start(refs, turn, tiles)

    sums = None
    for tiles in turns(plan.value_dim // CHUNK, fetches, refs, fetch):
        sums = chunk.add_products(plan.machine(), sums, *(tiles[name] for name in PRODUCT_TILES))
    return sums


def gradients(
    plan: Plan, k: Array, v: Array, beta: Array, decay: Array, d_y: Array, u: Array, states: Array, dk: Array
) -> tuple[Array, Array, Array]:
    """dk with what U adds; and of 64 keys each, [K / 64, B H, T] float32: dbeta, and what the decay's gradient sums
    from a token on."""
    inputs = {
        "k": k, "v": v, "beta": beta, "decay": decay, "d_y": d_y, "u": u, "states": states, "dk_before": dk,
    }  # fmt: skip
    fetches, once = _product_fetches(plan), Fetches(barrier="once")
    for name in ("k_tile", "dk_tile"):
        once.tile(name, CHUNK, CHUNK)
    once.vector("beta_rows", "sums", "read_gate")
    scratch = {"row_sums": plgpu.SMEM((2, CHUNK), jnp.float32), **stages(2), **fetches.scratch(), **once.scratch()}

    def body(refs, sequence, n, block):
        batch, head, group = indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        copies = {
            "k_tile": refs.k.at[batch, tokens, group, keys],
            "dk_tile": refs.dk_before.at[batch, tokens, head, keys],
            "beta_rows": refs.beta.at[sequence, tokens],
            "sums": refs.decay.at[0, sequence, tokens],
            "read_gate": refs.decay.at[1, sequence, tokens],
        }
        once.start(refs, 0, copies)
        sums = _sum_products(plan, fetches, refs, sequence, n, block)
        tiles = SimpleNamespace(**once.wait(refs, 0))
        m, reads = plan.machine(*staged(refs, 2)), Scalar(tiles.sums, tiles.read_gate)
        dk, d_beta, changes = chunk.key_gradients(m, reads, tiles.beta_rows, tiles.k_tile, tiles.dk_tile, sums)
        refs.row_sums[0] = d_beta + jnp.where(block == 0, sums.values, 0.0)
        refs.row_sums[1] = changes
        store(dk, refs.stage_0, refs.dk.at[batch, tokens, head, keys])
        for i, target in enumerate((refs.d_beta, refs.changes)):
            plgpu.copy_smem_to_gmem(refs.row_sums.at[i], target.at[block, sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    vectors = (plan.key_tiles, plan.sequences, plan.time)
    outputs = {"dk": (dk.shape, jnp.bfloat16), "d_beta": (vectors, jnp.float32), "changes": (vectors, jnp.float32)}
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "dk").values())


def products(plan: Plan, v: Array, d_y: Array, u: Array, states: Array) -> tuple[Array, Array, Array]:
    """dY U^T [B H, T, 64] and dY S^T [B, T, H, K], bfloat16; the sum over V of dY and v, [B H, T] float32."""
    inputs = {"v": v, "d_y": d_y, "u": u, "states": states}
    fetches = _product_fetches(plan)
    scratch = {"row_sums": plgpu.SMEM((CHUNK,), jnp.float32), **stages(2), **fetches.scratch()}

    def body(refs, sequence, n, block):
        batch, head, _ = indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        sums = _sum_products(plan, fetches, refs, sequence, n, block)
        store(sums.read, refs.stage_0, refs.read.at[batch, tokens, head, keys])

        @pl.when(block == 0)  # they are the same for all keys
        def _():
            refs.row_sums[...] = sums.values
            store(sums.pairs, refs.stage_1, refs.pairs.at[sequence, tokens])
            plgpu.copy_smem_to_gmem(refs.row_sums, refs.values.at[sequence, tokens])

        plgpu.wait_smem_to_gmem(0)

    outputs = {
        "pairs": ((plan.sequences, plan.time, CHUNK), jnp.bfloat16),
        "read": ((*v.shape[:3], plan.key_dim), jnp.bfloat16),
        "values": ((plan.sequences, plan.time), jnp.float32),
    }
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "correction_products").values())


def key_gradients(
    plan: Plan, k: Array, beta: Array, decay: tuple[Array, Array], pairs: Array, read: Array, dk: Array, d_g: Array
) -> tuple[Array, Array, Array]:
    """dk and dg with what U adds; and dbeta without the sum over V, [K / 64, B H, T] float32, of 64 keys each.

    pairs, read: of `products`; d_g [B, T, H, K] float32: linear attention's.
    """
    inputs = {
        "k": k, "beta": beta, **decay_inputs(plan, decay), "pairs": pairs, "read": read, "dk_before": dk,
        "d_g_before": d_g,
    }  # fmt: skip
    fetches = Fetches()
    for name in ("k", "high", "low", "pairs", "read", "dk"):
        fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    fetches.vector("beta_rows")
    scratch = {"row_sums": plgpu.SMEM((CHUNK,), jnp.float32), **stages(3), **masks(plan), **fetches.scratch()}

    def body(refs, sequence, n, block):
        batch, head, group = indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        of_head = batch, tokens, head, keys
        copies = {
            "k_tile": refs.k.at[batch, tokens, group, keys],
            **{f"{name}_tile": getattr(refs, name).at[of_head] for name in ("high", "low", "read")},
            "pairs_tile": refs.pairs.at[sequence, tokens],
            "dk_tile": refs.dk_before.at[of_head],
            "beta_rows": refs.beta.at[sequence, tokens],
        }
        fetches.start(refs, 0, copies)
        m = plan.machine(*staged(refs, 3), masks=refs.masks)
        tiles = SimpleNamespace(**fetches.wait(refs, 0))
        dk, d_g, d_beta = chunk.key_gradients_per_key(
            m, PerKey(tiles.high_tile, tiles.low_tile), tiles.beta_rows, tiles.k_tile, tiles.dk_tile,
            tiles.pairs_tile, tiles.read_tile, refs.d_g_before.at[of_head],
        )  # fmt: skip
        refs.d_g[of_head] = d_g
        refs.row_sums[...] = d_beta
        store(dk, refs.stage_0, refs.dk.at[of_head])
        plgpu.copy_smem_to_gmem(refs.row_sums, refs.d_beta.at[block, sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    outputs = {
        "dk": (dk.shape, jnp.bfloat16),
        "d_g": (d_g.shape, jnp.float32),
        "d_beta": ((plan.key_tiles, plan.sequences, plan.time), jnp.float32),
    }
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "dk").values())
