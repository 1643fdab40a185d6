"""The kernels: what a grid step computes, a chunk of its tokens after the other, and what stays in VMEM between steps.

The states of all heads of the grid's second axis stay in VMEM over the time blocks, in the block of the output that
becomes the final state.

The backward pass goes from right to left. The states at the starts of the time blocks were kept by the forward
pass; those of the chunks inside are computed again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu import lanes, per_key, scalar
from kernels.linear_attention.mosaic_tpu.chunk import Chunk
from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.linear_attention.mosaic_tpu.plan import Plan
from kernels.linear_attention.mosaic_tpu.turns import in_turns
from kernels.mosaic_tpu.heads import finish_key_sums, start_key_sums


def forward_kernel(plan: Plan, refs: Any) -> None:
    dots, block = plan.dots, pl.program_id(2)
    first = plan.first_head()

    @pl.when((block == 0) & (pl.program_id(3) == 0))
    def _():
        refs.state[...] = refs.initial_state[...]

    if hasattr(refs, "kept"):
        refs.kept[...] = refs.state[pl.ds(first, plan.tiles.heads)]

    def per_key_body(index):
        chunk = Chunk(plan, refs, index, block)
        decays = chunk.decays_per_key(dots)
        for group, slot in slots_of_step(plan):
            q, k, u = chunk.per_key_operands(group, slot)
            v, state = chunk.load("v", slot, plan.value_dim), refs.state[first + slot]
            keys = lanes.spread(k, plan.pack)
            chunk.store("out", slot, per_key.forward(dots, q, k, keys, v, u, decays[slot], state))
            refs.state[first + slot] = per_key.update(dots, keys, v, decays[slot], state)

    def scalar_body(index):
        chunk = Chunk(plan, refs, index, block)
        for group, decay in enumerate(chunk.decays(dots)):
            slots, keys = plan.heads_of(group), chunk.keys(dots, group)
            v, state = chunk.load("v", slots, plan.value_dim), beside(refs.state, first, slots)
            chunk.store("out", slots, scalar.forward(dots, keys, v, decay, state, plan.scale))
            store_beside(refs.state, first, slots, scalar.update(dots, keys.keys, v, decay, state))

    over_chunks(plan, per_key_body if plan.per_key else scalar_body)


def backward_kernel(plan: Plan, refs: Any) -> None:
    dots, block, first = plan.dots, plan.blocks - 1 - pl.program_id(2), plan.first_head()

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        refs.d_state[...] = refs.d_final_state[...]
        if plan.bonus:
            refs.d_bonus[...] = jnp.zeros_like(refs.d_bonus)

    start_key_sums(plan, refs)
    compute_states(plan, refs, dots, block)

    def body(index):
        chunk = Chunk(plan, refs, index, block)
        gradients = (per_key_gradients if plan.per_key else scalar_gradients)(plan, refs, dots, chunk, first)
        for group, (dq, dk) in enumerate(gradients):
            if plan.inner > 1:
                refs.dq_sum[chunk.rows, :] += dq
                refs.dk_sum[chunk.rows, :] += dk
            else:
                chunk.store("dq", group, dq)
                chunk.store("dk", group, dk)

    over_chunks(plan, body, reverse=True)
    finish_key_sums(plan, refs)


def compute_states(plan: Plan, refs: Any, dots: Dots, block: int | Array) -> None:
    """The states at the starts of the block's chunks and at its end, into `refs.states`."""
    for slot in range(plan.tiles.heads):
        refs.states[0, slot] = refs.kept[slot].astype(plan.dtype)
    count = plan.tiles.block // plan.tiles.chunk

    def per_key_body(index, states):
        chunk = Chunk(plan, refs, index, block)
        decays, new = chunk.decays_per_key(dots, sums="keep"), []
        for group, slot in slots_of_step(plan):
            _, k, _ = chunk.per_key_operands(group, slot)
            keys, v = lanes.spread(k, plan.pack), chunk.load("v", slot, plan.value_dim)
            new.append(per_key.update(dots, keys, v, decays[slot], states[slot]))
            refs.states[index + 1, slot] = new[-1].astype(plan.dtype)
        return tuple(new)

    def scalar_body(index, states):
        chunk, new = Chunk(plan, refs, index, block), []
        for group, decay in enumerate(chunk.decays(dots)):
            slots, keys = plan.heads_of(group), dots.stack(chunk.load("k", group, plan.key_dim))
            new.append(scalar.update(dots, keys, chunk.load("v", slots, plan.value_dim), decay, states[group]))
            store_beside(refs.states.at[index + 1], 0, slots, new[-1])
        return tuple(new)

    if plan.per_key:
        states = tuple(refs.kept[slot] for slot in range(plan.tiles.heads))
    else:
        states = tuple(beside(refs.kept, 0, plan.heads_of(group)) for group in range(plan.step_groups))
    unroll = min(plan.tiles.unroll_backward, count)
    lax.fori_loop(0, count, per_key_body if plan.per_key else scalar_body, states, unroll=unroll)


