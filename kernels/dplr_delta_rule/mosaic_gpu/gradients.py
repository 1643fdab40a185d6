"""The gradients of what a chunk makes of its keys: a block of threads for each chunk, head and 64 keys.

    pair_products      sums over V, for all keys: of the scores
    state_products     sums over V: of what reads the state before the chunk, and writes into the one after it
    reader_gradients   the levels: dq, da
    writer_gradients   the levels once more: db, dk, and the gradient of the log-decays

Arrays as in keys.py and sweeps.py. The last two are apart because a thread has registers for the sums of two.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_gpu.keys import staged, stages
from kernels.dplr_delta_rule.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Plan, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, PerKey
from kernels.linear_attention.mosaic_gpu.launch import decay_inputs, indices, masks, store, turns
from kernels.mosaic_gpu import shared_tile

VALUES = ("d_out", "e", "u", "v")
KEYS = ("q", "a", "b", "k")


def _product_fetches(plan, names):
    fetches = Fetches(min(2, plan.value_dim // CHUNK))
    for name in names:
        fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    return fetches


def pair_products(plan: Plan, u: Array, v: Array, d_out: Array, e: Array) -> Array:
    """dP_b, dP_k (with the scale), dA_b, dA_k, [4, B H, T, 64] bfloat16."""
    inputs = dict(zip(VALUES, (d_out, e, u, v), strict=True))
    fetches = _product_fetches(plan, VALUES)

    def body(refs, sequence, n, block):
        del block
        batch, head, _ = indices(plan, sequence)
        tokens, m = pl.ds(n * CHUNK, CHUNK), plan.machine()

        def fetch(turn):
            wide = batch, tokens, head, pl.ds(turn * CHUNK, CHUNK)
            fetches.start(refs, turn, {f"{name}_tile": getattr(refs, name).at[wide] for name in VALUES})

        sums = None
        for tiles in turns(plan.value_dim // CHUNK, fetches, refs, fetch):
            d_out, e, u, v = (tiles[f"{name}_tile"] for name in VALUES)
            sums = chunk.add_products(m, sums, (d_out, e), (u, v))
        for i, (x, scale) in enumerate(zip(sums, (plan.scale, plan.scale, 1.0, 1.0), strict=True)):
            store(scale * x, refs.results.at[i], refs.pairs.at[i, sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    outputs = {"pairs": ((4, plan.sequences, plan.time, CHUNK), jnp.bfloat16)}
    scratch = {"results": shared_tile(4, CHUNK, CHUNK), **fetches.scratch()}
    return launch(plan, body, inputs, outputs, scratch, (plan.sequences, plan.chunks, 1), "pair_products")["pairs"]


def state_products(
    plan: Plan, u: Array, v: Array, d_out: Array, e: Array, states: Array, d_states: Array
) -> tuple[Array, Array]:
    """do S^T (with the scale), E S^T, U R^T, V R^T, [4, B, T, H, K] bfloat16; and sum_V S R, [B H, N K] float32."""
    inputs = dict(zip(VALUES, (d_out, e, u, v), strict=True)) | {"states": states, "d_states": d_states}
    fetches = _product_fetches(plan, inputs)

    def body(refs, sequence, n, block):
        batch, head, _ = indices(plan, sequence)
        tokens, m = pl.ds(n * CHUNK, CHUNK), plan.machine()
        rows = pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)

        def fetch(turn):
            values = pl.ds(turn * CHUNK, CHUNK)
            copies = {f"{name}_tile": getattr(refs, name).at[batch, tokens, head, values] for name in VALUES}
            copies["states_tile"] = refs.states.at[sequence, rows, values]
            copies["d_states_tile"] = refs.d_states.at[sequence, rows, values]
            fetches.start(refs, turn, copies)

        reads = writes = later = None
        for tiles in turns(plan.value_dim // CHUNK, fetches, refs, fetch):
            d_out, e, u, v, state, d_state = (tiles[f"{name}_tile"] for name in inputs)
            reads = chunk.add_products(m, reads, (d_out, e), (state,))
            writes = chunk.add_products(m, writes, (u, v), (d_state,))
            new = jnp.sum(m.load(state) * m.load(d_state), axis=1)
            later = new if later is None else later + new
        refs.row_sums[...] = later
        for i, (x, scale) in enumerate(zip((*reads, *writes), (plan.scale, 1.0, 1.0, 1.0), strict=True)):
            target = refs.products.at[i, batch, tokens, head, pl.ds(block * CHUNK, CHUNK)]
            store(scale * x, refs.results.at[i], target)
        plgpu.copy_smem_to_gmem(refs.row_sums, refs.later.at[sequence, rows])
        plgpu.wait_smem_to_gmem(0)

    outputs = {
        "products": ((4, *v.shape[:3], plan.key_dim), jnp.bfloat16),
        "later": ((plan.sequences, plan.chunks * plan.key_dim), jnp.float32),
    }
    scratch = {
        "results": shared_tile(4, CHUNK, CHUNK),
        "row_sums": plgpu.SMEM((CHUNK,), jnp.float32),
        **fetches.scratch(),
    }
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "state_products").values())


class _Levels:
    """What both kernels of levels fetch: tiles of 64 keys of KEYS, of the log-decay and of two of the products, and the
    four of pairs."""

    def __init__(
        self, plan: Plan, keys: Sequence[Array], decay: tuple[Array, Array], pairs: Array, products: Array, vectors=()
    ):
        self.plan = plan
        self.inputs = {**dict(zip(KEYS, keys, strict=True)), **decay_inputs(plan, decay)}
        self.of_keys = tuple(self.inputs)
        self.inputs |= {"pairs": pairs, "products": products}
        self.fetches = Fetches()
        for name in (*self.of_keys, *(f"pairs_{i}" for i in range(4)), *(f"products_{i}" for i in range(2))):
            self.fetches.tile(f"{name}_tile", CHUNK, CHUNK)
        self.fetches.vector(*vectors)

    def scratch(self):
        return stages(6) | masks(self.plan) | self.fetches.scratch()

    def fetch(self, refs, sequence, n, block, first, copies):
        """The arrays of all heads at this one, and products from the `first` on, beside what `copies` has."""
        batch, head, _ = indices(self.plan, sequence)
        of_head = batch, pl.ds(n * CHUNK, CHUNK), head, pl.ds(block * CHUNK, CHUNK)
        copies = copies | {f"{name}_tile": getattr(refs, name).at[of_head] for name in self.of_keys}
        for i in range(4):
            copies[f"pairs_{i}_tile"] = refs.pairs.at[i, sequence, pl.ds(n * CHUNK, CHUNK)]
        for i in range(2):
            copies[f"products_{i}_tile"] = refs.products.at[first + i, *of_head]
        self.fetches.start(refs, 0, copies)
        return of_head

    def wait(self, refs):
        """All tiles, and those that chunk.py's functions take first: the decay, KEYS, pairs and products."""
        tiles = self.fetches.wait(refs, 0)
        decay = PerKey(tiles["high_tile"], tiles["low_tile"])
        pairs = [tiles[f"pairs_{i}_tile"] for i in range(4)]
        return tiles, (
            decay,
            *(tiles[f"{name}_tile"] for name in KEYS),
            pairs,
            [tiles[f"products_{i}_tile"] for i in range(2)],
        )


