"""The kernels: what a grid step computes, a chunk of its tokens after the other, and what stays in VMEM between steps.

In a chunk of a slot of heads (`lanes.py`), of a state S before it, with A_b, A_k, P_b, P_k the scores of a and q with b
and k (keys.py) and the decays where they belong (decays.py):

    U  = (I - A_b)^-1 (A S + A_k V)       O = Q S + P_b U + P_k V       S' = total S + B^T U + K^T V

(I - A_b)^-1 = I + Y is of ../../delta_rule/mosaic_tpu/solve.py. With dS' the gradient of S':

    F  = P_b^T dO + B dS'                 E = (I + Y^T) F               dV = P_k^T dO + A_k^T E + K dS'
    dS = total dS' + Q^T dO + A^T E       the gradients of the scores: [dO; E] [U; V]^T

The gradient of g_t sums over later tokens of the chunk what reads, q . dq and a . da, less what writes, b . db and
k . dk; q of the token itself reads after its decay, a before it, and a token's own products do not decay. What is left
at the end of the chunk counts for all tokens: of the state before it, and of each write.

The states of a step's slots, transposed, [V, (h, K)], stay in VMEM over the time blocks, in the block of the output
that becomes the final state. The backward pass goes from right to left. The state before each chunk, Y and U were kept
by the forward pass.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.bodies import run
from kernels.delta_rule.mosaic_tpu.solve import parts, resolvents
from kernels.delta_rule.specs import TILE
from kernels.dplr_delta_rule.mosaic_tpu.keys import Keys, precise, precise_outer
from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.chunk import Chunk
from kernels.linear_attention.mosaic_tpu.per_key import head_products
from kernels.linear_attention.mosaic_tpu.plan import Plan
from kernels.linear_attention.mosaic_tpu.turns import rounds
from kernels.mosaic_tpu.heads import over_pieces


def forward_kernel(plan: Plan, refs: Any) -> None:
    block, slots = pl.program_id(2), range(plan.tiles.heads)

    @pl.when(block == 0)
    def _():
        refs.state[...] = refs.initial_state[...]

    def body(indices):
        chunks = [Forward(plan, Chunk(plan, refs, index, block)) for index in indices]
        states = [refs.state[slot] for slot in slots]
        run(chunks[0].prepare())
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            run(chunk.scan(states), following and following.prepare())
        for slot, state in enumerate(states):
            refs.state[slot] = state

    over_pieces(plan.tiles.block // plan.tiles.chunk, plan.tiles.unroll, body)


def backward_kernel(plan: Plan, refs: Any) -> None:
    block, slots = plan.blocks - 1 - pl.program_id(2), range(plan.tiles.heads)

    @pl.when(pl.program_id(2) == 0)
    def _():
        refs.d_state[...] = refs.d_final_state[...]

    def body(indices):
        chunks = [Backward(plan, Chunk(plan, refs, index, block)) for index in indices]
        d_states = [refs.d_state[slot] for slot in slots]
        run(chunks[0].prepare())
        for before, chunk, following in zip([None, *chunks], chunks, [*chunks[1:], None], strict=False):
            beside = itertools.chain(before.finish() if before else (), following.prepare() if following else ())
            run(chunk.scan(d_states), beside)
        run(chunks[-1].finish())
        for slot, d_state in enumerate(d_states):
            refs.d_state[slot] = d_state

    over_pieces(plan.tiles.block // plan.tiles.chunk, plan.tiles.unroll_backward, body, reverse=True)


def keys_of(plan: Plan, chunk: Chunk, slot: int) -> Keys:
    q, k, a, b, g = (chunk.load(name, slot, plan.key_dim).astype(jnp.float32) for name in ("q", "k", "a", "b", "decay"))
    return Keys(plan.dots, plan.scale * q, k, a, b, g)


class Forward:
    """What a chunk needs without a state (`prepare`), and with one (`scan`), in steps."""

    def __init__(self, plan: Plan, chunk: Chunk):
        self.plan, self.chunk, self.slots = plan, chunk, range(plan.tiles.heads)

    def prepare(self) -> Iterator[None]:
        plan, dots, size = self.plan, self.plan.dots, self.plan.tiles.chunk
        self.keys = [keys_of(plan, self.chunk, slot) for slot in self.slots]
        self.scores = yield from rounds([keys.scores() for keys in self.keys])
        systems = [jnp.concatenate([a_b] * dots.pack) for _, _, a_b, _ in self.scores]
        betas = [jnp.full((1, TILE), -1.0, jnp.float32)] * len(systems)
        self.inverses = yield from resolvents(dots, systems, betas, size)
        self.given, self.written = [], []
        for slot in self.slots:
            if hasattr(self.chunk.refs, "resolvent"):
                self.chunk.store("resolvent", slot, self.inverses[slot])
            self.given.append(self.of_values(slot))
            v = self.chunk.load("v", slot, plan.value_dim)
            self.written.append(dots.outer(v, self.keys[slot].writes()[size:]))
            yield

    def of_values(self, slot: int) -> tuple[Array, Array]:
        """A_k V, of two passes, and P_k V."""
        dots, size, v = self.plan.dots, self.plan.tiles.chunk, self.chunk.load("v", slot, self.plan.value_dim)
        _, attention, _, system = self.scores[slot]
        rows = [system] if dots.exact else list(parts(system))
        found = dots.nn(jnp.concatenate([attention, *rows]), dots.spread(v))
        found = [found[start : start + size] for start in range(0, found.shape[0], size)]
        return sum(found[2:], found[1]), found[0]

    def scan(self, states: list[Array]) -> Iterator[None]:
        plan, dots, size = self.plan, self.plan.dots, self.plan.tiles.chunk
        before = list(states)
        if hasattr(self.chunk.refs, "kept"):
            kept = self.chunk.refs.kept
            for slot in self.slots:
                kept[self.chunk.index, slot] = states[slot].astype(plan.dtype)
            # Of the profiler: a conversion both stored and multiplied aborts it.
            before = [kept[self.chunk.index, slot] for slot in self.slots]
        # Step by step for all slots: the compiler overlaps what stands side by side.
        found = [dots.nt(keys.reads(), dots.state(state)) for keys, state in zip(self.keys, before, strict=True)]
        yield
        right = [x[size:] + of_keys for x, (of_keys, _) in zip(found, self.given, strict=True)]
        u = [x + precise(dots, y, lanes.spread(x, dots.pack)) for x, y in zip(right, self.inverses, strict=True)]
        yield
        for slot, keys in enumerate(self.keys):
            values = [u[slot]] if dots.exact else list(parts(u[slot]))
            writes = [keys.writes()[:size]] * len(values)
            written = self.written[slot] + dots.outer(jnp.concatenate(values), jnp.concatenate(writes))
            states[slot] = keys.decays.total * states[slot] + keys.decays.tail * written
        yield
        for slot in self.slots:
            attention = precise(dots, self.scores[slot][0], lanes.spread(u[slot], dots.pack))
            self.chunk.store("out", slot, found[slot][:size] + self.given[slot][1] + attention)
            if hasattr(self.chunk.refs, "corrections"):
                self.chunk.store("corrections", slot, u[slot])
            yield


class Backward:
    """What a chunk needs without the gradient of a state (`prepare`), with one (`scan`) and after it (`finish`)."""

    def __init__(self, plan: Plan, chunk: Chunk):
        self.plan, self.chunk, self.slots = plan, chunk, range(plan.tiles.heads)

    def prepare(self) -> Iterator[None]:
        plan, dots, size = self.plan, self.plan.dots, self.plan.tiles.chunk
        self.keys = [keys_of(plan, self.chunk, slot) for slot in self.slots]
        scores = yield from rounds([keys.scores() for keys in self.keys])
        self.systems, self.from_out, self.d_reads = [], [], []
        for slot, (q_b, q_k, _, a_k) in enumerate(scores):
            d_out = self.chunk.load("d_out", slot, plan.value_dim)
            self.systems.append(a_k)
            self.from_out.append(jnp.concatenate([dots.outer(x, d_out) for x in (q_b, q_k)]))  # of U and V
            self.d_reads.append(dots.outer(d_out, self.keys[slot].reads()[:size]))
            yield

    def scan(self, d_states: list[Array]) -> Iterator[None]:
        dots, size = self.plan.dots, self.plan.tiles.chunk
        self.d_ends = [keys.decays.tail * d_state for keys, d_state in zip(self.keys, d_states, strict=True)]
        written = [
            x + dots.nt(keys.writes(), dots.state(d_end))
            for x, keys, d_end in zip(self.from_out, self.keys, self.d_ends, strict=True)
        ]
        yield
        inverses = [self.chunk.load("resolvent", slot, TILE) for slot in self.slots]
        self.e = [x[:size] + precise_outer(dots, y, x[:size]) for x, y in zip(written, inverses, strict=True)]
        self.dv = [x[size:] for x in written]
        yield
        self.later = []
        for slot, keys in enumerate(self.keys):
            state, total = self.chunk.refs.kept[self.chunk.index, slot], keys.decays.total
            self.later.append(total * jnp.sum(state.astype(jnp.float32) * d_states[slot], axis=0, keepdims=True))
            read = self.d_reads[slot] + dots.outer(self.e[slot], keys.reads()[size:])
            d_states[slot] = total * d_states[slot] + read
        yield

    def finish(self) -> Iterator[None]:
        yield from rounds([self.store_gradients(slot) for slot in self.slots])

    def store_gradients(self, slot: int) -> Iterator[None]:
        plan, dots, size, chunk = self.plan, self.plan.dots, self.plan.tiles.chunk, self.chunk
        keys, e = self.keys[slot], self.e[slot]
        u, v, d_out = (chunk.load(x, slot, plan.value_dim).astype(jnp.float32) for x in ("corrections", "v", "d_out"))
        chunk.store("dv", slot, self.dv[slot] + dots.outer(self.systems[slot], e))

        d_read, written = jnp.concatenate([d_out, e]), jnp.concatenate([u, v])
        spread = jnp.concatenate([lanes.spread(x, dots.pack) for x in (u, v)])
        d_scores = dots.nt(d_read, spread)
        d_scores = [d_scores[start : start + size] for start in (0, size)]
        yield
        dq, da, db, dk = yield from keys.gradients([x[:, y : y + TILE] for x in d_scores for y in (0, TILE)])
        d_states = dots.nn(d_read, dots.state(chunk.refs.kept[chunk.index, slot]))
        dq, da = dq + keys.decays.read * d_states[:size], da + keys.decays.read * d_states[size:]
        d_ends = dots.nn(written, dots.state(self.d_ends[slot]))
        b_end, k_end = keys.decays.write * d_ends[:size], keys.decays.write * d_ends[size:]
        db, dk = db + b_end, dk + k_end

        later = self.later[slot] + jnp.sum(keys.b * b_end + keys.k * k_end, axis=0, keepdims=True)
        before = keys.a * da  # decays of earlier tokens alone
        changes = keys.decayed * dq + before - keys.b * db - keys.k * dk
        chunk.store("d_decay", slot, dots.count(lambda i, j: j >= i, changes) - before + later)
        chunk.store("da", slot, da)
        own_b, own_k = (head_products(dots, x, d_out) for x in (u, v))
        dq = keys.decays.own * dq + own_b * keys.b + own_k * keys.k
        chunk.store("dq", slot, plan.scale * dq)
        chunk.store("db", slot, db + own_b * keys.q)
        chunk.store("dk", slot, dk + own_k * keys.q)
