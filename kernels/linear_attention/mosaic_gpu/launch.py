"""The kernels: which tiles a block of threads loads, and where they lie.

A block is one warpgroup (wgmma's 64 rows). It fetches its tiles by TMA, into shared memory swizzled as wgmma reads it;
latency is hidden by the other blocks of a multiprocessor, and in `sweep` by fetching chunks ahead.

    sweep      (batch x head, part of the time, 64 keys x up to 128 values): chunk after chunk, the state in registers
    scores     (batch x head, chunk): of decays per key, for both `read`s
    read       (batch x head, chunk, up to 128 values): out from q, k, v, S; dv from k, q, do, R
    gradients  (batch x head, chunk, 64 keys): dq, dk, and what the gradient of the decay is a sum of

Per key the last are two: `products`, over V, and `key_gradients`, whose many small steps need other blocks beside them
that hide their latency, and so memory left for those.

Arrays: q, k [B, T, G, K]; v, do [B, T, H, V]; T a multiple of 64, N = T / 64 chunks; K and V multiples of 64. States
[B H, N K, V], scores and pairs [B H, T, 64], bfloat16. Decays, if scalar: [3, B H, T] float32 (sums, e^read, e^write);
per key: high and low, [B, T, H, K] bfloat16. The totals e^total are [B H, N K] either way.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Plan, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK
from kernels.mosaic_gpu import shared_tile

AHEAD = 3  # chunks that a sweep has fetched or is fetching


def indices(plan: Plan, sequence: Array) -> tuple[Array, Array, Array]:
    """Of a sequence: its batch entry, head of v, and head of q and k."""
    batch, head = lax.div(sequence, jnp.int32(plan.heads)), lax.rem(sequence, jnp.int32(plan.heads))
    return batch, head, lax.div(head, jnp.int32(plan.heads // plan.groups))


def decay_inputs(plan: Plan, decay: Array | tuple[Array, Array]) -> dict[str, Array]:
    return {"high": decay[0], "low": decay[1]} if plan.per_key else {"decay": decay}


def masks(plan: Plan) -> dict[str, Any]:
    return {"masks": shared_tile(2, CHUNK, CHUNK)} if plan.per_key else {}


def sweep(
    plan: Plan,
    reverse: bool,
    x: Array,
    y: Array,
    decay: Array | tuple[Array, Array],
    totals: Array,
    starts: Array | None,
    keep: bool,
) -> tuple[Array | None, ...]:
    """States before each chunk (after it, in reverse), or None, and what each part ends with, [B H P, K, V] float32.

    x, y: k, v (or q, do). starts [B H P, K, V] float32: what each part starts with, at its end in reverse.
    """
    inputs = {"x": x, "y": y, **decay_inputs(plan, decay), "totals": totals, "starts": starts}
    outputs = {"ends": (starts.shape, jnp.float32)}
    scratch = {}
    if keep:
        outputs["states"] = (plan.states_shape, jnp.bfloat16)
        scratch["kept"] = shared_tile(CHUNK, plan.width)
    fetches = Fetches(AHEAD)
    fetches.tile("x_tile", CHUNK, CHUNK)
    fetches.tile("y_tile", CHUNK, plan.width)
    if plan.per_key:
        fetches.tile("high_tile", CHUNK, CHUNK)
        fetches.tile("low_tile", CHUNK, CHUNK)
    else:
        fetches.vector("gate")
    fetches.vector("total")
    scratch |= {"stage": shared_tile(CHUNK, CHUNK), **masks(plan), **fetches.scratch()}

    def body(refs, sequence, part, block):
        batch, head, group = indices(plan, sequence)
        key_tile, value_block = (f(block, jnp.int32(plan.value_blocks)) for f in (lax.div, lax.rem))
        keys, values = pl.ds(key_tile * CHUNK, CHUNK), pl.ds(value_block * plan.width, plan.width)
        first = part * plan.part_chunks
        count = jnp.minimum(plan.part_chunks, plan.chunks - first)
        m = plan.machine(refs.stage, masks=getattr(refs, "masks", None))

        def chunk_index(i):
            return first + (count - 1 - i if reverse else i)

        def fetch(i):
            n = chunk_index(i)
            tokens, rows = pl.ds(n * CHUNK, CHUNK), pl.ds(n * plan.key_dim + key_tile * CHUNK, CHUNK)
            copies = {"x_tile": refs.x.at[batch, tokens, group, keys], "y_tile": refs.y.at[batch, tokens, head, values]}
            if plan.per_key:
                copies["high_tile"] = refs.high.at[batch, tokens, head, keys]
                copies["low_tile"] = refs.low.at[batch, tokens, head, keys]
            else:
                copies["gate"] = refs.decay.at[1 if reverse else 2, sequence, tokens]
            copies["total"] = refs.totals.at[sequence, rows]
            fetches.start(refs, i, copies)

        for i in range(AHEAD):
            pl.when(i < count)(lambda i=i: fetch(jnp.int32(i)))

        def step(i, state):
            n = chunk_index(i)
            if keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            else:
                plgpu.commit_smem()
            # Either is a barrier: all warps are done with the chunk before, whose slot is free.
            pl.when((i > 0) & (i - 1 + AHEAD < count))(lambda: fetch(i - 1 + AHEAD))
            if keep:
                refs.kept[...] = m.half(state)
                plgpu.commit_smem()
                rows = pl.ds(n * plan.key_dim + key_tile * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(refs.kept, refs.states.at[sequence, rows, values])
            tiles = SimpleNamespace(**fetches.wait(refs, i))
            if plan.per_key:
                tile_decay = chunk.PerKey(tiles.high_tile, tiles.low_tile)
            else:
                tile_decay = chunk.Scalar(None, tiles.gate)
            x, y, total = tiles.x_tile, tiles.y_tile, tiles.total
            return chunk.update(m, tile_decay, reverse, plan.scale, x, y, total, state)

        index = sequence * plan.parts + part
        state = m.load(refs.starts.at[index, keys, values])
        state = lax.fori_loop(0, count, step, state)
        refs.ends[index, keys, values] = state
        plgpu.wait_smem_to_gmem(0)

    grid = (plan.sequences, plan.parts, plan.key_tiles * plan.value_blocks)
    result = launch(plan, body, inputs, outputs, scratch, grid, "states" + "_reverse" * reverse)
    return result.get("states"), result["ends"]


def scores(plan: Plan, q: Array, k: Array, decay: tuple[Array, Array]) -> Array:
    """A of decays per key, with the scale in it, [B H, T, 64] bfloat16."""
    inputs = {"q": q, "k": k, **decay_inputs(plan, decay)}
    fetches = Fetches(min(2, plan.key_tiles))
    for name in inputs:
        fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    scratch = {"stage": shared_tile(CHUNK, CHUNK), "result": shared_tile(CHUNK, CHUNK), **fetches.scratch()}

    def body(refs, sequence, n, block):
        del block
        batch, head, group = indices(plan, sequence)
        tokens = pl.ds(n * CHUNK, CHUNK)

        def fetch(tile):
            keys = pl.ds(tile * CHUNK, CHUNK)
            heads = {"q": group, "k": group, "high": head, "low": head}
            fetches.start(refs, tile, {f"{x}_tile": getattr(refs, x).at[batch, tokens, heads[x], keys] for x in inputs})

        m, values = plan.machine(refs.stage), None
        for tile in turns(plan.key_tiles, fetches, refs, fetch):
            q_tile, k_tile, high, low = (tile[f"{x}_tile"] for x in inputs)
            values = chunk.scores(m, chunk.PerKey(high, low), q_tile, k_tile, values)
        store(plan.scale * values, refs.result, refs.scores.at[sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    outputs = {"scores": ((plan.sequences, plan.time, CHUNK), jnp.bfloat16)}
    return launch(plan, body, inputs, outputs, scratch, (plan.sequences, plan.chunks, 1), "scores")["scores"]


def read(
    plan: Plan, reverse: bool, x: Array, y: Array, w: Array, decay: Array | tuple[Array, Array], states: Array
) -> Array:
    """out [B, T, H, V] from q, k, v and S; in reverse dv from k, q, do and R. bfloat16. Per key, y is the scores."""
    inputs = {"x": x, "y": y, "w": w, **decay_inputs(plan, decay), "states": states}
    tiles = plan.key_tiles
    fetches = Fetches()
    for name in ("x_tiles", *(("high_tiles", "low_tiles") if plan.per_key else ("y_tiles",))):
        fetches.tile(name, tiles, CHUNK, CHUNK)
    fetches.tile("state_tiles", tiles, CHUNK, plan.width)
    fetches.tile("w_tile", CHUNK, plan.width)
    if plan.per_key:
        fetches.tile("scores", CHUNK, CHUNK)
    else:
        fetches.vector("sums", "gate")
    scratch = {"stage": shared_tile(CHUNK, CHUNK), **masks(plan), **fetches.scratch()}

    def body(refs, sequence, n, block):
        batch, head, group = indices(plan, sequence)
        tokens, values = pl.ds(n * CHUNK, CHUNK), pl.ds(block * plan.width, plan.width)

        def fetch(source, name, *index):
            plgpu.copy_gmem_to_smem(source, getattr(refs, name).at[0, *index], refs.barrier.at[0])

        for i in range(tiles):
            keys = pl.ds(i * CHUNK, CHUNK)
            fetch(refs.x.at[batch, tokens, group, keys], "x_tiles", i)
            if plan.per_key:
                fetch(refs.high.at[batch, tokens, head, keys], "high_tiles", i)
                fetch(refs.low.at[batch, tokens, head, keys], "low_tiles", i)
            else:
                fetch(refs.y.at[batch, tokens, group, keys], "y_tiles", i)
            fetch(refs.states.at[sequence, pl.ds(n * plan.key_dim + i * CHUNK, CHUNK), values], "state_tiles", i)
        fetch(refs.w.at[batch, tokens, head, values], "w_tile")
        if plan.per_key:
            fetch(refs.y.at[sequence, tokens], "scores")
        else:
            fetch(refs.decay.at[0, sequence, tokens], "sums")
            fetch(refs.decay.at[2 if reverse else 1, sequence, tokens], "gate")
        m = plan.machine(refs.stage, masks=getattr(refs, "masks", None))
        plgpu.barrier_wait(refs.barrier.at[0])

        def of_keys(name):
            return [getattr(refs, name).at[0, i] for i in range(tiles)]

        w = refs.w_tile.at[0]
        x, state = map(of_keys, ("x_tiles", "state_tiles"))
        if plan.per_key:
            decays = [chunk.PerKey(*pair) for pair in zip(of_keys("high_tiles"), of_keys("low_tiles"), strict=True)]
            out = chunk.read_per_key(m, decays, reverse, plan.scale, x, refs.scores.at[0], w, state)
        else:
            decay = chunk.Scalar(refs.sums.at[0], refs.gate.at[0])
            out = chunk.read(m, decay, reverse, plan.scale, x, of_keys("y_tiles"), w, state)
        store(out, w, refs.out.at[batch, tokens, head, values])
        plgpu.wait_smem_to_gmem(0)

    outputs = {"out": (w.shape, jnp.bfloat16)}
    grid = (plan.sequences, plan.chunks, plan.value_blocks)
    return launch(plan, body, inputs, outputs, scratch, grid, "dv" if reverse else "out")["out"]


def _sum_products(plan, fetches, refs, sequence, n, block):
    """`chunk.Products` of a chunk and 64 keys, from tiles that `fetches` has room for in two slots."""
    batch, head, _ = indices(plan, sequence)
    tokens, rows = pl.ds(n * CHUNK, CHUNK), pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)

    def fetch(turn):
        values = pl.ds(turn * CHUNK, CHUNK)
        copies = {
            "v_tile": refs.v.at[batch, tokens, head, values],
            "d_out_tile": refs.d_out.at[batch, tokens, head, values],
            "state_tile": refs.states.at[sequence, rows, values],
            "d_state_tile": refs.d_states.at[sequence, rows, values],
        }
        fetches.start(refs, turn, copies)

    sums = None
    for tiles in turns(plan.value_dim // CHUNK, fetches, refs, fetch):
        sums = chunk.add_products(plan.machine(), sums, *(tiles[name] for name in PRODUCT_TILES))
    return sums


PRODUCT_TILES = ("v_tile", "d_out_tile", "state_tile", "d_state_tile")


def _product_fetches(plan):
    fetches = Fetches(min(2, plan.value_dim // CHUNK))
    for name in PRODUCT_TILES:
        fetches.tile(name, CHUNK, CHUNK)
    return fetches


def gradients(
    plan: Plan, q: Array, k: Array, v: Array, d_out: Array, decay: Array, states: Array, d_states: Array
) -> tuple[Array, ...]:
    """Of scalar decays: dq, dk [B, T, H, K] bfloat16, and of the decay's gradient, float32, the two terms
    [K / 64, B H, T] of 64 keys each, from a token on and before it, and sum_V S R [B H, N K]."""
    inputs = {"q": q, "k": k, "v": v, "d_out": d_out, "decay": decay, "states": states, "d_states": d_states}
    fetches, once = _product_fetches(plan), Fetches(barrier="once")
    for name in ("q_tile", "k_tile"):
        once.tile(name, CHUNK, CHUNK)
    once.vector("sums", "read_gate", "write_gate")
    scratch = {
        "stage": shared_tile(CHUNK, CHUNK),
        "result": shared_tile(CHUNK, CHUNK),
        "row_sums": plgpu.SMEM((2, CHUNK), jnp.float32),
        "products_sums": plgpu.SMEM((CHUNK,), jnp.float32),
        **fetches.scratch(),
        **once.scratch(),
    }

    def body(refs, sequence, n, block):
        batch, head, group = indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        copies = {"q_tile": refs.q.at[batch, tokens, group, keys], "k_tile": refs.k.at[batch, tokens, group, keys]}
        for i, name in enumerate(("sums", "read_gate", "write_gate")):
            copies[name] = refs.decay.at[i, sequence, tokens]
        once.start(refs, 0, copies)
        products = _sum_products(plan, fetches, refs, sequence, n, block)
        q_tile, k_tile, sums, read_gate, write_gate = once.wait(refs, 0).values()
        reads, writes = chunk.Scalar(sums, read_gate), chunk.Scalar(sums, write_gate)
        dq, dk, from_here_on, before = chunk.key_gradients(
            plan.machine(refs.stage), reads, writes, plan.scale, q_tile, k_tile, products
        )
        refs.row_sums[0] = from_here_on
        refs.row_sums[1] = before
        refs.products_sums[...] = products.states
        store(dq, refs.result, refs.dq.at[batch, tokens, head, keys])
        plgpu.copy_smem_to_gmem(refs.row_sums.at[0], refs.from_here_on.at[block, sequence, tokens])
        plgpu.copy_smem_to_gmem(refs.row_sums.at[1], refs.before.at[block, sequence, tokens])
        rows = pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(refs.products_sums, refs.products.at[sequence, rows])
        store(dk, refs.stage, refs.dk.at[batch, tokens, head, keys])
        plgpu.wait_smem_to_gmem(0)

    shape, vectors = (*v.shape[:3], plan.key_dim), (plan.key_tiles, plan.sequences, plan.time)
    outputs = {
        "dq": (shape, jnp.bfloat16),
        "dk": (shape, jnp.bfloat16),
        "from_here_on": (vectors, jnp.float32),
        "before": (vectors, jnp.float32),
        "products": ((plan.sequences, plan.chunks * plan.key_dim), jnp.float32),
    }
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "dq_dk").values())


def products(plan: Plan, v: Array, d_out: Array, states: Array, d_states: Array) -> tuple[Array, Array, Array, Array]:
    """Scaled do v^T [B H, T, 64], scaled do S^T and v R^T [B, T, H, K], bfloat16; sum_V S R [B H, N K], float32."""
    inputs = {"v": v, "d_out": d_out, "states": states, "d_states": d_states}
    fetches = _product_fetches(plan)
    scratch = {
        "results": shared_tile(3, CHUNK, CHUNK),
        "products_sums": plgpu.SMEM((CHUNK,), jnp.float32),
        **fetches.scratch(),
    }

    def body(refs, sequence, n, block):
        batch, head, _ = indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        sums = _sum_products(plan, fetches, refs, sequence, n, block)
        refs.products_sums[...] = sums.states
        store(plan.scale * sums.dq, refs.results.at[0], refs.dq.at[batch, tokens, head, keys])
        store(sums.dk, refs.results.at[1], refs.dk.at[batch, tokens, head, keys])
        rows = pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(refs.products_sums, refs.products.at[sequence, rows])

        @pl.when(block == 0)  # they are the same for all keys
        def _():
            store(plan.scale * sums.pairs, refs.results.at[2], refs.pairs.at[sequence, tokens])

        plgpu.wait_smem_to_gmem(0)

    shape = (*v.shape[:3], plan.key_dim)
    outputs = {
        "pairs": ((plan.sequences, plan.time, CHUNK), jnp.bfloat16),
        "dq": (shape, jnp.bfloat16),
        "dk": (shape, jnp.bfloat16),
        "products": ((plan.sequences, plan.chunks * plan.key_dim), jnp.float32),
    }
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "products").values())


def key_gradients(
    plan: Plan, q: Array, k: Array, pairs: Array, dq: Array, dk: Array, decay: tuple[Array, Array], later: Array
) -> tuple[Array, Array, Array]:
    """Of decays per key: dq, dk [B, T, H, K] bfloat16, and the decay's gradient, [B, T, H, K] float32.

    pairs, dq, dk: of `products`; later [B H, N K] float32: e^total sum_V S R.
    """
    inputs = {
        "q": q,
        "k": k,
        **decay_inputs(plan, decay),
        "pairs": pairs,
        "dq_read": dq,
        "dk_written": dk,
        "later": later,
    }
    fetches = Fetches()
    for name in inputs:
        fetches.vector("later_tile") if name == "later" else fetches.tile(f"{name}_tile", CHUNK, CHUNK)
    staged = [f"stage_{i}" for i in range(3)]
    scratch = {name: shared_tile(CHUNK, CHUNK) for name in staged} | masks(plan) | fetches.scratch()

    def body(refs, sequence, n, block):
        batch, head, group = indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        copies = {"q_tile": refs.q.at[batch, tokens, group, keys], "k_tile": refs.k.at[batch, tokens, group, keys]}
        for name in ("high", "low", "dq_read", "dk_written"):
            copies[f"{name}_tile"] = getattr(refs, name).at[batch, tokens, head, keys]
        copies["pairs_tile"] = refs.pairs.at[sequence, tokens]
        copies["later_tile"] = refs.later.at[sequence, pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)]
        fetches.start(refs, 0, copies)
        m = plan.machine(*(getattr(refs, name) for name in staged), masks=refs.masks)
        tiles = SimpleNamespace(**fetches.wait(refs, 0))
        dq, dk, changes = chunk.key_gradients_per_key(
            m, chunk.PerKey(tiles.high_tile, tiles.low_tile), tiles.q_tile, tiles.k_tile,
            tiles.pairs_tile, tiles.dq_read_tile, tiles.dk_written_tile, tiles.later_tile,
        )  # fmt: skip
        refs.changes[batch, tokens, head, keys] = changes
        store(dq, refs.stage_0, refs.dq.at[batch, tokens, head, keys])
        store(dk, refs.stage_1, refs.dk.at[batch, tokens, head, keys])
        plgpu.wait_smem_to_gmem(0)

    shape = (*dq.shape[:3], plan.key_dim)
    outputs = {"dq": (shape, jnp.bfloat16), "dk": (shape, jnp.bfloat16), "changes": (shape, jnp.float32)}
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "dq_dk").values())


def turns(count: int, fetches: Fetches, refs: Any, fetch: Callable[[int], None]) -> Iterator[list[Any]]:
    """The tiles of each turn, once they are there; `fetch(turn)` starts its copies, as many ahead as have slots."""
    for turn in range(min(fetches.slots, count)):
        fetch(turn)
    for turn in range(count):
        yield fetches.wait(refs, turn)
        if turn + fetches.slots < count:
            plgpu.commit_smem()  # all warps are done with the slot
            fetch(turn + fetches.slots)


def store(x: Any, shared: Any, target: Any) -> None:
    plgpu.commit_smem()  # all warps are done with what was there
    shared[...] = x.astype(shared.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, target)