def reader_gradients(
    plan: Plan, keys: Sequence[Array], decay: tuple[Array, Array], pairs: Array, products: Array
) -> tuple[Array, Array, Array]:
    """dq, da [B, T, H, K] bfloat16, and what they add to dg, float32; keys: q, a, b, k."""
    levels = _Levels(plan, keys, decay, pairs, products)

    def body(refs, sequence, n, block):
        of_head = levels.fetch(refs, sequence, n, block, 0, {})
        m = plan.machine(*staged(refs, 6), masks=refs.masks)
        results = chunk.reader_gradients(m, *levels.wait(refs)[1])
        for stage, target in ((refs.stage_4, refs.da), (refs.stage_5, refs.dq)):
            store(next(results), stage, target.at[of_head])
        refs.changes[of_head] = next(results)
        plgpu.wait_smem_to_gmem(0)

    shape = products.shape[1:]
    outputs = {"dq": (shape, jnp.bfloat16), "da": (shape, jnp.bfloat16), "changes": (shape, jnp.float32)}
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, levels.inputs, outputs, levels.scratch(), grid, "dq_da").values())


def writer_gradients(
    plan: Plan,
    keys: Sequence[Array],
    decay: tuple[Array, Array],
    pairs: Array,
    products: Array,
    later: Array,
    changes: Array,
) -> tuple[Array, Array, Array]:
    """db, dk [B, T, H, K] bfloat16, and dg, float32, with the `changes` of what reads.

    later [B H, N K] float32: e^total sum_V S R.
    """
    levels = _Levels(plan, keys, decay, pairs, products, vectors=("later_tile",))

    def body(refs, sequence, n, block):
        later = refs.later.at[sequence, pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)]
        of_head = levels.fetch(refs, sequence, n, block, 2, {"later_tile": later})
        m = plan.machine(*staged(refs, 6), masks=refs.masks)
        tiles, operands = levels.wait(refs)
        results = chunk.writer_gradients(m, *operands, tiles["later_tile"], refs.changes.at[of_head])
        for stage, target in ((refs.stage_4, refs.db), (refs.stage_5, refs.dk)):
            store(next(results), stage, target.at[of_head])
        refs.d_g[of_head] = next(results)
        plgpu.wait_smem_to_gmem(0)

    shape = products.shape[1:]
    outputs = {"db": (shape, jnp.bfloat16), "dk": (shape, jnp.bfloat16), "d_g": (shape, jnp.float32)}
    inputs = levels.inputs | {"later": later, "changes": changes}
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, levels.scratch(), grid, "db_dk").values())
