"""The grid, the blocks and the kernels: which tokens and heads a step computes, and what stays in VMEM.

The grid is (batch, head blocks that share no q and k, time blocks, head blocks that share them), the last two in
order. A step loads a block of tokens of a few heads and goes through it in chunks. q, k, v stay as [B, T, heads * X],
of which a block of lanes is some heads: nothing is transposed in memory. The states of all heads of the second
axis stay in VMEM over the time blocks, in the block of the output that becomes the final state. Heads of v that
share q and k are in the last axis, so that q and k are loaded once.

The backward pass goes from right to left. The states at the starts of the time blocks were kept by the forward
pass; those of the chunks inside are computed again.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_attention.mosaic_tpu import per_key, scalar
from kernels.linear_attention.mosaic_tpu.dots import LANES, Dots
from kernels.linear_attention.specs import Tiles

VMEM_LIMIT = 100 * 2**20  # bytes; of 128 MiB on v5e and v6e
FASTEST = -50.0  # log-decays of bfloat16 calls: e^-50 leaves nothing, and sums of more extreme ones lose digits
SEGMENT_START = -128.0  # exp of it is 0 in float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call: padded sizes, tiles, and what it has. `tiles.heads` of v are computed in a step."""

    batch: int
    time: int
    groups: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: jnp.dtype
    scale: float
    tiles: Tiles
    per_key: bool
    bonus: bool
    starts: bool  # per-key decays: a row of segment starts; scalar ones have them in their sums
    constant: bool  # scalar decays that are the same in every chunk
    interpret: object

    @property
    def shared(self):  # heads of v that share q and k
        return self.heads // self.groups

    @property
    def step_groups(self):  # heads of q and k of a step
        return max(1, self.tiles.heads // self.shared)

    @property
    def inner(self):  # steps that share q and k
        return max(1, self.shared // self.tiles.heads)

    @property
    def outer(self):
        return self.heads // (self.inner * self.tiles.heads)

    @property
    def blocks(self):
        return pl.cdiv(self.time, self.tiles.block)

    @property
    def ragged(self):
        return self.time % self.tiles.block != 0

    @property
    def state_shape(self):  # of one head
        return (self.value_dim, self.key_dim) if self.per_key else (self.key_dim, self.value_dim)


def forward(plan, q, k, v, decay, bonus, starts, initial_state, keep_states):
    """out [B, T, H * V]; final state [B, H, ...]; the states at the starts of time blocks [B, N, H, ...] or None."""
    inputs = _inputs(plan, q=q, k=k, v=v, decay=decay, bonus=bonus, starts=starts, initial_state=initial_state)
    outputs = {
        "out": (v.shape, plan.dtype),
        "state": (initial_state.shape, jnp.float32),
    }
    if keep_states:
        outputs["kept"] = ((plan.batch, plan.blocks, plan.heads, *plan.state_shape), jnp.float32)
    result = _call(plan, _forward_kernel, inputs, outputs)
    return result["out"], result["state"], result.get("kept")


def backward(plan, q, k, v, decay, bonus, starts, kept, d_out, d_final_state):
    """The gradients by name; of scalar decays `changes`, whose sums over later tokens of a chunk they are."""
    inputs = _inputs(
        plan, q=q, k=k, v=v, d_out=d_out, decay=decay, bonus=bonus, starts=starts, kept=kept,
        d_final_state=d_final_state,
    )  # fmt: skip
    tiles, step_heads = plan.tiles, plan.tiles.heads
    outputs = {
        "dq": (q.shape, plan.dtype),
        "dk": (k.shape, plan.dtype),
        "dv": (v.shape, plan.dtype),
        "d_state": (d_final_state.shape, jnp.float32),
    }
    steps = plan.outer * plan.inner
    if plan.per_key:
        outputs["d_decay"] = (decay.shape, jnp.float32)
    else:
        outputs["changes"] = ((plan.batch, steps, 8 * pl.cdiv(step_heads, 8), plan.blocks * tiles.block), jnp.float32)
    if plan.bonus:
        outputs["d_bonus"] = ((plan.batch, plan.heads, 1, plan.key_dim), jnp.float32)
    scratch = {"states": pltpu.VMEM((tiles.block // tiles.chunk + 1, step_heads, *plan.state_shape), plan.dtype)}
    if plan.inner > 1:
        for name in ("dq_sum", "dk_sum"):
            scratch[name] = pltpu.VMEM((tiles.block, plan.key_dim), jnp.float32)
    if plan.per_key:
        scratch["sums"] = pltpu.VMEM((tiles.block, step_heads * plan.key_dim), jnp.float32)
    return _call(plan, _backward_kernel, inputs, outputs, scratch, reverse=True)


def _inputs(plan, **arrays):
    return {name: array for name, array in arrays.items() if array is not None}


def _call(plan, kernel, inputs, outputs, scratch=None, reverse=False):
    scratch = scratch or {}
    names = [*inputs, *outputs, *scratch]
    results = pl.pallas_call(
        functools.partial(_with_names, kernel, plan, names),
        grid=(plan.batch, plan.outer, plan.blocks, plan.inner),
        in_specs=[_block(plan, name, array.shape, reverse) for name, array in inputs.items()],
        out_specs=[_block(plan, name, shape, reverse) for name, (shape, _) in outputs.items()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=plan.interpret,
        name=f"linear_attention_{'per_key' if plan.per_key else 'scalar'}{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _with_names(kernel, plan, names, *refs):
    kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True))))


def _block(plan, name, shape, reverse):
    """The block of an operand that a step sees, by what the operand is."""
    tiles = plan.tiles

    def time(n):
        return plan.blocks - 1 - n if reverse else n

    def step(p, s):
        return p * plan.inner + s

    if name in ("q", "k", "dq", "dk"):
        return pl.BlockSpec((None, tiles.block, plan.step_groups * plan.key_dim), lambda b, p, n, s: (b, time(n), p))
    if name in ("v", "out", "d_out", "dv") or (name in ("decay", "d_decay") and plan.per_key):
        width = tiles.heads * (plan.key_dim if "decay" in name else plan.value_dim)
        return pl.BlockSpec((None, tiles.block, width), lambda b, p, n, s: (b, time(n), step(p, s)))
    if name in ("decay", "changes"):
        batch = (lambda b: b) if shape[0] > 1 else (lambda b: 0)
        if name == "decay" and plan.constant:
            block = (None, None, shape[2], tiles.chunk)
            return pl.BlockSpec(block, lambda b, p, n, s: (batch(b), step(p, s), 0, 0))
        block = (None, None, shape[2], tiles.block)
        return pl.BlockSpec(block, lambda b, p, n, s: (batch(b), step(p, s), 0, time(n)))
    if name == "starts":
        return pl.BlockSpec((None, 8, tiles.block), lambda b, p, n, s: (b, 0, time(n)))
    if name == "kept":
        block = (None, None, tiles.heads, *plan.state_shape)
        return pl.BlockSpec(block, lambda b, p, n, s: (b, time(n), step(p, s), 0, 0))
    if name == "bonus":
        return pl.BlockSpec((tiles.heads, 1, plan.key_dim), lambda b, p, n, s: (step(p, s), 0, 0))
    # States and their kin: of all heads of the inner axis, in place for the whole sequence.
    return pl.BlockSpec((None, plan.inner * tiles.heads, *shape[2:]), lambda b, p, n, s: (b, p, 0, 0))


class _Chunk:
    """Loads and stores of one chunk of a step's block."""

    def __init__(self, plan, refs, index, block):
        self.plan, self.refs = plan, refs
        chunk = plan.tiles.chunk
        start = index * chunk
        self.rows = pl.ds(start if isinstance(index, int) else pl.multiple_of(start, chunk), chunk)
        self.lanes = pl.ds(0, chunk) if plan.constant else self.rows
        token = block * plan.tiles.block + start + lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
        self.valid = token < plan.time if plan.ragged else None

    def load(self, name, head, width):
        """[C, width] of one head; rows after the last token are zero."""
        x = getattr(self.refs, name)[self.rows, head * width : (head + 1) * width]
        return x if self.valid is None else jnp.where(self.valid, x, jnp.zeros_like(x))

    def store(self, name, head, x):
        ref, width = getattr(self.refs, name), x.shape[1]
        ref[self.rows, head * width : (head + 1) * width] = x.astype(ref.dtype)

    def decays(self, dots, sums="compute"):
        """Of each head of the step. Sums of decays per key: "compute" them, "keep" them in `refs.sums`, "load" them."""
        plan, refs = self.plan, self.refs
        if not plan.per_key:
            return scalar.decays(dots, refs.decay[:, self.lanes], plan.tiles.heads)
        starts = None
        if plan.starts:
            column = SEGMENT_START * refs.starts[:, self.rows].T[:, :1]
            starts = jnp.broadcast_to(column, (plan.tiles.chunk, plan.key_dim))
        result = []
        for head in range(plan.tiles.heads):
            g = self.load("decay", head, plan.key_dim).astype(jnp.float32)
            g = jnp.maximum(g, -1e30 if dots.exact else FASTEST)
            if dots.exact:
                cumulative = None
            elif sums == "load":
                cumulative = refs.sums[self.rows, head * plan.key_dim : (head + 1) * plan.key_dim]
            else:
                cumulative = per_key.cumulative_sums(dots, g, starts)
                if sums == "keep":
                    self.store("sums", head, cumulative)
            result.append(per_key.decay(dots, g, starts, plan.bonus, cumulative))
        return result

    def keys(self, group, *names):
        return [self.load(name, group, self.plan.key_dim) for name in names]

    def per_key_operands(self, q, k, head):
        u = self.refs.bonus[head] if self.plan.bonus else None
        return self.plan.scale * q.astype(jnp.float32), k.astype(jnp.float32), u


def _heads_of(plan, group):
    """The step's heads of v that read head `group` of its q and k."""
    count = plan.tiles.heads // plan.step_groups
    return range(group * count, (group + 1) * count)


def _over_chunks(plan, body, reverse=False):
    count = plan.tiles.block // plan.tiles.chunk
    unroll = plan.tiles.unroll_backward if reverse else plan.tiles.unroll
    if count == 1:
        body(0)
        return

    def step(i, carry):
        body(count - 1 - i if reverse else i)
        return carry

    lax.fori_loop(0, count, step, 0, unroll=min(unroll, count))


def _forward_kernel(plan, refs):
    dots, block = Dots(plan.dtype), pl.program_id(2)
    first_head = pl.program_id(3) * plan.tiles.heads

    @pl.when((block == 0) & (pl.program_id(3) == 0))
    def _():
        refs.state[...] = refs.initial_state[...]

    if hasattr(refs, "kept"):
        refs.kept[...] = refs.state[pl.ds(first_head, plan.tiles.heads)]

    def body(index):
        chunk = _Chunk(plan, refs, index, block)
        decays = chunk.decays(dots)
        for group in range(plan.step_groups):
            q, k = chunk.keys(group, "q", "k")
            for head in _heads_of(plan, group):
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

    _over_chunks(plan, body)


def _backward_kernel(plan, refs):
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

    _compute_states(plan, refs, dots, block)

    def body(index):
        chunk = _Chunk(plan, refs, index, block)
        decays = chunk.decays(dots, sums="load")
        changes = []
        for group in range(plan.step_groups):
            q, k = chunk.keys(group, "q", "k")
            dq = dk = 0.0
            for head in _heads_of(plan, group):
                dq_head, dk_head, change = _backward_head(
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
            _store_changes(refs, chunk, changes)

    _over_chunks(plan, body, reverse=True)
    if plan.inner > 1:

        @pl.when(pl.program_id(3) == plan.inner - 1)
        def _():
            refs.dq[...] = refs.dq_sum[...].astype(plan.dtype)
            refs.dk[...] = refs.dk_sum[...].astype(plan.dtype)


def _compute_states(plan, refs, dots, block):
    """The states at the starts of the block's chunks and at its end, into `refs.states`."""
    for head in range(plan.tiles.heads):
        refs.states[0, head] = refs.kept[head].astype(plan.dtype)
    count = plan.tiles.block // plan.tiles.chunk

    def body(index, states):
        chunk = _Chunk(plan, refs, index, block)
        decays, new = chunk.decays(dots, sums="keep"), []
        for group in range(plan.step_groups):
            (k,) = chunk.keys(group, "k")
            for head in _heads_of(plan, group):
                v = chunk.load("v", head, plan.value_dim)
                update = per_key.update if plan.per_key else scalar.update
                k = k.astype(jnp.float32) if plan.per_key else k
                new.append(update(dots, k, v, decays[head], states[head]))
                refs.states[index + 1, head] = new[-1].astype(plan.dtype)
        return tuple(new)

    states = tuple(refs.kept[head] for head in range(plan.tiles.heads))
    lax.fori_loop(0, count, body, states, unroll=min(plan.tiles.unroll_backward, count))


def _backward_head(plan, refs, dots, chunk, index, head, first_head, q, k, decay):
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


def _store_changes(refs, chunk, columns):
    """Columns [C, 1], one a head, as rows of `changes`."""
    size = columns[0].shape[0]
    rows = refs.changes.shape[0]
    lane = lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
    packed = jnp.zeros((size, LANES), jnp.float32)
    for head, column in enumerate(columns):
        packed = jnp.where(lane == head, column, packed)
    refs.changes[:, chunk.rows] = packed.T[:rows]
