"""What the Pallas kernels for TPUs and for Hopper GPUs share: which calls they take, and how a segment starts.

Rates come times log2 e, since the hardware's exponential is one of base 2. The start of a segment is a decay with an
immense step; in packed rows no rate is quite 0, so that it leaves nothing of the state.
"""

import jax.numpy as jnp

from kernels.array_typing import Array

LARGEST_STATE = 64  # N
LOG2_E = 1.4426950408889634
START_STEP = 1e30  # dt of the decay where a segment starts
SLOWEST = -1e-20  # rate in packed rows: exp(dt A) is 1 for each step size in use, and 0 for START_STEP


def check_supported(x: Array, dt: Array, A: Array) -> None:
    """Refuse what neither takes.

    Raises:
      NotImplementedError: x or dt that is neither float32 nor bfloat16, or states of more than 64 numbers a channel.
    """
    for name, array in (("x", x), ("dt", dt)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name} is {array.dtype}, expected float32 or bfloat16")
    if A.shape[1] > LARGEST_STATE:
        raise NotImplementedError(f"N {A.shape[1]}: states of more than {LARGEST_STATE} numbers a channel")


def rates(A: Array, packed: bool) -> Array:
    """A for exponentials of base 2."""
    return jnp.minimum(A * LOG2_E, SLOWEST) if packed else A * LOG2_E
