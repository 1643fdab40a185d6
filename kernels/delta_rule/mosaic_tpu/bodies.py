"""The kernels: what a grid step computes, a tile of its tokens after the other, and what stays in VMEM between steps.

In a chunk, of a state S before it, with b the betas and the decays where they belong (scalar.py, per_key.py):

    e = (I + B b)^-1 (v - k S)        out = scale (q S + tril(q k^T) b e)        S' = total S + k^T b e

(I + B b)^-1 = I - X b is of solve.py. With dS' the gradient of S':

    du = tril(q k^T)^T dout + k dS'        dr = (I - X^T b) du        dv = b dr        dbeta = dr . e
    dB = -tril(dv (b e)^T)                 dS = total dS' + q^T dout - k^T dv

The gradient of g is a sum over later tokens of q . dq + k . dk of what reads - k . dk of what writes.

The states of all heads of the grid's second axis stay in VMEM over the time blocks, in the block of the output that
becomes the final state. The backward pass goes from right to left. The states at the starts of the time blocks, X and e
were kept by the forward pass; the states of the chunks inside are computed again.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu import passes, per_key, scalar
from kernels.delta_rule.mosaic_tpu.columns import Numbers, over_lanes
from kernels.delta_rule.mosaic_tpu.plan import Plan
from kernels.delta_rule.mosaic_tpu.solve import resolvents
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.linear_attention.mosaic_tpu.lanes import LANES, head_sums
from kernels.linear_attention.mosaic_tpu.turns import in_turns
from kernels.mosaic_tpu.heads import finish_key_sums, over_pieces, start_key_sums

BESIDE = 6  # steps of the other tiles' work for each of a tile's `scan`


class Tile:
    """`plan.tokens` of a grid step's block: what the kernels load of them and store. A head here is a slot."""

    def __init__(self, plan: Plan, refs: Any, dots: Dots, index: int | Array, block: int | Array):
        self.plan, self.refs, self.dots, self.index = plan, refs, dots, index
        self.all = slice(0, plan.tokens)
        self.rows = self.tokens(self.all)
        token = block * plan.tiles.block + index * plan.tokens + lax.broadcasted_iota(jnp.int32, (plan.tokens, 1), 0)
        self.valid = token < plan.time if plan.ragged else None
        self.chunks = [slice(start, start + plan.tiles.chunk) for start in range(0, plan.tokens, plan.tiles.chunk)]
        self.lanes = self.numbered(TILE)
        self.numbers = Numbers(refs.rows[:, self.lanes], plan.tiles.heads, plan.pack)
        if not plan.per_key:
            self.numbers = scalar.with_written(dots, self.numbers)

    def load(self, name: str, head: int, width: int, rows: slice | None = None) -> Array:
        """[c, width] of one head; rows after the last token are zero."""
        rows = rows or self.all
        x = getattr(self.refs, name)[self.tokens(rows), head * width : (head + 1) * width]
        return x if self.valid is None else jnp.where(self.valid[rows], x, jnp.zeros_like(x))

    def store(self, name: str, head: int, x: Array, rows: slice | None = None) -> None:
        ref, width = getattr(self.refs, name), x.shape[1]
        ref[self.tokens(rows or self.all), head * width : (head + 1) * width] = x.astype(ref.dtype)

    def tokens(self, rows: slice) -> Any:
        """Of the tile, as rows of the block."""
        start = self.index * self.plan.tokens + rows.start
        size = rows.stop - rows.start
        return pl.ds(start if isinstance(self.index, int) else pl.multiple_of(start, size), size)

    def numbered(self, size: int) -> Any:
        """Of an axis that has `size` for each tile."""
        start = self.index * size
        return pl.ds(start if isinstance(self.index, int) else pl.multiple_of(start, size), size)

    def resolvent_rows(self) -> Any:
        return self.numbered(self.plan.tiles.chunk)

    def beta(self, head: int) -> Array:  # [1, (h, C)]
        return self.numbers.row(scalar.BETA, head)

    def beta_column(self, head: int, width: int) -> Array:  # [C, width]
        return over_lanes(self.numbers.column(scalar.BETA, head), width)

    def heads(self) -> list[Any]:
        plan, result = self.plan, []
        for group in range(plan.step_groups):
            q, k = (self.load(name, group, plan.key_dim) for name in ("q", "k"))
            shared = None if plan.per_key else scalar.group(self.dots, q, k, plan.tiles.chunk)
            for head in plan.heads_of(group):
                if plan.per_key:
                    g = self.load("decay", head, plan.key_dim)
                    operands = per_key.Head(self.dots, q, k, g, self.beta_column(head, LANES), plan)
                else:
                    operands = scalar.Head(self.dots, shared, self.numbers, head, plan)
                result.append(operands)
        return result

    def store_changes(self, columns: list[Array]) -> None:
        """Columns [(h, C), 1] as rows of `changes`."""
        lane = lax.broadcasted_iota(jnp.int32, (TILE, LANES), 1)
        packed = jnp.zeros((TILE, LANES), jnp.float32)
        for index, column in enumerate(columns):
            packed = jnp.where(lane == index, column, packed)
        self.refs.changes[:, self.lanes] = packed.T[: self.refs.changes.shape[0]]


