"""The call around the kernels: padding, and the layout of what is small.

x, dt and y are taken and left as they lie. A and the states are transposed, so that N is in the sublanes and channels
are in the lanes. B and C of 128 tokens are viewed as rows of 128 numbers. N is padded to a multiple of 8 and channels
to one of 128: with A = B = C = 0 and dt = x = 0 the states of the padding stay zero.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.divisors import largest_divisor
from kernels.mosaic_tpu import interpret
from kernels.segments import segment_starts
from kernels.selective_scan.mosaic_tpu import launch
from kernels.selective_scan.mosaic_tpu.recurrence import LANES, ROWS
from kernels.selective_scan.pallas import check_supported, rates

MOST_NUMBERS = 2**20  # of the states of a sequence, which stay in VMEM, with their gradients and those of A
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # chips whose cores share a grid
STEP_FLOATS = 8 * 1024  # of the states that a step updates: with their rates and gradients they stay in registers

_width: contextvars.ContextVar[int | None] = contextvars.ContextVar("width", default=None)


@contextlib.contextmanager
def use(*, width: int | None) -> Iterator[None]:
    """While tracing: another number of channels a step than chosen."""
    token = _width.set(width)
    try:
        yield
    finally:
        _width.reset(token)


def mosaic_tpu(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None,
    *,
    initial_state: Float[Array, "B D N"],
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """y [B, T, D] and the final state; see `selective_scan`. `chunk_size` has no meaning here. Interpreted on a CPU.

    Raises:
      NotImplementedError: a GPU, x or dt that is neither float32 nor bfloat16, or a state too large for VMEM.
    """
    del chunk_size
    device, how = dispatch.device(), interpret()
    check_supported(x, dt, A)
    batch, time, channels = x.shape
    numbers = A.shape[1]
    if numbers * channels > MOST_NUMBERS:
        raise NotImplementedError(f"D {channels}, N {numbers}: states of more than {MOST_NUMBERS} numbers a sequence")
    state = numbers + -numbers % ROWS
    more_channels, more_state = -channels % LANES, state - numbers
    tiles = (channels + more_channels) // LANES
    groups = 2 if device.kind in TWO_CORES and batch % 2 and tiles % 2 == 0 else 1
    width = _width.get() or LANES * largest_divisor(tiles // groups, STEP_FLOATS // (state * LANES))
    plan = launch.Plan(
        batch=batch,
        time=time,
        channels=channels + more_channels,
        state=state,
        width=width,
        groups=groups,
        packed=segment_ids is not None,
        interpret=how,
    )

    def by_channel(array):
        return jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, more_channels),))

    def by_number(array):  # [..., X, N] -> [..., N, X]
        return jnp.pad(array.astype(jnp.float32).mT, ((0, 0),) * (array.ndim - 2) + ((0, more_state), (0, 0)))

    starts = segment_starts(segment_ids)[..., None].astype(jnp.float32) if plan.packed else None
    D = jnp.zeros(channels, jnp.float32) if D is None else D.astype(jnp.float32)
    y, state = scan(
        plan,
        by_channel(x),
        by_channel(dt),
        by_channel(by_number(A)),
        B.astype(jnp.float32),
        C.astype(jnp.float32),
        by_channel(D[None]),
        by_channel(by_number(initial_state)),
        starts,
    )
    return y[..., :channels], state[:, :numbers, :channels].mT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    plan: launch.Plan,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array,
    starts: Array | None,
) -> tuple[Array, Array]:
    """x, dt [B, T, D]; A [N, D]; B, C [B, T, N]; D [1, D]; initial_state [B, N, D]; starts [B, T, 1]."""
    operands = _operands(plan, x, dt, A, B, C, D, starts)
    return launch.forward(plan, *operands, initial_state, keep_states=False)[:2]


def scan_forward(
    plan: launch.Plan,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array,
    starts: Array | None,
) -> tuple[Any, ...]:
    operands = _operands(plan, x, dt, A, B, C, D, starts)
    y, state, kept = launch.forward(plan, *operands, initial_state, keep_states=True)
    return (y, state), (x, dt, A, B, C, D, starts, kept)


def scan_backward(
    plan: launch.Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    *arrays, kept = residuals
    dy, d_final_state = cotangents
    d = launch.backward(plan, *_operands(plan, *arrays), kept, dy, d_final_state)
    B = residuals[3]
    dB, dC = (d[name].sum(1).reshape(plan.batch, -1, plan.state)[:, : plan.time, : B.shape[2]] for name in ("dB", "dC"))
    return d["dx"], d["ddt"], d["dA"].sum(0), dB, dC, d["dD"].sum(0), d["d_state"], None


scan.defvjp(scan_forward, scan_backward)


def _operands(plan, x, dt, A, B, C, D, starts):
    """As the kernels take them: whole blocks of tokens where these are in the lanes, rates for a power of 2."""

    def rows(array):  # [B, T, N] -> [B, blocks, N, 128], tokens first
        padding = ((0, 0), (0, -plan.time % launch.BLOCK), (0, 0 if array is starts else plan.state - array.shape[2]))
        return jnp.pad(array, padding).reshape(plan.batch, plan.blocks, -1, LANES)

    starts = rows(starts) if plan.packed else None
    return x, dt, rates(A, plan.packed), rows(B), rows(C), D, starts
