"""Pallas kernels for TPUs on other devices: interpreted on a CPU, refused on a GPU."""

import contextlib
import contextvars
from collections.abc import Iterator

from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch

Interpret = bool | pltpu.InterpretParams

_interpret: contextvars.ContextVar[Interpret] = contextvars.ContextVar("interpret", default=True)


@contextlib.contextmanager
def use_interpret(interpret: Interpret) -> Iterator[None]:
    """While tracing: how kernels are interpreted on a CPU."""
    token = _interpret.set(interpret)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpret() -> Interpret:
    """What `pallas_call` is given as `interpret` on this device.

    Raises:
      NotImplementedError: a GPU.
    """
    platform = dispatch.device().platform
    if platform == "gpu":
        raise NotImplementedError("it is a kernel for TPUs")
    return False if platform == "tpu" else _interpret.get()