def scalar_gradients(
    plan: Plan, refs: Any, dots: Dots, chunk: Chunk, first: int | Array
) -> Iterator[tuple[Array, Array]]:
    """dq, dk [C, (h, K)] of each group; everything else is stored."""
    index, columns, rows = chunk.index, [], []
    for group, decay in enumerate(chunk.decays(dots)):
        slots, keys = plan.heads_of(group), chunk.keys(dots, group)
        v, d_out = (chunk.load(name, slots, plan.value_dim) for name in ("v", "d_out"))
        state, next_state = (beside(refs.states.at[i], 0, slots) for i in (index, index + 1))
        d_end = beside(refs.d_state, first, slots)
        gradients = scalar.backward(dots, keys, v, d_out, decay, state, d_end, plan.scale)
        chunk.store("dv", slots, gradients.v)
        store_beside(refs.d_state, first, slots, gradients.state)
        # What later chunks add to every token's sum goes to the last token.
        last = lax.broadcasted_iota(jnp.int32, (plan.tiles.chunk, 1), 0) == plan.tiles.chunk - 1
        later = jnp.sum(next_state.astype(jnp.float32) * d_end, axis=0, keepdims=True)
        for terms, row in zip(gradients.terms, scalar.by_slot(later, len(slots)), strict=True):
            sums = zip(lanes.head_sums(terms, plan.pack), lanes.head_sums([row], plan.pack), strict=True)
            columns.append([column + jnp.where(last, more, 0.0) for column, more in sums])
        rows += gradients.taken
        yield gradients.q, gradients.k
    chunk.store_changes(columns, rows)


def per_key_gradients(
    plan: Plan, refs: Any, dots: Dots, chunk: Chunk, first: int | Array
) -> Iterator[tuple[Array, Array]]:
    """dq, dk [C, (h, K)] of each group; everything else is stored."""
    index, decays = chunk.index, chunk.decays_per_key(dots, sums="load")

    def compute(group, slot):
        q, k, u = chunk.per_key_operands(group, slot)
        v, d_out = (chunk.load(name, slot, plan.value_dim) for name in ("v", "d_out"))
        state, next_state = refs.states[index, slot], refs.states[index + 1, slot].astype(jnp.float32)
        d_end = refs.d_state[first + slot]
        gradients = yield from per_key.backward(dots, q, k, v, u, d_out, decays[slot], state, d_end)
        return gradients, jnp.sum(next_state * d_end, axis=0, keepdims=True)

    results = in_turns([compute(*place) for place in slots_of_step(plan)])
    for group in range(plan.step_groups):
        slots = plan.heads_of(group)
        for slot in slots:
            gradients, later = results[slot]
            chunk.store("dv", slot, gradients.v)
            refs.d_state[first + slot] = gradients.state
            d_decay = per_key.log_decay_gradient(dots, gradients.reads, gradients.writes, later, plan.bonus)
            if plan.starts:  # nothing flows through the decay of a segment's first token
                d_decay = jnp.where(chunk.starts() > 0, 0.0, d_decay)
            chunk.store("d_decay", slot, d_decay)
            if plan.bonus:
                refs.d_bonus[first + slot] += gradients.bonus
        first_gradients, *others = (results[slot][0] for slot in slots)
        dq = sum((x.q for x in others), first_gradients.q)
        yield plan.scale * dq, sum((x.k for x in others), first_gradients.k)


def slots_of_step(plan: Plan) -> Iterator[tuple[int, int]]:
    return ((group, slot) for group in range(plan.step_groups) for slot in plan.heads_of(group))


def beside(ref: Any, first: int | Array, slots: range) -> Array:
    """States [K, (slots, h, V)] of a reference [slots, K, (h, V)], of those from `first` on."""
    return jnp.concatenate([ref[first + slot] for slot in slots], axis=1)


def store_beside(ref: Any, first: int | Array, slots: range, states: Array) -> None:
    for slot, state in zip(slots, scalar.by_slot(states, len(slots)), strict=True):
        ref[first + slot] = state.astype(ref.dtype)


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