def forward_kernel(plan: Plan, refs: Any) -> None:
    dots, block = plan.dots, pl.program_id(2)
    first_head = plan.first_head()

    @pl.when((block == 0) & (pl.program_id(3) == 0))
    def _():
        refs.state[...] = refs.initial_state[...]

    if hasattr(refs, "kept"):
        refs.kept[...] = refs.state[pl.ds(first_head, plan.tiles.heads)]

    def body(indices):
        tiles = [ForwardTile(Tile(plan, refs, dots, index, block)) for index in indices]
        states = [refs.state[first_head + head] for head in range(plan.tiles.heads)]
        in_turns([tile.prepare() for tile in tiles])
        for tile in tiles:
            tile.scan(states)
        for head, state in enumerate(states):
            refs.state[first_head + head] = state

    over_pieces(plan.tiles.block // plan.tokens, plan.tiles.unroll, body)


class ForwardTile:
    """What a tile needs without a state (`prepare`, in turns with other tiles), and with one (`scan`)."""

    def __init__(self, tile: Tile):
        self.tile = tile

    def prepare(self) -> Iterator[None]:
        tile, plan, dots = self.tile, self.tile.plan, self.tile.dots
        self.heads, betas = [], [tile.beta(head) for head in range(plan.tiles.heads)]
        self.attentions, systems = [], []
        for head in tile.heads():
            system, attention = head.scores()
            self.attentions.append(passes.left(dots, attention * betas[len(systems)]))
            self.heads.append(head)
            systems.append(system)
            yield
        solved = yield from resolvents(dots, systems, betas, plan.tiles.chunk)
        self.inverses = [passes.left_split(dots, x * beta) for x, beta in zip(solved, betas, strict=True)]
        if hasattr(tile.refs, "resolvent"):
            for index, x in enumerate(solved):
                lanes = slice(index * TILE, (index + 1) * TILE)
                tile.refs.resolvent[tile.resolvent_rows(), lanes] = x

    def scan(self, states: list[Array]) -> None:
        tile, plan, dots, heads = self.tile, self.tile.plan, self.tile.dots, self.heads
        each = range(len(heads))
        for number, rows in enumerate(tile.chunks):
            # Step by step for all heads: the compiler overlaps what stands side by side.
            found = [head.reads(rows, state) for head, state in zip(heads, states, strict=True)]
            values = [tile.load("v", head, plan.value_dim, rows) for head in each]
            given = [value.astype(jnp.float32) - by_key for value, (by_key, _) in zip(values, found, strict=True)]
            given = [passes.round_to(dots, x) for x in given]
            corrected = [
                dots.nn(x[number], passes.rounded(dots, y, number)) for x, y in zip(self.inverses, given, strict=True)
            ]
            for index, head in enumerate(heads):
                error = given[index] - corrected[index]
                if hasattr(tile.refs, "error"):
                    tile.store("error", index, error, rows)
                within = dots.nn(self.attentions[index][number], passes.right(dots, error, number))
                tile.store("out", index, found[index][1] + within, rows)
                states[index] = head.update(rows, error, states[index])


def run(steps: Iterator[None], beside: Iterator[None] | None = None) -> None:
    """All of `steps`, and all of `beside` between them."""
    for _ in steps:
        for _ in itertools.islice(beside or (), BESIDE):
            pass
    for _ in beside or ():
        pass


def backward_kernel(plan: Plan, refs: Any) -> None:
    dots, block = plan.dots, plan.blocks - 1 - pl.program_id(2)
    first_head = plan.first_head()

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        refs.d_state[...] = refs.d_final_state[...]

    start_key_sums(plan, refs)
    compute_states(plan, refs, dots, block)

    def body(indices):
        tiles = [BackwardTile(Tile(plan, refs, dots, index, block)) for index in indices]
        d_states = [refs.d_state[first_head + head] for head in range(tiles[0].count)]
        run(tiles[0].prepare())
        for before, tile, following in zip([None, *tiles], tiles, [*tiles[1:], None], strict=False):
            beside = itertools.chain(before.finish() if before else (), following.prepare() if following else ())
            run(tile.scan(d_states), beside)
        run(tiles[-1].finish())
        for head, d_state in enumerate(d_states):
            refs.d_state[first_head + head] = d_state

    over_pieces(plan.tiles.block // plan.tokens, plan.tiles.unroll_backward, body, reverse=True)
    finish_key_sums(plan, refs)


def compute_states(plan: Plan, refs: Any, dots: Dots, block: int | Array) -> None:
    """The states at the starts of the block's chunks and at its end, into `refs.states`."""
    for head in range(plan.tiles.heads):
        refs.states[0, head] = refs.kept[head].astype(plan.dtype)

    def body(index, states):
        tile, states = Tile(plan, refs, dots, index, block), list(states)
        heads = tile.heads()
        errors = [tile.load("error", head, plan.value_dim).astype(jnp.float32) for head in range(len(heads))]
        for number, rows in enumerate(tile.chunks):
            for head, operands in enumerate(heads):
                states[head] = operands.update(rows, errors[head][rows], states[head])
                refs.states[index * plan.chunks + number + 1, head] = states[head].astype(plan.dtype)
        return tuple(states)

    states = tuple(refs.kept[head] for head in range(plan.tiles.heads))
    lax.fori_loop(0, plan.tiles.block // plan.tokens, body, states)


class BackwardTile:
    """What a tile needs without the gradient of a state (`prepare`), with one (`scan`) and after it (`finish`)."""

    def __init__(self, tile: Tile):
        self.tile, self.count = tile, tile.plan.tiles.heads

    def prepare(self) -> Iterator[None]:
        tile, plan, dots, width = self.tile, self.tile.plan, self.tile.dots, self.tile.plan.value_dim
        self.d_outs = [tile.load("d_out", head, width) for head in range(self.count)]
        self.errors = [tile.load("error", head, width) for head in range(self.count)]
        self.betas = [tile.beta_column(head, width) for head in range(self.count)]
        self.heads, self.given, self.transposed = [], [], []
        for head, operands in enumerate(tile.heads()):
            x = tile.refs.resolvent[tile.resolvent_rows(), head * TILE : (head + 1) * TILE]
            weighted = x * passes.beside(self.betas[head][:, :LANES], plan.chunks)
            self.transposed.append(passes.left_split_transposed(dots, weighted))
            self.given.append(dots.outer(passes.of_tile(dots, operands.scores()[1]), self.d_outs[head]))
            self.heads.append(operands)
            yield

    def scan(self, d_states: list[Array]) -> Iterator[None]:
        tile, plan, dots, refs = self.tile, self.tile.plan, self.tile.dots, self.tile.refs
        each = range(self.count)
        self.parts = [[None] * plan.chunks for _ in each]
        for number, rows in reversed(list(enumerate(tile.chunks))):
            index = tile.index * plan.chunks + number
            errors = [self.errors[head][rows].astype(jnp.float32) for head in each]
            betas = [self.betas[head][rows] for head in each]
            du = [self.given[head][rows] + self.heads[head].writes(rows, d_states[head]) for head in each]
            yield
            du = [passes.round_to(dots, x) for x in du]
            dr = [
                x - dots.nn(y[number], passes.rounded(dots, x, number))
                for x, y in zip(du, self.transposed, strict=True)
            ]
            yield
            for head in each:
                dv, later = betas[head] * dr[head], refs.states[index + 1, head].astype(jnp.float32)
                later = self.heads[head].later(later, d_states[head])
                *through, d_states[head] = self.heads[head].state_gradients(
                    rows,
                    refs.states[index, head],
                    d_states[head],
                    self.d_outs[head][rows].astype(jnp.float32),
                    dv,
                    betas[head] * errors[head],
                )
                d_beta = jnp.concatenate(head_sums([dr[head] * errors[head]], plan.pack))
                self.parts[head][number] = (dv, d_beta, *through, later)
            yield

    def finish(self) -> Iterator[None]:
        tile, plan, dots, refs = self.tile, self.tile.plan, self.tile.dots, self.tile.refs
        result = []
        for head, operands in enumerate(self.heads):
            *parts, later = zip(*self.parts[head], strict=True)
            dv, d_beta, dq, dk_reads, dk_writes = (jnp.concatenate(x) for x in parts)
            tile.store("dv", head, dv)
            d_read = jnp.concatenate([self.d_outs[head].astype(jnp.float32), dv])
            scores = dots.nt(d_read, dots.spread(self.errors[head]))
            beta = tile.beta(head)
            more = operands.score_gradients(scores[: plan.tokens] * beta, -scores[plan.tokens :] * beta)
            dq, dk_reads, dk_writes = dq + more[0], dk_reads + more[1], dk_writes + more[2]
            dq, dk, change = operands.finish(dq, dk_reads, dk_writes, list(later))
            if plan.per_key:
                tile.store("d_decay", head, change)
            result.append((dq, dk, change, d_beta))
            yield
        for group in range(plan.step_groups):
            dq, dk = (sum(result[head][name] for head in plan.heads_of(group)) for name in (0, 1))
            if plan.inner > 1:
                refs.dq_sum[tile.rows, :] += dq
                refs.dk_sum[tile.rows, :] += dk
            else:
                tile.store("dq", group, dq)
                tile.store("dk", group, dk)
        tile.store_changes([x[2] for x in result if not plan.per_key] + [x[3] for x in result])
