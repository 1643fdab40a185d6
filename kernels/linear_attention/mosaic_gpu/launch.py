"""The kernels: which tiles a block of threads loads, and where they lie.

A block is one warpgroup (wgmma's 64 rows). It fetches its tiles by TMA, into shared memory swizzled as wgmma reads it;
latency is hidden by the other blocks of a multiprocessor, and in `sweep` by fetching chunks ahead.

    sweep      (batch x head, part of the time, 64 keys x up to 128 values): chunk after chunk, the state in registers
    read       (batch x head, chunk, up to 128 values): out from q, k, v, S; dv from k, q, do, R
    gradients  (batch x head, chunk, 64 keys): dq, dk, and what the gradient of the decay is a sum of

Arrays: q, k [B, T, G, K]; v, do [B, T, H, V]; T a multiple of 64, N = T / 64 chunks. States [B H, N K, V], bfloat16.
Decays, if scalar: [3, B H, T] float32 (sums, e^read, e^write); per key: high and low, [B, T, H, K] bfloat16. The totals
e^total are [B H, N K] either way.
"""

from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.linear_attention.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Registers, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK
from kernels.mosaic_gpu import WGMMA, load, shared_tile

AHEAD = 3  # chunks that a sweep has fetched or is fetching


def _indices(plan, sequence):
    batch, head = lax.div(sequence, jnp.int32(plan.heads)), lax.rem(sequence, jnp.int32(plan.heads))
    return batch, head, lax.div(head, jnp.int32(plan.heads // plan.groups))


def _decay_inputs(plan, decay):
    return {"high": decay[0], "low": decay[1]} if plan.per_key else {"decay": decay}


def sweep(plan, reverse, x, y, decay, totals, starts, keep):
    """States before each chunk (after it, in reverse), or None, and what each part ends with, [B H P, K, V] float32.

    x, y: k, v (or q, do). starts [B H P, K, V] float32: what each part starts with, at its end in reverse.
    """
    inputs = {"x": x, "y": y, **_decay_inputs(plan, decay), "totals": totals, "starts": starts}
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
    scratch |= {"stage": shared_tile(CHUNK, CHUNK), **fetches.scratch()}

    def body(refs, sequence, part, block):
        batch, head, group = _indices(plan, sequence)
        key_tile, value_block = (f(block, jnp.int32(plan.value_blocks)) for f in (lax.div, lax.rem))
        keys, values = pl.ds(key_tile * CHUNK, CHUNK), pl.ds(value_block * plan.width, plan.width)
        first = part * plan.part_chunks
        count = jnp.minimum(plan.part_chunks, plan.chunks - first)
        m = Registers(refs.stage)

        def chunk_index(i):
            return first + (count - 1 - i if reverse else i)

        def fetch(i):
            slot, n = lax.rem(i, jnp.int32(AHEAD)), chunk_index(i)
            tokens, rows = pl.ds(n * CHUNK, CHUNK), pl.ds(n * plan.key_dim + key_tile * CHUNK, CHUNK)
            copies = {"x_tile": refs.x.at[batch, tokens, group, keys], "y_tile": refs.y.at[batch, tokens, head, values]}
            if plan.per_key:
                copies["high_tile"] = refs.high.at[batch, tokens, head, keys]
                copies["low_tile"] = refs.low.at[batch, tokens, head, keys]
            else:
                copies["gate"] = refs.decay.at[1 if reverse else 2, sequence, tokens]
            copies["total"] = refs.totals.at[sequence, rows]
            for name, source in copies.items():
                plgpu.copy_gmem_to_smem(source, getattr(refs, name).at[slot], refs.barrier.at[slot])

        for i in range(AHEAD):
            pl.when(i < count)(lambda i=i: fetch(jnp.int32(i)))

        def step(i, state):
            slot, n = lax.rem(i, jnp.int32(AHEAD)), chunk_index(i)
            if keep:
                plgpu.wait_smem_to_gmem(0)
                refs.kept[...] = m.half(state)
                plgpu.commit_smem()
                rows = pl.ds(n * plan.key_dim + key_tile * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(refs.kept, refs.states.at[sequence, rows, values])
            plgpu.barrier_wait(refs.barrier.at[slot])
            if plan.per_key:
                tile_decay = chunk.PerKey(refs.high_tile.at[slot], refs.low_tile.at[slot])
            else:
                tile_decay = chunk.Scalar(None, refs.gate.at[slot])
            x, y, total = (getattr(refs, name).at[slot] for name in ("x_tile", "y_tile", "total"))
            state = chunk.update(m, tile_decay, reverse, plan.scale, x, y, total, state)
            pl.when(i + AHEAD < count)(lambda: fetch(i + AHEAD))
            return state

        index = sequence * plan.parts + part
        state = load(refs.starts.at[index, keys, values], WGMMA)
        state = lax.fori_loop(0, count, step, state)
        refs.ends[index, keys, values] = state
        plgpu.wait_smem_to_gmem(0)

    grid = (plan.sequences, plan.parts, plan.key_tiles * plan.value_blocks)
    result = launch(plan, body, inputs, outputs, scratch, grid, "states" + "_reverse" * reverse)
    return result.get("states"), result["ends"]


def read(plan, reverse, x, y, w, decay, states):
    """out [B, T, H, V] from q, k, v and S; in reverse dv from k, q, do and R. bfloat16."""
    inputs = {"x": x, "y": y, "w": w, **_decay_inputs(plan, decay), "states": states}
    tiles = plan.key_tiles
    fetches = Fetches()
    for name in ("x_tiles", "y_tiles", *(("high_tiles", "low_tiles") if plan.per_key else ())):
        fetches.tile(name, tiles, CHUNK, CHUNK)
    fetches.tile("state_tiles", tiles, CHUNK, plan.width)
    fetches.tile("w_tile", CHUNK, plan.width)
    if not plan.per_key:
        fetches.vector("sums", "gate")
    scratch = {"stage": shared_tile(CHUNK, CHUNK), **fetches.scratch()}

    def body(refs, sequence, n, block):
        batch, head, group = _indices(plan, sequence)
        tokens, values = pl.ds(n * CHUNK, CHUNK), pl.ds(block * plan.width, plan.width)

        def fetch(source, name, *index):
            plgpu.copy_gmem_to_smem(source, getattr(refs, name).at[0, *index], refs.barrier.at[0])

        for i in range(tiles):
            keys = pl.ds(i * CHUNK, CHUNK)
            fetch(refs.x.at[batch, tokens, group, keys], "x_tiles", i)
            fetch(refs.y.at[batch, tokens, group, keys], "y_tiles", i)
            if plan.per_key:
                fetch(refs.high.at[batch, tokens, head, keys], "high_tiles", i)
                fetch(refs.low.at[batch, tokens, head, keys], "low_tiles", i)
            fetch(refs.states.at[sequence, pl.ds(n * plan.key_dim + i * CHUNK, CHUNK), values], "state_tiles", i)
        fetch(refs.w.at[batch, tokens, head, values], "w_tile")
        if not plan.per_key:
            fetch(refs.decay.at[0, sequence, tokens], "sums")
            fetch(refs.decay.at[2 if reverse else 1, sequence, tokens], "gate")
        plgpu.barrier_wait(refs.barrier.at[0])

        def of_keys(name):
            return [getattr(refs, name).at[0, i] for i in range(tiles)]

        if plan.per_key:
            decays = [chunk.PerKey(*pair) for pair in zip(of_keys("high_tiles"), of_keys("low_tiles"), strict=True)]
        else:
            decays = [chunk.Scalar(refs.sums.at[0], refs.gate.at[0])]
        w = refs.w_tile.at[0]
        x, y, state = map(of_keys, ("x_tiles", "y_tiles", "state_tiles"))
        out = chunk.read(Registers(refs.stage), decays, reverse, plan.scale, x, y, w, state)
        _store(out, refs.w_tile.at[0], refs.out.at[batch, tokens, head, values])
        plgpu.wait_smem_to_gmem(0)

    outputs = {"out": (w.shape, jnp.bfloat16)}
    grid = (plan.sequences, plan.chunks, plan.value_blocks)
    return launch(plan, body, inputs, outputs, scratch, grid, "dv" if reverse else "out")["out"]


def gradients(plan, q, k, v, d_out, decay, states, d_states):
    """dq, dk [B, T, H, K] bfloat16, and `changes`, float32: q dq - k dk, summed over keys if decays are scalar,
    [K / 64, B H, T] of 64 keys each, else over each token and the later ones of its chunk, [B, T, H, K]."""
    inputs = {
        "q": q, "k": k, "v": v, "d_out": d_out, **_decay_inputs(plan, decay), "states": states, "d_states": d_states
    }  # fmt: skip
    fetches = Fetches()
    for name in ("q_tile", "k_tile", *(("high_tile", "low_tile") if plan.per_key else ())):
        fetches.tile(name, CHUNK, CHUNK)
    for name in ("v_tile", "d_out_tile", "state_tile", "d_state_tile"):
        fetches.tile(name, CHUNK, plan.value_dim)
    if not plan.per_key:
        fetches.vector("sums", "read_gate", "write_gate")
    scratch = {
        "stage": shared_tile(CHUNK, CHUNK),
        "kept": shared_tile(CHUNK, CHUNK),
        "result": shared_tile(CHUNK, CHUNK),
        "reads": shared_tile(CHUNK, CHUNK, dtype=jnp.float32),
        "row_sums": plgpu.SMEM((CHUNK,), jnp.float32),
        **fetches.scratch(),
    }

    def body(refs, sequence, n, block):
        batch, head, group = _indices(plan, sequence)
        tokens, keys = pl.ds(n * CHUNK, CHUNK), pl.ds(block * CHUNK, CHUNK)
        rows = pl.ds(n * plan.key_dim + block * CHUNK, CHUNK)
        copies = {
            "q_tile": refs.q.at[batch, tokens, group, keys],
            "k_tile": refs.k.at[batch, tokens, group, keys],
            "v_tile": refs.v.at[batch, tokens, head],
            "d_out_tile": refs.d_out.at[batch, tokens, head],
            "state_tile": refs.states.at[sequence, rows],
            "d_state_tile": refs.d_states.at[sequence, rows],
        }
        if plan.per_key:
            copies["high_tile"] = refs.high.at[batch, tokens, head, keys]
            copies["low_tile"] = refs.low.at[batch, tokens, head, keys]
        else:
            for i, name in enumerate(("sums", "read_gate", "write_gate")):
                copies[name] = refs.decay.at[i, sequence, tokens]
        for name, source in copies.items():
            plgpu.copy_gmem_to_smem(source, getattr(refs, name).at[0], refs.barrier.at[0])
        plgpu.barrier_wait(refs.barrier.at[0])

        tiles = SimpleNamespace(**{name: getattr(refs, name).at[0] for name in copies})
        m = Registers(refs.stage, refs.kept)
        if plan.per_key:
            reads = writes = chunk.PerKey(tiles.high_tile, tiles.low_tile)
        else:
            reads, writes = chunk.Scalar(tiles.sums, tiles.read_gate), chunk.Scalar(tiles.sums, tiles.write_gate)
        v, d_out = tiles.v_tile, tiles.d_out_tile
        dq, part = chunk.key_gradient(m, reads, False, plan.scale, tiles.k_tile, d_out, v, tiles.state_tile)
        _store(dq, refs.result, refs.dq.at[batch, tokens, head, keys])
        refs.reads[...] = m.load(tiles.q_tile) * part  # not in registers: they would not be enough
        dk, part = chunk.key_gradient(m, writes, True, plan.scale, tiles.q_tile, v, d_out, tiles.d_state_tile)
        changes = load(refs.reads, WGMMA) - m.load(tiles.k_tile) * part
        plgpu.wait_smem_to_gmem(0)
        _store(dk, refs.result, refs.dk.at[batch, tokens, head, keys])
        if plan.per_key:
            refs.changes[batch, tokens, head, keys] = chunk.sums_of_later(m, changes)
        else:
            _store(jnp.sum(changes, axis=1), refs.row_sums, refs.changes.at[block, sequence, tokens])
        plgpu.wait_smem_to_gmem(0)

    shape = (*v.shape[:3], plan.key_dim)
    outputs = {
        "dq": (shape, jnp.bfloat16),
        "dk": (shape, jnp.bfloat16),
        "changes": (shape if plan.per_key else (plan.key_tiles, plan.sequences, plan.time), jnp.float32),
    }
    grid = (plan.sequences, plan.chunks, plan.key_tiles)
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "dq_dk").values())


def _store(x, shared, target):
    shared[...] = x.astype(shared.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, target)
