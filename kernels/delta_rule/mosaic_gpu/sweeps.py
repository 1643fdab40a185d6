"""The sweeps over chunks: a block of threads for each sequence, head and 64 values, all keys of the state in registers.

    sweep      from left to right, U and S'
    pull       from right to left, dY, dv and R'

Arrays as in keys.py; U and dY [B, T, H, V] bfloat16. With scalar decays q and k are read as they are, and rows of
values are gated; with decays per key q and k come with theirs, by `keys.gated`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_gpu import chunk
from kernels.delta_rule.mosaic_gpu.keys import staged, stages
from kernels.linear_attention.mosaic_gpu.blocks import Fetches, Plan, launch
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, Operand
from kernels.linear_attention.mosaic_gpu.launch import indices
from kernels.mosaic_gpu import shared_tile

HALVES = ("inverse_high", "inverse_low")
GATES = ("read_gate", "write_gate")
TILE_BYTES = 2 * CHUNK * CHUNK
SHARED_BYTES = 216 * 1024  # of a multiprocessor's 227 KiB: the rest is for vectors and barriers


class Chunks:
    """What both sweeps fetch of a chunk, and how they go over all of them."""

    def __init__(
        self, plan: Plan, names: Sequence[str], values: Sequence[str], others: int, vectors: Sequence[str] = ()
    ):
        """names: of inputs over keys; values: of tiles over values or tokens; others: tiles beside those fetched;
        vectors: of tokens."""
        self.plan, self.names, self.keys = plan, names, range(plan.key_tiles)
        tiles = [*(f"{name}_{i}" for name in names for i in self.keys), *values, *HALVES]
        others += plan.key_tiles  # the state
        slots = 2 if (2 * len(tiles) + others) * TILE_BYTES <= SHARED_BYTES else 1
        self.fetches = Fetches(slots)
        for name in tiles:
            self.fetches.tile(name, CHUNK, CHUNK)
        self.fetches.vector(*vectors, *(f"total_{i}" for i in self.keys))

    def scratch(self) -> dict[str, Any]:
        return {f"kept_{i}": shared_tile(CHUNK, CHUNK) for i in self.keys} | self.fetches.scratch()

    def kept(self, refs: Any) -> list[Operand]:
        return [getattr(refs, f"kept_{i}") for i in self.keys]

    def fetch(self, refs: Any, sequence: Array, turn: Array, n: Array, values: Mapping[str, Any]) -> None:
        """values: sources by name, vectors too."""
        batch, head, group = indices(self.plan, sequence)
        tokens = pl.ds(n * CHUNK, CHUNK)
        copies = {name: refs.inverses.at[i, sequence, tokens] for i, name in enumerate(HALVES)} | values
        for i in self.keys:
            columns = pl.ds(i * CHUNK, CHUNK)
            for name in self.names:
                source = getattr(refs, name)
                copies[f"{name}_{i}"] = source.at[batch, tokens, head if self.plan.per_key else group, columns]
            copies[f"total_{i}"] = refs.totals.at[sequence, self.state_rows(n, i)]
        self.fetches.start(refs, turn, copies)

    def wait(self, refs: Any, turn: Array) -> dict[str, Any]:
        """Tiles and vectors by name: lists where they are for each 64 keys."""
        found = self.fetches.wait(refs, turn)
        for name in (*self.names, "total"):
            found[name] = [found.pop(f"{name}_{i}") for i in self.keys]
        return found

    def state_rows(self, n: Array, i: int) -> Any:
        return pl.ds(n * self.plan.key_dim + i * CHUNK, CHUNK)

    def keep(
        self, m: Any, refs: Any, state: Sequence[Operand], target: Any, sequence: Array, n: Array, values: Any
    ) -> None:
        """The state, to the tiles `kept` and to chunk n of `target`."""
        for shared, tile in zip(self.kept(refs), state, strict=True):
            shared[...] = m.half(tile)
        plgpu.commit_smem()
        for i, shared in enumerate(self.kept(refs)):
            plgpu.copy_smem_to_gmem(shared, target.at[sequence, self.state_rows(n, i), values])

    def sweep(
        self,
        refs: Any,
        sequence: Array,
        values: Any,
        fetch: Callable[[Array], None],
        step: Callable[[Array, list[Operand]], list[Operand]],
    ) -> None:
        """From refs.start to refs.end; step(turn, state) gives the next state, a tile for each 64 keys."""
        chunks, slots = self.plan.chunks, self.fetches.slots
        for i in range(min(slots, chunks)):
            fetch(jnp.int32(i))

        def turn(i, state):
            # A barrier: all warps are done with the turn before, whose slot is free, and with what they staged.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when((i > 0) & (i - 1 + slots < chunks))(lambda: fetch(i - 1 + slots))
            return step(i, state)

        rows, m = [pl.ds(i * CHUNK, CHUNK) for i in self.keys], self.plan.machine()
        state = lax.fori_loop(0, chunks, turn, [m.load(refs.start.at[sequence, keys, values]) for keys in rows])
        for keys, tile in zip(rows, state, strict=True):
            refs.end[sequence, keys, values] = tile
        plgpu.wait_smem_to_gmem(0)


def next_state(
    m: Any, state: Sequence[Operand], totals: Sequence[Operand], *products: tuple[Sequence[Operand], Operand]
) -> list[Operand]:
    """e^total state + the sum of products: of tiles for each 64 keys, transposed, and of a tile of values."""
    following = []
    for i, (tile, total) in enumerate(zip(state, totals, strict=True)):
        pairs = [(m.transposed(x[i]), y) for x, y in products]
        following.append(m.dots(tile * m.rows(total, CHUNK), *pairs))
    return following


def _vectors(plan):
    return ("beta_rows",) if plan.per_key else ("beta_rows", *GATES)


def _vector_sources(plan, refs, sequence, n):
    tokens = sequence, pl.ds(n * CHUNK, CHUNK)
    gates = {} if plan.per_key else {name: refs.decay.at[1 + i, *tokens] for i, name in enumerate(GATES)}
    return {"beta_rows": refs.beta.at[tokens], **gates}


def sweep(
    plan: Plan,
    keys: dict[str, Array],
    v: Array,
    beta: Array,
    decay: Array | None,
    totals: Array,
    inverses: Array,
    start: Array,
) -> tuple[Array, Array, Array]:
    """U, the states before each chunk, and the state after the last, [B H, K, V] float32, as `start` is.

    keys: "k", or of decays per key "k_read" and "k_write", and no `decay`.
    """
    read, write = ("k_read", "k_write") if plan.per_key else ("k", "k")
    inputs = {**keys, "v": v, "beta": beta, "totals": totals, "inverses": inverses, "start": start}
    inputs |= {} if plan.per_key else {"decay": decay}
    chunks = Chunks(plan, tuple(keys), ("v_tile",), others=1, vectors=_vectors(plan))

    def body(refs, sequence, part, block):
        del part
        batch, head, _ = indices(plan, sequence)
        values = pl.ds(block * CHUNK, CHUNK)

        def tokens(n):
            return batch, pl.ds(n * CHUNK, CHUNK), head, values

        def fetch(n):
            sources = {"v_tile": refs.v.at[tokens(n)]} | _vector_sources(plan, refs, sequence, n)
            chunks.fetch(refs, sequence, n, n, sources)

        def step(n, state):
            chunks.keep(plan.machine(), refs, state, refs.states, sequence, n, values)
            found = chunks.wait(refs, n)
            # v is read once, before anything is staged: in its place, which lets two blocks share a multiprocessor.
            m = plan.machine(refs.stage_0, found["v_tile"])
            inverse = chunk.Inverse(*(found[name] for name in HALVES))
            gates = [found.get(name) for name in GATES]
            u = chunk.correct(m, gates[0], found["beta_rows"], inverse, found[read], found["v_tile"], chunks.kept(refs))
            if plan.per_key:
                whole = written = m.stage(u)
            else:
                whole, written = m.stage_all(u, chunk.gated(m, gates[1], u))
            plgpu.copy_smem_to_gmem(whole, refs.u.at[tokens(n)])
            return next_state(m, state, found["total"], (found[write], written))

        chunks.sweep(refs, sequence, values, fetch, step)

    outputs = {
        "u": (v.shape, jnp.bfloat16),
        "states": (plan.states_shape, jnp.bfloat16),
        "end": (start.shape, jnp.float32),
    }
    grid, scratch = (plan.sequences, 1, plan.value_dim // CHUNK), stages(1) | chunks.scratch()
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "corrections").values())


def pull(
    plan: Plan,
    keys: dict[str, Array],
    d_out: Array,
    beta: Array,
    decay: Array | None,
    totals: Array,
    inverses: Array,
    scores: Array,
    start: Array,
) -> tuple[Array, Array, Array, Array]:
    """dY, dv [B, T, H, V], the gradients of the states after each chunk, and that of the first state, float32.

    keys: as in `sweep`, and "q", or of decays per key "q_read". start [B H, K, V] float32: of the last state.
    """
    query, read, write = ("q_read", "k_read", "k_write") if plan.per_key else ("q", "k", "k")
    inputs = {
        **keys, "d_out": d_out, "beta": beta, "totals": totals, "inverses": inverses, "scores": scores, "start": start,
    }  # fmt: skip
    inputs |= {} if plan.per_key else {"decay": decay}
    count = 3 if plan.per_key else 4
    chunks = Chunks(plan, tuple(keys), ("d_out_tile", "scores_tile"), others=count, vectors=_vectors(plan))

    def body(refs, sequence, part, block):
        del part
        batch, head, _ = indices(plan, sequence)
        values = pl.ds(block * CHUNK, CHUNK)
        m = plan.machine(*staged(refs, count)[:3])

        def tokens(n):
            return batch, pl.ds(n * CHUNK, CHUNK), head, values

        def fetch(turn):
            n = plan.chunks - 1 - turn
            sources = {
                "d_out_tile": refs.d_out.at[tokens(n)],
                "scores_tile": refs.scores.at[sequence, pl.ds(n * CHUNK, CHUNK)],
                **_vector_sources(plan, refs, sequence, n),
            }
            chunks.fetch(refs, sequence, turn, n, sources)

        def step(turn, d_state):
            n = plan.chunks - 1 - turn
            chunks.keep(m, refs, d_state, refs.d_states, sequence, n, values)
            found = chunks.wait(refs, turn)
            d_out, inverse = found["d_out_tile"], chunk.Inverse(*(found[name] for name in HALVES))
            gates = [found.get(name) for name in GATES]
            if not plan.per_key:
                d_out = plan.machine(refs.stage_3).stage(chunk.gated(m, gates[0], plan.scale * m.load(d_out)))
            d_y = chunk.pull(
                m, gates[1], inverse, found["scores_tile"], found[write], found["d_out_tile"], chunks.kept(refs)
            )
            dv = d_y * m.rows(found["beta_rows"], CHUNK)
            *stored, d_read = m.stage_all(d_y, dv, -chunk.gated(m, gates[0], dv))
            for shared, target in zip(stored, (refs.d_y, refs.dv), strict=True):
                plgpu.copy_smem_to_gmem(shared, target.at[tokens(n)])
            return next_state(m, d_state, found["total"], (found[query], d_out), (found[read], d_read))

        chunks.sweep(refs, sequence, values, fetch, step)

    outputs = {
        "d_y": (d_out.shape, jnp.bfloat16),
        "dv": (d_out.shape, jnp.bfloat16),
        "d_states": (plan.states_shape, jnp.bfloat16),
        "end": (start.shape, jnp.float32),
    }
    grid, scratch = (plan.sequences, 1, plan.value_dim // CHUNK), stages(count) | chunks.scratch()
    return tuple(launch(plan, body, inputs, outputs, scratch, grid, "corrections_reverse").values())
