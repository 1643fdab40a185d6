"""Checks of the public ops: what was wrong and what was expected, before anything is traced on a device."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def check_rank(op: str, name: str, array: Any, dims: str) -> None:
    """Raise ValueError unless `array` has one axis for each letter of `dims` ("B T D"), and none is empty."""
    letters = dims.split()
    if array is None:
        raise ValueError(f"{op}: {name} is None, expected an array [{dims}]")
    if array.ndim != len(letters):
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {len(letters)} axes [{dims}]")
    if 0 in array.shape:
        empty = letters[array.shape.index(0)]
        raise ValueError(f"{op}: {name} has shape {array.shape} [{dims}], expected at least 1 along {empty}")


def check_shape(op: str, name: str, array: Any, *expected: tuple[int, ...], like: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `array.shape` is one of `expected`, which follow from `like`, an array of `shape`."""
    wanted = " or ".join(str(one) for one in expected)
    if array is None:
        raise ValueError(f"{op}: {name} is None, expected an array of {wanted} beside {like} of shape {shape}")
    if tuple(array.shape) not in expected:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {wanted} beside {like} of shape {shape}")


def check_operands(op: str, q: Any, k: Any, v: Any) -> None:
    """Raise ValueError unless q, k [..., G, K] and v [..., H, V] fit, G a divisor of H."""
    check_shape(op, "q", q, (*v.shape[:-2], *q.shape[-2:]), like="v", shape=v.shape)
    check_shape(op, "k", k, q.shape, like="q", shape=q.shape)
    if q.shape[-2] == 0 or v.shape[-2] % q.shape[-2]:
        raise ValueError(f"{op}: q has shape {q.shape}: its heads must divide those of v, of shape {v.shape}")


def check_segment_ids(op: str, segment_ids: Any, like: str, shape: tuple[int, ...], name: str = "segment_ids") -> None:
    """Raise ValueError unless ids are None, or integers for each sequence and token of `like`, an array of `shape`."""
    if segment_ids is not None:
        check_shape(op, name, segment_ids, shape[:2], like=like, shape=shape)
        check_dtype(op, jnp.integer, **{name: segment_ids})


def check_dtype(op: str, kind: type, /, **arrays: Any) -> None:
    """Raise ValueError unless all arrays (None: not given) are of `kind`: jnp.floating, jnp.inexact or jnp.integer."""
    wanted = {jnp.floating: "real numbers of floating point", jnp.inexact: "floating point", jnp.integer: "integers"}
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{op}: {name} is {array.dtype}, expected {wanted[kind]}")


def check_count(op: str, name: str, count: Any, unit: str) -> None:
    """Raise ValueError unless `count` is None or an integer of at least 1."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1):
        raise ValueError(f"{op}: {name} is {count}, expected at least 1 {unit}")


def check_number(op: str, name: str, number: Any, *, positive: bool = False) -> None:
    """Raise ValueError unless `number` is None, finite (and above 0), or hidden in a traced value."""
    if number is None or isinstance(number, jax.core.Tracer):
        return
    if not math.isfinite(number) or (positive and number <= 0):
        wanted = "a finite number above 0" if positive else "a finite number"
        raise ValueError(f"{op}: {name} is {number}, expected {wanted}")


ROUNDING = 1e-5  # of a log-decay that is 0 in exact numbers: log(b) + log(1 - b + ...) of a lower bound b, say


def check_not_above_zero(op: str, **arrays: Any) -> None:
    """Raise ValueError for a log-decay (its real part) above 0 where values can be seen: not inside of `jax.jit`.

    There it is the caller's promise. A state that grows is in no op's contract: implementations overflow at different
    lengths, and some take such a decay for 0. What a gate computed as 0 and a rounding is let pass.
    """
    for name, array in arrays.items():
        largest = _seen(jnp.max, array)
        if largest > ROUNDING:
            raise ValueError(f"{op}: {name} is up to {largest:.3g}, expected at most 0 (it decays)")


def check_not_below_zero(op: str, **arrays: Any) -> None:
    """The same for a step size below 0, which turns decay into growth."""
    for name, array in arrays.items():
        smallest = _seen(jnp.min, array)
        if smallest < 0:
            raise ValueError(f"{op}: {name} is down to {smallest:.3g}, expected at least 0")


def _seen(function: Callable[[Any], jax.Array], array: Any) -> float:
    """`function` of the array's real part; 0 where there is none, or its values are not known yet."""
    if array is None or isinstance(array, jax.core.Tracer):
        return 0.0
    with jax.ensure_compile_time_eval():  # a constant of a function that is being traced is known
        return float(function(jnp.real(array)))
