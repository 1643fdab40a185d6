"""The grid, the blocks and the kernels: which tokens and channels a step computes, and what stays in VMEM.

The grid is (batch, channel groups, time blocks, channel blocks of a group), the last two in order. x, dt and y stay as
[B, T, D]: a step sees a block of tokens of some lanes. The states of a group's channels stay in VMEM over the time
blocks, in the block of the output that becomes the final state. B and C are spread over lanes once a time block, for
all channel blocks of it.

The backward pass goes from right to left. The states at the starts of the time blocks were kept by the forward pass;
those inside a block are computed again into VMEM. The gradients of B and C add up in VMEM over the channel blocks.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.selective_scan.mosaic_tpu.recurrence import LANES, ROWS, advance, pull, read, row_sums
from kernels.selective_scan.pallas import LOG2_E, START_STEP

VMEM_LIMIT = 100 * 2**20  # bytes; of 128 MiB on v5e and v6e
BLOCK = 128  # tokens of a step: as many as lanes, for the transposes that spread B and C
TURN = 16  # tokens of a turn of the loops: a tile of bfloat16 rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call: padded sizes, and what it has."""

    batch: int
    time: int
    channels: int
    state: int  # N
    width: int  # channels of a step
    groups: int  # of channels, for the cores of a chip
    packed: bool
    interpret: object

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.time, BLOCK)

    @property
    def ragged(self) -> bool:
        return self.time % BLOCK != 0

    @property
    def inner(self) -> int:  # channel blocks of a group
        return self.channels // (self.groups * self.width)


def forward(
    plan: Plan,
    x: Array,
    dt: Array,
    A2: Array,
    B: Array,
    C: Array,
    D: Array | None,
    starts: Array | None,
    initial_state: Array,
    keep_states: bool,
) -> tuple[Array | None, ...]:
    """y [B, T, D]; final state [B, N, D]; the states at the starts of time blocks [B, blocks, N, D], or None."""
    inputs = {"x": x, "dt": dt, "A2": A2, "B": B, "C": C, "D": D, "initial_state": initial_state}
    outputs = {"y": (x.shape, x.dtype), "state": (initial_state.shape, jnp.float32)}
    if keep_states:
        outputs["kept"] = ((plan.batch, plan.blocks, plan.state, plan.channels), jnp.float32)
    result = _call(plan, _forward_kernel, inputs, starts, outputs, {})
    return result["y"], result["state"], result.get("kept")


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
    d_final_state: Array,
) -> dict[str, Array]:
    """Gradients by name: dA [B, N, D], dD [B, 1, D], and dB, dC [B, groups, blocks, N, 128] are sums still to finish.

    B, C and their gradients are N rows of 128 numbers a block: those of its first token, then of its second, and so on.
    """
    inputs = {"x": x, "dt": dt, "dy": dy, "A2": A2, "B": B, "C": C, "D": D}
    inputs |= {"kept": kept, "d_final_state": d_final_state}
    small = (plan.batch, plan.groups, plan.blocks, plan.state, LANES)
    outputs = {
        "dx": (x.shape, x.dtype),
        "ddt": (dt.shape, dt.dtype),
        "dA": (d_final_state.shape, jnp.float32),
        "dB": (small, jnp.float32),
        "dC": (small, jnp.float32),
        "dD": ((plan.batch, 1, plan.channels), jnp.float32),
        "d_state": (d_final_state.shape, jnp.float32),
    }
    scratch = {
        "dy_rows": (BLOCK, plan.width),
        "dB_lanes": (BLOCK * plan.state, LANES),
        "dC_lanes": (BLOCK * plan.state, LANES),
        "states": ((BLOCK + 1) * plan.state, plan.width),
    }
    return _call(plan, _backward_kernel, inputs, starts, outputs, scratch)


def _call(plan, kernel, inputs, starts, outputs, scratch):
    if starts is not None:
        inputs["starts"] = starts
        scratch["start_lanes"] = (BLOCK, LANES)
    scratch |= {name: (BLOCK * plan.state, LANES) for name in ("B_lanes", "C_lanes")}
    scratch |= {name: (BLOCK, plan.width) for name in ("dt_rows", "u_rows")}
    names, reverse = [*inputs, *outputs, *scratch], kernel is _backward_kernel
    results = pl.pallas_call(
        functools.partial(_with_names, kernel, plan, names),
        grid=(plan.batch, plan.groups, plan.blocks, plan.inner),
        in_specs=[_block(plan, name, reverse) for name in inputs],
        out_specs=[_block(plan, name, reverse) for name in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=plan.interpret,
        name=f"selective_scan{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _with_names(kernel, plan, names, *refs):
    kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True))))


