"""The recurrence as one Pallas kernel for TPUs, which runs from left to right and, for the gradients, back.

    forward:  h_t = a_t h_{t-1} + x_t                        a_t = exp(g_t), 0 where a segment starts
    backward: w_t = a_t w_{t+1} + a_t dh_t,  w_{T+1} = dS,   u_t = dh_t + w_{t+1}
              dx_t = u_t,  dg_t = w_t h_{t-1},  dh_0 = w_1

Channels lie in lanes, time in sublanes. The grid is (batch, channel blocks, time blocks), the last in order; the state
stays in VMEM over the time blocks, in the output that becomes the final state. A vector register holds 8 tokens of 128
channels. They are scanned in 3 steps: after those of distance d = 1, 2, 4 a token has seen 2, 4, 8 tokens, by

    x_t <- x_t + a_t x_{t-d},   a_t <- a_t a_{t-d}

and then the state before the 8 tokens is added, times a_t. Only this waits for the 8 tokens before; the registers of a
block's other channels fill the wait.

TPU kernels have no complex numbers: complex arrays are two planes, real and imaginary. The exp of a decay per token is
taken in the kernel, which waits for memory otherwise; that of a fixed one before it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array, Inexact, Int
from kernels.mosaic_tpu import Interpret, interpret
from kernels.segments import segment_starts

LANES, SUBLANES = 128, 8
TURN = 16  # tokens of a turn of the loop: the rows of a bfloat16 tile
WIDTH = 512  # channels of a block at most: 4 independent registers hide the latency of a step, 8 spill in the backward
BLOCK_BYTES = 2**20  # of an array's block in float32; the backward has five, each twice, in 16 MiB
FORGET = -1e30  # exp of it is 0


@dataclasses.dataclass(frozen=True)
class Plan:
    time: int
    channels: int
    planes: int  # 2: real and imaginary
    block: int  # tokens of a block
    width: int  # channels of a block
    interpret: Interpret

    @property
    def grid(self) -> tuple[int, int]:  # but for the batch
        return pl.cdiv(self.channels, self.width), pl.cdiv(self.time, self.block)

    @property
    def ragged(self) -> bool:
        return self.time % self.block != 0


def mosaic_tpu(
    x: Inexact[Array, "B T D"],
    log_decay: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    *,
    initial_state: Inexact[Array, "B D"],
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """h [B, T, D] and the final state; see `linear_scan`. `chunk_size` is the tokens of a block; 16 divide it.

    Raises:
      NotImplementedError: a GPU, or an x that is neither float32, bfloat16 nor complex64.
    """
    how = interpret()
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
        raise NotImplementedError(f"x is {x.dtype}, expected float32, bfloat16 or complex64")
    if segment_ids is not None:
        starts = segment_starts(segment_ids)[..., None]
        log_decay = jnp.where(starts, FORGET, jnp.broadcast_to(log_decay, x.shape))
    _, T, D = x.shape
    width = _round_up(pl.cdiv(D, pl.cdiv(D, WIDTH)), LANES)
    planes = len(_planes(x))
    longest = BLOCK_BYTES // (4 * planes * width) // TURN * TURN
    block = min(_round_up(T, TURN), longest, longest if chunk_size is None else _round_up(chunk_size, TURN))
    return _scan(Plan(T, D, planes, block, width, how), x, log_decay, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, x, log_decay, initial_state):
    return _forward(plan, x, log_decay, initial_state)[0]


def _forward(plan, x, log_decay, initial_state):
    h, final_state = _call(plan, x, log_decay, initial_state)
    return (h, final_state), (h, log_decay, initial_state)


def _backward(plan, residuals, gradients):
    dx, dinitial, dlog_decay = _call(plan, gradients[0], residuals[1], gradients[1], residuals)
    return dx, dlog_decay.sum((0, 1)) if residuals[1].ndim == 1 else dlog_decay, dinitial


_scan.defvjp(_forward, _backward)


def _call(plan, x, log_decay, state, residuals=None):
    """h and the final state; with residuals, x and the state being dh and dS: dx, dinitial, dlog_decay."""
    reverse, per_token = residuals is not None, log_decay.ndim == 3
    columns, blocks = plan.grid

    def spec(rows, row_block):
        at = lambda t: row_block(blocks - 1 - t if reverse else t)  # noqa: E731
        return pl.BlockSpec((None, rows, plan.width), lambda b, d, t: (b, at(t), d))

    tokens, row = spec(plan.block, lambda t: t), spec(1, lambda t: 0)
    fixed = pl.BlockSpec((None, 1, plan.width), lambda b, d, t: (0, 0, d))
    turns = plan.block // TURN
    inputs = [
        (x, tokens),
        (log_decay, tokens) if per_token else (jnp.exp(log_decay)[None, None], fixed),
        (state[:, None], row),
    ]
    outputs = [(x.shape, x.dtype, tokens), (inputs[2][0].shape, state.dtype, row)]
    if reverse:
        h, _, initial_state = residuals
        # The tokens before a block: those of the left neighbour's last turn.
        inputs += [(h, tokens), (h, spec(TURN, lambda t: jnp.maximum(t * turns - 1, 0))), (initial_state[:, None], row)]
        outputs.append((x.shape, state.dtype, tokens) if per_token else (inputs[2][0].shape, state.dtype, row))
    results = pl.pallas_call(
        functools.partial(_kernel, plan, reverse, per_token),
        grid=(x.shape[0], columns, blocks),
        in_specs=[spec for _, spec in inputs for _ in range(plan.planes)],
        out_specs=[spec for *_, spec in outputs for _ in range(plan.planes)],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32 if dtype == jnp.complex64 else dtype)
            for shape, dtype, _ in outputs
            for _ in range(plan.planes)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=plan.interpret,
        name=f"linear_scan_{'complex_' * (plan.planes - 1)}{'backward' if reverse else 'forward'}",
    )(*(plane for array, _ in inputs for plane in _planes(array)))
    out, state, *rest = _by_planes(plan, results)
    joined = lambda planes: lax.complex(*planes) if len(planes) == 2 else planes[0]  # noqa: E731
    return joined(out), joined(state)[:, 0], *map(joined, rest)


def _kernel(plan, reverse, per_token, *refs):
    x, decay, given, *rest = _by_planes(plan, refs)
    if reverse:
        h, before, initial, out, state, d_decay = rest
    else:
        out, state = rest
    step, turns, shape = pl.program_id(2), plan.block // TURN, (TURN, plan.width)
    block = plan.grid[1] - 1 - step if reverse else step
    row = lax.broadcasted_iota(jnp.int32, shape, 0)

    @pl.when(step == 0)
    def _():
        for ref, start in zip(state, given, strict=True):
            ref[...] = start[...]
        for ref in d_decay if reverse and not per_token else ():
            ref[...] = jnp.zeros_like(ref)

    def rows(i):
        return pl.ds(pl.multiple_of(i * TURN, TURN), TURN)

    def turn(i, carry):
        carried, later, total = carry
        i = turns - 1 - i if reverse else i
        x_t = _load(x, rows(i))
        a = _exp(_load(decay, rows(i))) if per_token else _load(decay, slice(None), shape)
        inside = row + (block * plan.block + i * TURN) < plan.time
        if plan.ragged:  # tokens past the end, of any bits: input 0 and decay 1 leave the state alone
            x_t = [jnp.where(inside, plane, 0.0) for plane in x_t]
            a = [jnp.where(inside, plane, one) for plane, one in zip(a, (1.0, 0.0), strict=False)]
        if not reverse:
            h_t, carried = _scan_rows(x_t, a, carried, reverse)
            _store(out, rows(i), h_t)
            return carried, later, total

        w_next = carried
        w, carried = _scan_rows(_times(a, x_t), a, carried, reverse)
        w_next = [
            jnp.where(row == TURN - 1, jnp.concatenate([edge] * (TURN // SUBLANES)), pltpu.roll(plane, TURN - 1, 0))
            for edge, plane in zip(w_next, w, strict=True)
        ]
        _store(out, rows(i), _plus(x_t, w_next))
        earlier = [
            jnp.where(i == 0, first, plane)
            for first, plane in zip(before_block, _load(h, rows(jnp.maximum(i - 1, 0))), strict=True)
        ]
        h_before = [
            jnp.where(row == 0, pltpu.roll(edge, 1, 0), pltpu.roll(plane, 1, 0))
            for edge, plane in zip(earlier, later, strict=True)
        ]
        dg = _times(w, h_before)
        if per_token:
            _store(d_decay, rows(i), dg)
        else:
            dg = [jnp.where(inside, plane, 0.0) for plane in dg] if plan.ragged else dg
            total = _plus(total, [plane[:SUBLANES] + plane[SUBLANES:] for plane in dg])
        return carried, earlier, total

    edge = (SUBLANES, plan.width)
    later, total = [], []
    if reverse:
        before_block = [
            jnp.where(block == 0, first, plane)
            for first, plane in zip(_load(initial, slice(None), shape), _load(before, slice(None)), strict=True)
        ]
        later = _load(h, rows(turns - 1))
        total = [] if per_token else [jnp.zeros(edge, jnp.float32)] * plan.planes
    carried, _, total = lax.fori_loop(0, turns, turn, (_load(state, slice(None), edge), later, total))
    _store(state, slice(None), [plane[:1] for plane in carried])
    for ref, plane in zip(d_decay, total, strict=True) if total else ():
        ref[...] += jnp.sum(plane, axis=0, keepdims=True)


def _scan_rows(x, a, state, reverse):
    """s_t = a_t s_{t-1} + x_t (reverse: s_{t+1}) of [TURN, W], and the state past the end, on the 8 rows of `state`."""
    row = lax.broadcasted_iota(jnp.int32, state[0].shape, 0)
    out = []
    starts = range(0, TURN, SUBLANES)
    for start in reversed(starts) if reverse else starts:
        s, decay = ([plane[start : start + SUBLANES] for plane in planes] for planes in (x, a))
        for distance in (1, 2, 4):
            seen = row < SUBLANES - distance if reverse else row >= distance
            shift = SUBLANES - distance if reverse else distance

            def near(planes, outside, seen=seen, shift=shift):
                pairs = zip(planes, outside, strict=False)
                return [jnp.where(seen, pltpu.roll(plane, shift, 0), value) for plane, value in pairs]

            s = _plus(s, _times(decay, near(s, (0.0, 0.0))))
            decay = _times(decay, near(decay, (1.0, 0.0)))
        s = _plus(s, _times(decay, state))
        out.append(s)
        end = 0 if reverse else SUBLANES - 1
        state = [jnp.broadcast_to(plane[end : end + 1], plane.shape) for plane in s]
    return [jnp.concatenate(planes) for planes in zip(*(out[::-1] if reverse else out), strict=True)], state


def _round_up(size, multiple):
    return size + -size % multiple


def _planes(x):
    return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)


def _by_planes(plan, items):
    return [items[i : i + plan.planes] for i in range(0, len(items), plan.planes)]


def _load(refs, rows, shape=None):
    values = [ref[rows].astype(jnp.float32) for ref in refs]
    return values if shape is None else [jnp.broadcast_to(value, shape) for value in values]


def _store(refs, rows, values):
    for ref, value in zip(refs, values, strict=True):
        ref[rows] = value.astype(ref.dtype)


def _exp(a):
    size = jnp.exp(a[0])
    return [size] if len(a) == 1 else [size * jnp.cos(a[1]), size * jnp.sin(a[1])]


def _times(a, b):
    if len(a) == 1:
        return [a[0] * b[0]]
    return [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]]


def _plus(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]
