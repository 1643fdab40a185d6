"""What looks along the time: convolutions, shifts, reversal, scans by a function."""

import functools

import jax
import jax.numpy as jnp

import kernels
from kernels import segments
from zoo import sharding, taken
from zoo.ops.axes import OF_CHANNELS, OF_TOKENS
from zoo.sharding import sequence
from zoo.taken import Segments


def short_conv(x, weight, bias=None, *, initial_state=None, segment_ids=None, **options):
    """`kernels.short_conv`, with each device's sequences, channels and part of the time on it; see there."""
    width = weight.shape[1] - 1
    if isinstance(segment_ids, Segments):
        whole = {"initial_state": initial_state, "segment_ids": segment_ids.numbers}
        y, _ = short_conv(x, weight, bias, **whole, **options)
        return y, taken.last_inputs(x, width, segment_ids, initial_state)
    arrays = {
        "x": (x, OF_CHANNELS),
        "weight": (weight, ("heads", None)),
        "bias": (bias, ("heads",)),
        "initial_state": (initial_state, ("batch", None, "heads")),
        "segment_ids": (segment_ids, OF_TOKENS),
    }
    over_time = functools.partial(sequence.convolved, name="x", width=width)
    if initial_state is not None and width > x.shape[1] // sharding.axis_size("time"):
        over_time = None  # it would reach into more than the first part
    return sharding.on_each_device(
        lambda arrays: kernels.short_conv(**arrays, **options),
        arrays,
        (OF_CHANNELS, ("batch", None, "heads")),
        over_time=over_time,
    )


def previous(x, *axes, initial_state=None, segment_ids=None):
    """(x_{t-1} at each t, and the last x), of x [B, T, ...]; `initial_state` [B, ...] is before token 0, else zero.

    x_{t-1} is zero at a segment's first token; `initial_state` belongs to the segment of token 0. `axes`: logical axes
    after the time; none by default.
    """
    before = None if initial_state is None else initial_state[:, None]
    shifted, last = earlier(x, 1, *axes, initial_state=before, segment_ids=segment_ids)
    return shifted, last[:, 0]


def earlier(x, distance, *axes, initial_state=None, segment_ids=None):
    """(x_{t - distance} at each t, and the last `distance` x), of x [B, T, ...]; see `previous`.

    Zero where that token is of another segment. `initial_state` [B, distance, ...] is before token 0 and of its
    segment, else zero; what is returned is of the last segment.
    """
    if isinstance(segment_ids, Segments):
        shifted, _ = earlier(x, distance, *axes, initial_state=initial_state, segment_ids=segment_ids.numbers)
        return shifted, taken.last_inputs(x, distance, segment_ids, initial_state)
    of_state = ("batch", None, *(axes or (None,) * (x.ndim - 2)))
    axes = ("batch", "time", *of_state[2:])
    arrays = {"x": (x, axes), "initial_state": (initial_state, of_state), "segment_ids": (segment_ids, OF_TOKENS)}

    def call(arrays):
        x, ids = arrays["x"], arrays.get("segment_ids")
        time, before = x.shape[1], arrays.get("initial_state")
        before = jnp.zeros((len(x), distance, *x.shape[2:]), x.dtype) if before is None else before.astype(x.dtype)
        found = jnp.concatenate([before, x], axis=1)
        if ids is None:
            return found[:, :time], found[:, time:]
        numbers = segments.segment_numbers(ids)
        of_found = jnp.pad(numbers, ((0, 0), (distance, 0)))
        same = of_found[:, :time] == numbers, of_found[:, time:] == numbers[:, -1:]
        parts = zip(same, (found[:, :time], found[:, time:]), strict=True)
        return tuple(jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), part, 0) for mask, part in parts)

    over_time = functools.partial(sequence.convolved, name="x", width=distance)
    if initial_state is not None and distance > x.shape[1] // sharding.axis_size("time"):
        over_time = None  # it would reach into more than the first part
    return sharding.on_each_device(call, arrays, (axes, of_state), over_time=over_time)


def reversed_time(x, *axes):
    """x [B, T, ...] from the last token to the first. `axes`: logical axes after the time; none by default."""
    axes = ("batch", "time", *(axes or (None,) * (x.ndim - 2)))

    def over_time(call):
        return lambda arrays: sequence.reversed_time(arrays["x"])

    return sharding.on_each_device(lambda arrays: jnp.flip(arrays["x"], 1), {"x": (x, axes)}, axes, over_time=over_time)


def associative_scan(compose, elements, first):
    """The inclusive scan over time of `elements`, arrays [B, T, ...], by an associative `compose(left, right)`.

    `first`: what comes before token 0, [B, ...].
    """
    leaves, structure = jax.tree.flatten(elements)
    axes = [("batch", "time", *(None,) * (leaf.ndim - 2)) for leaf in leaves]
    arrays = {f"x{i}": pair for i, pair in enumerate(zip(leaves, axes, strict=True))}
    firsts = zip(jax.tree.leaves(first), [("batch", *of_x[2:]) for of_x in axes], strict=True)
    arrays |= {f"first{i}": pair for i, pair in enumerate(firsts)}

    def scan(arrays, entering=lambda first, inside: first):
        x, first = (structure.unflatten([arrays[f"{name}{i}"] for i in range(len(axes))]) for name in ("x", "first"))
        inside = jax.lax.associative_scan(compose, x, axis=1)
        return compose(jax.tree.map(lambda x: x[:, None], entering(first, inside)), inside)

    def over_time(scan):
        def entering(first, inside):
            return sequence.before(compose, jax.tree.map(lambda x: x[:, -1], inside), first)

        return lambda arrays: scan(arrays, entering)

    return sharding.on_each_device(scan, arrays, structure.unflatten(axes), over_time=over_time)
