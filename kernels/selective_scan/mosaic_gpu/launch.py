"""The kernels: a block of threads walks over a part of the time with the states of some channels in registers.

    ends       what each part adds to a state of zero at its start; in reverse, to a gradient of zero at its end
    forward    y, the final state, and the states before each chunk of 16 tokens
    backward   from right to left: all gradients. The states inside a chunk are computed again from the one before it:
               first those before every few tokens, into shared memory, then those of the few, into registers

Chunks are fetched by TMA while others are at work. Threads share nothing but what is fetched and what is stored, so the
barriers are written out: the compiler would add two a store.

Arrays, with the channels as [G, 4, W], G groups of what a block holds (recurrence.py): x, dt, y [B, T, G, 4, W], T a
multiple of 16; B, C [B, T, N] float32; A2 [G, 4, N, W], rates times log2 e; D [G, 4, W]; states of P parts
[B, P, G, 4, N, W]; starts [B, T / 16, 32] float32, START_STEP where a segment starts, else 0, or None (a chunk's 16
twice, since Pallas copies multiples of 128 bytes).
"""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.array_typing import Array
from kernels.mosaic_gpu import Fetches, launch
from kernels.selective_scan.mosaic_gpu.recurrence import WARPS, Tile, advance, decay, pull, read
from kernels.selective_scan.pallas import LOG2_E

