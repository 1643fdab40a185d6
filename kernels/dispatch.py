"""Which implementation of an op runs, and the reasons when one cannot."""

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

Implementation = str | Sequence[str] | None
KERNEL_RESULT = "kernel_result"  # `checkpoint_name` of what a kernel for GPUs made


@dataclasses.dataclass(frozen=True)
class Device:
    """What a program will run on: `platform` is "cpu", "gpu" or "tpu", `kind` is jax's `device_kind`."""

    platform: str
    kind: str

    @property
    def is_hopper(self) -> bool:
        return self.platform == "gpu" and any(name in self.kind for name in ("H100", "H200", "GH200", "H800", "H20"))


_device: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)
_preferred: contextvars.ContextVar[Sequence[str]] = contextvars.ContextVar("preferred", default=())


def device_of(device: jax.Device) -> Device:
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Device(platform, device.device_kind)


def device() -> Device:
    """The device set by `use_device`, else jax's default device.

    Under ahead-of-time compilation the host's devices say nothing about the target, so whoever knows the
    target (`zoo.sharding`, from the mesh) sets it.
    """
    return _device.get() or device_of(jax.config.jax_default_device or jax.devices()[0])


@contextlib.contextmanager
def use_device(device: Device | jax.Device) -> Iterator[None]:
    """Make `device` the one that ops choose their implementation, tiles and chunks for."""
    token = _device.set(device if isinstance(device, Device) else device_of(device))
    try:
        yield
    finally:
        _device.reset(token)


@contextlib.contextmanager
def use_implementation(*names: str) -> Iterator[None]:
    """Let ops whose caller names no implementation take the first of `names` that they have and that supports the call.

    It acts while a function is traced: a function that jax.jit compiled outside keeps what it was compiled with.

    `use_implementation("reference")` is how a whole model differentiates in every mode: `jax.jvp`, `jax.linearize`,
    Hessian-vector products (`jax.jvp` of `jax.grad`, or `jax.grad` twice). Faster implementations have gradients of
    their own, first derivatives in reverse mode: to others jax answers with an error of its `custom_vjp`.
    """
    token = _preferred.set(names)
    try:
        yield
    finally:
        _preferred.reset(token)


def call(
    op: str,
    table: Mapping[str, Callable[..., Any]],
    implementation: Implementation,
    order: Sequence[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the first implementation of `op` that supports the call.

    Args:
      op: the op's name, for messages.
      table: implementations by name.
      implementation: a name (this or an error), names in order of preference, or None for `use_implementation`'s, then
        `order`.
      order: this device's preference.
      *args, **kwargs: the call. An implementation that does not support it raises `NotImplementedError`.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: none supports the call; the message holds each one's reason.
    """
    if implementation is None:
        names = [*(name for name in _preferred.get() if name in table), *order]
    else:
        names = [implementation] if isinstance(implementation, str) else implementation
    reasons = []
    for name in names:
        if name not in table:
            raise ValueError(f"{op}: unknown implementation {name!r}; expected one of {', '.join(table)}")
        try:
            return table[name](*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"{op}: no implementation supports this call. " + "; ".join(reasons))


def optional(module: str, extra: str) -> ModuleType:
    """The module of a package that only the extra `extra` of this project installs.

    Raises:
      NotImplementedError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotImplementedError(f"{error}; `pip install sequence-zoo[{extra}]` brings it") from error
