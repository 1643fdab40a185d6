"""The kernels: what a grid step computes, a chunk of its tokens after the other, and what stays in VMEM between steps.

The states of all heads of the grid's second axis stay in VMEM over the time blocks, in the block of the output that
becomes the final state.

The backward pass goes from right to left. The states at the starts of the time blocks were kept by the forward
pass; those of the chunks inside are computed again.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu import per_key, scalar
from kernels.linear_attention.mosaic_tpu.chunk import Chunk
from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.linear_attention.mosaic_tpu.plan import Plan


def forward_kernel(plan: Plan, refs: Any) -> None:
    dots, block = Dots(plan.dtype), pl.program_id(2)
    first_head = pl.program_id(3) * plan.tiles.heads

    @pl.when((block == 0) & (pl.program_id(3) == 0))
    def _():
        refs.state[...] = refs.initial_state[...]

    if hasattr(refs, "kept"):
        refs.kept[...] = refs.state[pl.ds(first_head, plan.tiles.heads)]

    def body(index):
        chunk = Chunk(plan, refs, index, block)
        decays = chunk.decays(dots)
        for group in range(plan.step_groups):
            q, k = chunk.keys(group, "q", "k")
            for head in plan.heads_of(group):
                v = chunk.load("v", head, plan.value_dim)
                state = refs.state[first_head + head]
                if plan.per_key:
                    q32, k32, u = chunk.per_key_operands(q, k, head)
                    out = per_key.forward(dots, q32, k32, v, u, decays[head], state)
                    state = per_key.update(dots, k32, v, decays[head], state)
                else:
                    out = scalar.forward(dots, q, k, v, decays[head], state, plan.scale)
                    state = scalar.update(dots, k, v, decays[head], state)
                chunk.store("out", head, out)
                refs.state[first_head + head] = state

    over_chunks(plan, body)


def backward_kernel(plan: Plan, refs: Any) -> None:
    dots, tiles = Dots(plan.dtype), plan.tiles
    block = plan.blocks - 1 - pl.program_id(2)
    first_head = pl.program_id(3) * tiles.heads

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        refs.d_state[...] = refs.d_final_state[...]
        if plan.bonus:
            refs.d_bonus[...] = jnp.zeros_like(refs.d_bonus)

    if plan.inner > 1:

        @pl.when(pl.program_id(3) == 0)
        def _():
            refs.dq_sum[...] = jnp.zeros_like(refs.dq_sum)
            refs.dk_sum[...] = jnp.zeros_like(refs.dk_sum)

    compute_states(plan, refs, dots, block)

    def body(index):
        chunk = Chunk(plan, refs, index, block)
        decays = chunk.decays(dots, sums="load")
        changes = []
        for group in range(plan.step_groups):
            q, k = chunk.keys(group, "q", "k")
            dq = dk = 0.0
            for head in plan.heads_of(group):
                dq_head, dk_head, change = backward_head(
                    plan, refs, dots, chunk, index, head, first_head, q, k, decays[head]
                )
                dq, dk = dq + dq_head, dk + dk_head
                changes.append(change)
            if plan.inner > 1:
                refs.dq_sum[chunk.rows, :] += dq
                refs.dk_sum[chunk.rows, :] += dk
            else:
                chunk.store("dq", group, dq)
                chunk.store("dk", group, dk)
        if not plan.per_key:
            chunk.store_changes(changes)

    over_chunks(plan, body, reverse=True)
    if plan.inner > 1:

        @pl.when(pl.program_id(3) == plan.inner - 1)
        def _():
            refs.dq[...] = refs.dq_sum[...].astype(plan.dtype)
            refs.dk[...] = refs.dk_sum[...].astype(plan.dtype)


def compute_states(plan: Plan, refs: Any, dots: Dots, block: int | Array) -> None:
    """The states at the starts of the block's chunks and at its end, into `refs.states`."""
    for head in range(plan.tiles.heads):
        refs.states[0, head] = refs.kept[head].astype(plan.dtype)
    count = plan.tiles.block // plan.tiles.chunk

    def body(index, states):
        chunk = Chunk(plan, refs, index, block)
        decays, new = chunk.decays(dots, sums="keep"), []
        for group in range(plan.step_groups):
            (k,) = chunk.keys(group, "k")
            for head in plan.heads_of(group):
                v = chunk.load("v", head, plan.value_dim)
                update = per_key.update if plan.per_key else scalar.update
                k = k.astype(jnp.float32) if plan.per_key else k
                new.append(update(dots, k, v, decays[head], states[head]))
                refs.states[index + 1, head] = new[-1].astype(plan.dtype)
        return tuple(new)

    states = tuple(refs.kept[head] for head in range(plan.tiles.heads))
    lax.fori_loop(0, count, body, states, unroll=min(plan.tiles.unroll_backward, count))


def backward_head(
    plan: Plan,
    refs: Any,
    dots: Dots,
    chunk: Chunk,
    index: int | Array,
    head: int | Array,
    first_head: int | Array,
    q: Array,
    k: Array,
    decay: per_key.Decay | scalar.Decay,
) -> tuple[Array | None, ...]:
    """dq, dk [C, K], and the terms of the gradient of a scalar decay, [C, 1]; everything else is stored."""
    v, d_out = (chunk.load(name, head, plan.value_dim) for name in ("v", "d_out"))
    tiles, d_end = plan.tiles, refs.d_state[first_head + head]
    state, next_state = refs.states[index, head], refs.states[index + 1, head].astype(jnp.float32)
    if not plan.per_key:
        dq, dk, dv, d_state = scalar.backward(dots, q, k, v, d_out, decay, state, d_end, plan.scale)
        chunk.store("dv", head, dv)
        refs.d_state[first_head + head] = d_state
        # What later chunks add to every token's sum goes to the last token.
        last = lax.broadcasted_iota(jnp.int32, (tiles.chunk, 1), 0) == tiles.chunk - 1
        later = jnp.sum(jnp.sum(next_state * d_end, axis=0, keepdims=True), axis=1, keepdims=True)
        return dq, dk, jnp.sum(q * dq - k * dk, axis=1, keepdims=True) + jnp.where(last, later, 0.0)
    q32, k32, u = chunk.per_key_operands(q, k, head)
    gradients = per_key.backward(dots, q32, k32, v, u, d_out, decay, state, d_end)
    chunk.store("dv", head, gradients.v)
    refs.d_state[first_head + head] = gradients.state
    later = jnp.sum(next_state * d_end, axis=0, keepdims=True)
    d_decay = per_key.log_decay_gradient(dots, gradients.reads, gradients.writes, later, plan.bonus)
    if plan.starts:  # nothing flows through the decay of a segment's first token
        d_decay = jnp.where(refs.starts[:, chunk.rows].T[:, :1] > 0, 0.0, d_decay)
    chunk.store("d_decay", head, d_decay)
    if plan.bonus:
        refs.d_bonus[first_head + head] += gradients.bonus
    return plan.scale * gradients.q, gradients.k, None


def over_chunks(plan: Plan, body: Callable, reverse: bool = False) -> None:
    count = plan.tiles.block // plan.tiles.chunk
    unroll = plan.tiles.unroll_backward if reverse else plan.tiles.unroll
    if count == 1:
        body(0)
        return

    def step(i, carry):
        body(count - 1 - i if reverse else i)
        return carry

    lax.fori_loop(0, count, step, 0, unroll=min(unroll, count))