CHUNK = 16  # tokens of a fetch, and between two states that are kept
TURN = 4  # tokens whose states the backward pass holds in registers
TURNS = CHUNK // TURN
OF_CHUNKS = ("kept", "starts")  # arrays with one row a chunk


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call: padded sizes, and what it has."""

    batch: int
    time: int  # a multiple of CHUNK
    groups: int
    numbers: int  # N
    parts: int  # of the time, that run at once
    packed: bool
    interpret: object

    @property
    def tile(self) -> Tile:
        return Tile(self.numbers, interpret=self.interpret is not None)

    @property
    def chunks(self) -> int:
        return self.time // CHUNK

    @property
    def part_chunks(self) -> int:  # the last part may have fewer
        return pl.cdiv(self.chunks, self.parts)

    @property
    def states_shape(self) -> tuple[int, ...]:
        return self.batch, self.parts, self.groups, *self.tile.shape


class Walk:
    """The chunks of a part of the time, from left to right or in reverse, and what of each is fetched."""

    def __init__(self, plan, fetched, slots, reverse=False):
        """fetched: arrays over time by name, [B, T, N], [B, T, G, ...], or, of chunks, [B, T / 16, ...]."""
        self.plan, self.fetched, self.reverse, self.fetches = plan, fetched, reverse, Fetches(slots)
        for name, array in fetched.items():
            of_chunk = array.shape[3 if array.ndim > 3 else 2 :]
            shape = of_chunk if name in OF_CHUNKS else (CHUNK, *of_chunk)
            self.fetches.add(f"{name}_tile", plgpu.SMEM((slots, *shape), array.dtype))

    def fold(
        self, refs: Any, place: tuple[Array, Array, Array], step: Callable, state: Array | tuple[Array, Array, Array]
    ) -> Array | tuple[Array, Array, Array]:
        """`step(tiles by name, chunk, state)` of all chunks, one after the other. It ends after a barrier of all warps,
        so that its tiles can be fetched anew."""
        batch, part, group = place
        first = part * self.plan.part_chunks
        count = jnp.minimum(self.plan.part_chunks, self.plan.chunks - first)
        slots = self.fetches.slots

        def chunk_index(i):
            return first + (count - 1 - i if self.reverse else i)

        def fetch(i):
            n, copies = chunk_index(i), {}
            for name, array in self.fetched.items():
                time = n if name in OF_CHUNKS else pl.ds(n * CHUNK, CHUNK)
                index = (batch, time, group) if array.ndim > 3 else (batch, time)
                copies[f"{name}_tile"] = getattr(refs, name).at[index]
            self.fetches.start(refs, i, copies)

        def turn(i, state):
            tiles = {name.removesuffix("_tile"): tile for name, tile in self.fetches.wait(refs, i).items()}
            state = step(SimpleNamespace(**tiles), chunk_index(i), state)
            pl.when(i + slots < count)(lambda: fetch(i + slots))
            return state

        for i in range(slots):
            pl.when(i < count)(lambda i=i: fetch(jnp.int32(i)))
        return lax.fori_loop(0, count, turn, state)


def ends(plan: Plan, reverse: bool, x: Array, dt: Array, A2: Array, B: Array, starts: Array | None) -> Array:
    """[B, P, G, 4, N, W]. In reverse, x is dy and B is C, and the ends are those on the left."""
    walk = Walk(plan, _over_time(starts, x=x, dt=dt, B=B), slots=3, reverse=reverse)
    tile = plan.tile

    def body(refs, *place):
        A2 = tile.states(refs.A2.at[place[-1]])

        def step(tiles, _, h):
            def token(t, h):
                x, B = tile.channels(tiles.x.at[t]), tile.of_number(tiles.B.at[t])
                dt, dt_decay = _steps(tile, tiles, t)
                a = decay(tile, dt_decay, A2)
                return a * advance(tile, h, 1.0, x, B) if reverse else advance(tile, h, a, dt * x, B)

            h = _over_tokens(token, h, reverse)
            plgpu.commit_smem()
            return h

        tile.store(refs.ends.at[place], walk.fold(refs, place, step, tile.no_states()))

    outputs = {"ends": (plan.states_shape, jnp.float32)}
    name = "ends_reverse" if reverse else "ends"
    return _call(plan, name, body, walk, {"A2": A2}, outputs, {})["ends"]


def forward(
    plan: Plan,
    x: Array,
    dt: Array,
    A2: Array,
    B: Array,
    C: Array,
    D: Array | None,
    starts: Array | None,
    initial_states: Array,
    keep: bool,
) -> tuple[Array | None, ...]:
    """y; the final states of all parts; the states before the chunks [B, T / 16, G, 4, N, W], or None."""
    walk = Walk(plan, _over_time(starts, x=x, dt=dt, B=B, C=C), slots=3)
    tile = plan.tile

    def body(refs, batch, part, group):
        A2, D = tile.states(refs.A2.at[group]), tile.channels(refs.D.at[group])

        def step(tiles, n, h):
            if keep:
                tile.store(refs.kept.at[batch, n, group], h)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier too: y_tile is free

            def token(t, h):
                x, B, C = tile.channels(tiles.x.at[t]), tile.of_number(tiles.B.at[t]), tile.of_number(tiles.C.at[t])
                dt, dt_decay = _steps(tile, tiles, t)
                h = advance(tile, h, decay(tile, dt_decay, A2), dt * x, B)
                tile.store(refs.y_tile.at[t], read(tile, h, C) + D * x)
                return h

            h = _over_tokens(token, h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs.y_tile, refs.y.at[batch, pl.ds(n * CHUNK, CHUNK), group])
            return h

        place = batch, part, group
        h = walk.fold(refs, place, step, tile.states(refs.initial_states.at[place]))
        tile.store(refs.final_states.at[place], h)
        plgpu.wait_smem_to_gmem(0)

    outputs = {"y": (x.shape, x.dtype), "final_states": (plan.states_shape, jnp.float32)}
    if keep:
        outputs["kept"] = ((plan.batch, plan.chunks, plan.groups, *tile.shape), jnp.float32)
    scratch = {"y_tile": plgpu.SMEM((CHUNK, *x.shape[3:]), x.dtype)}
    inputs = {"A2": A2, "D": D, "initial_states": initial_states}
    result = _call(plan, "forward", body, walk, inputs, outputs, scratch)
    return result["y"], result["final_states"], result.get("kept")


def backward(
    plan: Plan,
    x: Array,
    dt: Array,
    A2: Array,
    B: Array,
    C: Array,
    D: Array | None,
    starts: Array | None,
    kept: Array,
    dy: Array,
    d_final_states: Array,
) -> dict[str, Array]:
    """Gradients by name: dx, ddt; dB, dC [B, G, T N], of each group; dA, dD of each sequence and part; d_states, of the
    states that the parts start with. float32 but for dx and ddt."""
    walk = Walk(plan, _over_time(starts, x=x, dt=dt, B=B, C=C, dy=dy, kept=kept), slots=2, reverse=True)
    tile, numbers = plan.tile, plan.numbers

    def body(refs, batch, part, group):
        A2, D = tile.states(refs.A2.at[group]), tile.channels(refs.D.at[group])

        def step(tiles, n, carry):
            def inputs(t):
                x, (dt, dt_decay) = tile.channels(tiles.x.at[t]), _steps(tile, tiles, t)
                return x, dt, tile.of_number(tiles.B.at[t]), decay(tile, dt_decay, A2)

            def again(i, h):
                tile.store(refs.history.at[i], h)
                for t in _tokens(i):
                    x, dt, B, a = inputs(t)
                    h = advance(tile, h, a, dt * x, B)
                return h

            h = lax.fori_loop(0, TURNS - 1, again, tile.states(tiles.kept))
            tile.store(refs.history.at[TURNS - 1], h)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier too: the tiles of results are free

            def turn(i, carry):
                i = TURNS - 1 - i
                W, dA, dD = carry
                states, decays = [tile.states(refs.history.at[i])], []
                for t in _tokens(i):
                    x, dt, B, a = inputs(t)
                    decays.append(a)
                    states.append(advance(tile, states[-1], a, dt * x, B))
                for s, t in reversed(list(enumerate(_tokens(i)))):
                    x, dt, dy = (tile.channels(ref.at[t]) for ref in (tiles.x, tiles.dt, tiles.dy))
                    B, C = (tile.of_number(ref.at[t]) for ref in (tiles.B, tiles.C))
                    W, dA, du, through_decay, dB, dC = pull(
                        tile, W, dA, states[s], states[s + 1], decays[s], dt, dt * x, dy, A2, B, C
                    )
                    dD += dy * x
                    of_warps = (slice(None), pl.ds(t * numbers, numbers))
                    tile.store(refs.dx_tile.at[t], dt * du + D * dy)
                    tile.store(refs.ddt_tile.at[t], through_decay / LOG2_E + du * x)
                    tile.store(refs.dB_warps.at[of_warps], dB)
                    tile.store(refs.dC_warps.at[of_warps], dC)
                return W, dA, dD

            carry = lax.fori_loop(0, TURNS, turn, carry)
            plgpu.commit_smem()
            tokens = pl.ds(n * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(refs.dx_tile, refs.dx.at[batch, tokens, group])
            plgpu.copy_smem_to_gmem(refs.ddt_tile, refs.ddt.at[batch, tokens, group])
            for warps, total in ((refs.dB_warps, refs.dB), (refs.dC_warps, refs.dC)):
                rows = [warps[i] for i in range(WARPS)]
                total[batch, group, pl.ds(n * (CHUNK * numbers), CHUNK * numbers)] = sum(rows[1:], rows[0])
            return carry

        place = batch, part, group
        W = tile.states(refs.d_final_states.at[place])
        carry = walk.fold(refs, place, step, (W, tile.no_states(), tile.no_channels()))
        for ref, value in zip((refs.d_states, refs.dA, refs.dD), carry, strict=True):
            tile.store(ref.at[place], value)
        plgpu.wait_smem_to_gmem(0)

    sums = (plan.batch, plan.groups, plan.time * numbers)
    outputs = {
        "dx": (x.shape, x.dtype),
        "ddt": (dt.shape, dt.dtype),
        "dB": (sums, jnp.float32),
        "dC": (sums, jnp.float32),
        "d_states": (plan.states_shape, jnp.float32),
        "dA": (plan.states_shape, jnp.float32),
        "dD": ((*plan.states_shape[:3], *D.shape[1:]), jnp.float32),
    }
    scratch = {
        "history": plgpu.SMEM((TURNS, *tile.shape), jnp.float32),
        "dx_tile": plgpu.SMEM((CHUNK, *x.shape[3:]), x.dtype),
        "ddt_tile": plgpu.SMEM((CHUNK, *x.shape[3:]), dt.dtype),
        "dB_warps": plgpu.SMEM((WARPS, CHUNK * numbers), jnp.float32),
        "dC_warps": plgpu.SMEM((WARPS, CHUNK * numbers), jnp.float32),
    }
    inputs = {"A2": A2, "D": D, "d_final_states": d_final_states}
    return _call(plan, "backward", body, walk, inputs, outputs, scratch)


def _over_time(starts, **arrays):
    return arrays if starts is None else arrays | {"starts": starts}


def _call(plan, name, body, walk, inputs, outputs, scratch):
    grid = {"batch": plan.batch, "part": plan.parts, "group": plan.groups}
    return launch(
        f"selective_scan_{name}",
        body,
        walk.fetched | inputs,
        outputs,
        scratch | walk.fetches.scratch(),
        grid,
        interpret=plan.interpret,
        unsafe_no_auto_barriers=True,
    )


def _tokens(turn):
    return [turn * TURN + s for s in range(TURN)]


def _over_tokens(token, h, reverse=False):
    """`token(t, h)` of a chunk's tokens, one after the other."""

    def turn(i, h):
        for t in reversed(_tokens(TURNS - 1 - i)) if reverse else _tokens(i):
            h = token(t, h)
        return h

    return lax.fori_loop(0, TURNS, turn, h)


def _steps(tile, tiles, t):
    """dt, and dt of the decay."""
    dt = tile.channels(tiles.dt.at[t])
    return dt, dt + tiles.starts[t] if hasattr(tiles, "starts") else dt