def _block(plan, name, reverse):
    """The block of an operand that a step sees, by what the operand is."""

    def time(n):
        return plan.blocks - 1 - n if reverse else n

    def step(g, c):
        return g * plan.inner + c

    if name in ("x", "dt", "y", "dy", "dx", "ddt"):
        return pl.BlockSpec((None, BLOCK, plan.width), lambda b, g, n, c: (b, time(n), step(g, c)))
    if name in ("A2", "D"):
        return pl.BlockSpec((plan.state if name == "A2" else 1, plan.width), lambda b, g, n, c: (0, step(g, c)))
    if name in ("B", "C", "starts"):
        rows = 1 if name == "starts" else plan.state
        return pl.BlockSpec((None, None, rows, LANES), lambda b, g, n, c: (b, time(n), 0, 0))
    if name in ("dB", "dC"):
        return pl.BlockSpec((None, None, None, plan.state, LANES), lambda b, g, n, c: (b, g, time(n), 0, 0))
    if name == "kept":
        return pl.BlockSpec((None, None, plan.state, plan.width), lambda b, g, n, c: (b, time(n), 0, step(g, c)))
    # States and their kin: of all channels of a group, in place for the whole sequence.
    rows = 1 if name == "dD" else plan.state
    return pl.BlockSpec((None, rows, plan.inner * plan.width), lambda b, g, n, c: (b, 0, g))


