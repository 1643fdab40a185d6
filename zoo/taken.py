"""Calls of which the state takes in a part: outputs are of all tokens, the state is that after a row's first few.

A draft that is scored and then kept up to some token (speculative decoding, arXiv:2211.17192), and rows of different
lengths padded on the right, are this one thing: see `LanguageModel.hidden`. A recurrence runs once for the outputs, and
once for the state with what it writes and how it decays set to zero at the tokens that are not taken.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Bool, Int
from kernels.segments import segment_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """What mixers get as `segment_ids` where the state takes in a part of the tokens; they hand it on to `zoo.ops`.

    Attributes:
      numbers: of the segments, 0, 1, 2, ... from left to right.
      taken: whether the state takes the token in: the first few of each row.
    """

    numbers: Int[Array, "B T"]
    taken: Bool[Array, "B T"]

    @staticmethod
    def of(segment_ids: Int[Array, "B T"] | None, lengths: Int[Array, "B"], shape: tuple[int, int]) -> "Segments":
        numbers = jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_numbers(segment_ids)
        return Segments(numbers, jnp.arange(shape[1]) < jnp.asarray(lengths)[:, None])

    @staticmethod
    def all_of(segment_ids: "Int[Array, 'B T'] | Segments | None", shape: tuple[int, int]) -> "Segments":
        """Of a call whose tokens are all taken in, unless it says which are."""
        if isinstance(segment_ids, Segments):
            return segment_ids
        return Segments.of(segment_ids, jnp.full(shape[:1], shape[1]), shape)

    def count(self) -> Int[Array, "B"]:
        """How many tokens the state takes in."""
        return self.taken.sum(axis=1, dtype=jnp.int32)

    def last_number(self) -> Int[Array, "B"]:
        """The segment of the last token taken; 0 if none is."""
        return jnp.max(jnp.where(self.taken, self.numbers, 0), axis=1)

    def of_taken(self) -> Int[Array, "B T"]:
        """Ids by which no segment starts after the last token taken."""
        return jnp.where(self.taken, self.numbers, self.last_number()[:, None])


def repeated(segment_ids: Int[Array, "B T"] | Segments | None, times: int, axis: int):
    """Each row (axis 0) or token (axis 1) `times` times."""
    return jax.tree.map(lambda array: jnp.repeat(array, times, axis=axis), segment_ids)


def last(x: jax.Array, segment_ids: Int[Array, "B T"] | Segments | None, before: jax.Array) -> jax.Array:
    """x [B, T, ...] at the last token that the state takes in; `before` [B, ...] where it takes none."""
    if not isinstance(segment_ids, Segments):
        return x[:, -1]
    x = jnp.concatenate([before[:, None].astype(x.dtype), x], axis=1)
    return _at(x, segment_ids.count()[:, None])[:, 0]


def last_inputs(x: jax.Array, width: int, segments: Segments, before: jax.Array | None) -> jax.Array:
    """The last `width` of x [B, T, ...] that the state takes in, zero before their segment."""
    before = jnp.zeros((len(x), width, *x.shape[2:]), x.dtype) if before is None else before.astype(x.dtype)
    at = segments.count()[:, None] + jnp.arange(width)
    numbers = _at(jnp.pad(segments.numbers, ((0, 0), (width, 0))), at)
    is_of_segment = (numbers == segments.last_number()[:, None]).reshape(*numbers.shape, *(1,) * (x.ndim - 2))
    return jnp.where(is_of_segment, _at(jnp.concatenate([before, x], axis=1), at), 0)


def fixed_transition(run: Callable, x: jax.Array, a: jax.Array, segments: Segments, before: jax.Array | None):
    """The state of h_t = a h_{t-1} + (what x_t writes), a [D, N] the same at all tokens, so that none can be left out.

    Each row goes to the right end of the time instead, behind zeros, from zero; the state before comes on top.

    Args:
      run: (x, ids) -> the final state from zero.
    """
    count, time = segments.count(), x.shape[1]
    at = jnp.arange(time) - (time - count)[:, None]
    x = jnp.where((at >= 0)[..., None], _at(x, jnp.maximum(at, 0)), 0)
    written = run(x, _at(segments.of_taken(), jnp.maximum(at, 0)))
    if before is None:
        return written
    power, square = jnp.ones((len(x), 1, 1), a.dtype), a[None]
    for bit in range(time.bit_length()):
        power = jnp.where((count >> bit & 1)[:, None, None] == 1, power * square, power)
        square = square * square
    return written + jnp.where((segments.last_number() == 0)[:, None, None], power * before, 0)


def state_of_taken(*names: str) -> Callable:
    """Make an op `(..., segment_ids=None) -> (outputs, final state)` know `Segments`.

    The op leaves a state as it is at tokens where the arguments `names` [B, T, ...] are zero; one without these axes is
    the same at all tokens.
    """

    def around(op: Callable) -> Callable:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def call(*args, segment_ids=None, **kwargs):
            if not isinstance(segment_ids, Segments):
                return op(*args, segment_ids=segment_ids, **kwargs)
            y, _ = op(*args, segment_ids=segment_ids.numbers, **kwargs)
            bound = signature.bind(*args, segment_ids=segment_ids.of_taken(), **kwargs)
            for name in names:
                if (array := bound.arguments.get(name)) is not None:
                    array = array[None, None] if array.ndim < 3 else array
                    taken = segment_ids.taken.reshape(*segment_ids.taken.shape, *(1,) * (array.ndim - 2))
                    bound.arguments[name] = jnp.where(taken, array, jnp.zeros((), array.dtype))
            return y, op(*bound.args, **bound.kwargs)[1]

        return call

    return around


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, T, ...] at the times index [B, S] of each row."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