def _forward_kernel(plan, refs):
    block, channels = pl.program_id(2), _channels(plan)

    @pl.when((block == 0) & (pl.program_id(3) == 0))
    def _():
        refs.state[...] = refs.initial_state[...]

    _spread(plan, refs)
    _prepare(plan, refs, block)
    if hasattr(refs, "kept"):
        refs.kept[...] = refs.state[:, channels]
    A2, D = refs.A2[...], refs.D[...]

    def turn(i, h):
        parts = []
        for t in _tokens(i):
            h = advance(h, *_row(refs, t, "dt", "u"), A2, _lanes(plan, refs.B_lanes, t))
            parts.append(read(h, _lanes(plan, refs.C_lanes, t)))
        rows = _rows(i)
        y = _in_eights(parts) + D * refs.x[rows, :].astype(jnp.float32)
        refs.y[rows, :] = y.astype(refs.y.dtype)
        return h

    refs.state[:, channels] = lax.fori_loop(0, BLOCK // TURN, turn, refs.state[:, channels])


def _backward_kernel(plan, refs):
    block, channels = plan.blocks - 1 - pl.program_id(2), _channels(plan)
    first = pl.program_id(3) == 0

    @pl.when((pl.program_id(2) == 0) & first)
    def _():
        refs.d_state[...] = refs.d_final_state[...]
        refs.dA[...] = jnp.zeros_like(refs.dA)
        refs.dD[...] = jnp.zeros_like(refs.dD)

    @pl.when(first)
    def _():
        refs.dB_lanes[...] = jnp.zeros_like(refs.dB_lanes)
        refs.dC_lanes[...] = jnp.zeros_like(refs.dC_lanes)

    _spread(plan, refs)
    _prepare(plan, refs, block)
    A2, D = refs.A2[...], refs.D[...]

    def again(i, h):
        for t in _tokens(i):
            refs.states[_state(plan, t), :] = h
            h = advance(h, *_row(refs, t, "dt", "u"), A2, _lanes(plan, refs.B_lanes, t))
        return h

    refs.states[_state(plan, BLOCK), :] = lax.fori_loop(0, BLOCK // TURN, again, refs.kept[...])

    def turn(i, carry):
        i = BLOCK // TURN - 1 - i
        W, dA, dD = carry
        du, ddt = [], []
        for t in reversed(_tokens(i)):
            before, after = (refs.states[_state(plan, s), :] for s in (t, t + 1))
            B, C = (_lanes(plan, ref, t) for ref in (refs.B_lanes, refs.C_lanes))
            W, dA, du_t, ddt_t, dB, dC = pull(W, dA, before, after, *_row(refs, t, "dt", "u", "dy"), A2, B, C)
            refs.dB_lanes[_state(plan, t), :] += dB
            refs.dC_lanes[_state(plan, t), :] += dC
            du.append(du_t)
            ddt.append(ddt_t)
        rows = _rows(i)
        du, ddt = _in_eights(du[::-1]), _in_eights(ddt[::-1])
        x, dt = (_load(plan, ref, rows, block) for ref in (refs.x, refs.dt))
        dy = refs.dy_rows[rows, :]
        refs.dx[rows, :] = (dt * du + D * dy).astype(refs.dx.dtype)
        refs.ddt[rows, :] = (ddt / LOG2_E + du * x).astype(refs.ddt.dtype)
        return W, dA, dD + jnp.sum(dy * x, axis=0, keepdims=True)

    carry = tuple(ref[:, channels] for ref in (refs.d_state, refs.dA, refs.dD))
    carry = lax.fori_loop(0, BLOCK // TURN, turn, carry)
    for ref, value in zip((refs.d_state, refs.dA, refs.dD), carry, strict=True):
        ref[:, channels] = value

    @pl.when(pl.program_id(3) == plan.inner - 1)
    def _():
        for lanes, out in ((refs.dB_lanes, refs.dB), (refs.dC_lanes, refs.dC)):
            for n in range(plan.state):
                out[n : n + 1, :] = jnp.sum(lanes[n * LANES : (n + 1) * LANES, :].T, axis=0, keepdims=True)


def _channels(plan):
    """The lanes of this step in what holds all channels of the group."""
    return pl.ds(pl.multiple_of(pl.program_id(3) * plan.width, plan.width), plan.width)


def _rows(i):
    return pl.ds(pl.multiple_of(i * TURN, TURN), TURN)


def _tokens(i):
    return [i * TURN + s for s in range(TURN)]


def _state(plan, t):
    """Rows of token t where each has N."""
    return pl.ds(pl.multiple_of(t * plan.state, ROWS), plan.state)


def _lanes(plan, ref, t):
    return ref[_state(plan, t), :]


def _row(refs, t, *names):
    return [getattr(refs, f"{name}_rows")[pl.ds(t, 1), :] for name in names]


def _in_eights(parts):
    return jnp.concatenate([row_sums(parts[s : s + ROWS]) for s in range(0, TURN, ROWS)], axis=0)


def _spread(plan, refs):
    """Once a time block: B, C and the starts, from one lane a token to all lanes of a token's rows."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        for source, target in ((refs.B, refs.B_lanes), (refs.C, refs.C_lanes)):
            for n in range(plan.state):
                target[n * LANES : (n + 1) * LANES, :] = jnp.broadcast_to(source[n : n + 1, :], (LANES, LANES)).T
        if plan.packed:
            refs.start_lanes[...] = jnp.broadcast_to(refs.starts[...], (LANES, BLOCK)).T


def _load(plan, ref, rows, block):
    """Rows in float32; those after the last token are zero: a step of no time and no input."""
    value = ref[rows, :].astype(jnp.float32)
    if not plan.ragged:
        return value
    token = block * BLOCK + rows.start + lax.broadcasted_iota(jnp.int32, value.shape, 0)
    return jnp.where(token < plan.time, value, 0)


def _prepare(plan, refs, block):
    """The rows that tokens read one by one."""

    def turn(i, _):
        rows = _rows(i)
        dt = _load(plan, refs.dt, rows, block)
        refs.u_rows[rows, :] = dt * _load(plan, refs.x, rows, block)
        if plan.packed:
            starts = refs.start_lanes[rows, :]
            dt = jnp.where(jnp.concatenate([starts] * (plan.width // LANES), axis=1) > 0, START_STEP, dt)
        refs.dt_rows[rows, :] = dt
        if hasattr(refs, "dy_rows"):
            refs.dy_rows[rows, :] = _load(plan, refs.dy, rows, block)
        return 0

    lax.fori_loop(0, BLOCK // TURN, turn, 0)
