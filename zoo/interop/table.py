"""The table of a family: which tensors of a file are which of our parameters, and how their layouts differ.

A rule names tensors of the file and parameters of ours, and has a function for each direction, from the tensors of one
layer to its parameters and back. Functions move entries (transpose, cut, join, reshape) on numpy arrays, so that on a
mapped file they make views, and only what is asked of a view is read. The same rules import and export.

`{N}` in a tensor's name is the layer's number; ours then stand in its block: "mixer.q.kernel". A rule for parameters
that the model lacks (a head that is tied, a bias that is off) is not for it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """What turns tensors of the file into parameters, and back; both take and give tuples.

    `computes`: values change, in float32, where others only move.
    """

    read: Callable[..., Arrays]
    write: Callable[..., Arrays]
    computes: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """`theirs` and `ours` hold the same numbers;

    `layer`: of blocks of that family alone ("": of any); `absent`: layers, by number, whose tensors no file has, and
    whose parameters are 0.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform
    layer: str = ""
    absent: tuple[int, ...] = ()


SAME = Transform(lambda x: (x,), lambda x: (x,))
TRANSPOSED = Transform(lambda x: (x.T,), lambda x: (x.T,))
CONVOLUTION = Transform(lambda x: (x[:, 0],), lambda x: (x[:, None],))  # [channels, 1, taps] there
FLAT = Transform(lambda x: (x.reshape(-1),), lambda x: (x.reshape(1, 1, -1, 1),))  # [1, 1, heads, 1] there


def shifted(by: float) -> Transform:
    """Ours is theirs + `by`: 1 where a norm multiplies by 1 + weight."""
    return Transform(
        lambda x: (x.astype(np.float32) + np.float32(by),),
        lambda x: (x.astype(np.float32) - np.float32(by),),
        computes=True,
    )


def split(*sizes: int, transposed: bool = True) -> Transform:
    """Rows of one tensor, so many each, are several parameters; `transposed`: matrices of `linear`."""
    turn = (lambda x: x.T) if transposed else (lambda x: x)
    ends = np.cumsum(sizes)[:-1]
    return Transform(
        lambda x: tuple(turn(part) for part in np.split(x, ends)),
        lambda *parts: (np.concatenate([turn(part) for part in parts]),),
    )


def then(first: Transform, second: Transform) -> Transform:
    """Read by `first`, each of its results by `second`."""
    return Transform(
        lambda *xs: tuple(second.read(x)[0] for x in first.read(*xs)),
        lambda *ys: first.write(*(second.write(y)[0] for y in ys)),
        first.computes or second.computes,
    )


def multiplied(transform: Transform, factors: Sequence[float]) -> Transform:
    """Ours are those of `transform` times a factor each."""
    return Transform(
        lambda *xs: tuple(
            x.astype(np.float32) * np.float32(f) for x, f in zip(transform.read(*xs), factors, strict=True)
        ),
        transform.write,  # the shapes; an export has no factors
        computes=True,
    )


def rule(
    theirs: str | Sequence[str],
    ours: str | Sequence[str],
    transform: Transform = SAME,
    layer: str = "",
    absent: tuple[int, ...] = (),
) -> Rule:
    def names(given):
        return (given,) if isinstance(given, str) else tuple(given)

    return Rule(names(theirs), names(ours), transform, layer, absent)


def linears(theirs: str, ours: str, names: Mapping[str, str], layer: str = "") -> list[Rule]:
    """Projections by name, {their module: ours}, and the bias of each where it has one."""
    rules = []
    for there, here in names.items():
        rules.append(rule(f"{theirs}{there}.weight", f"{ours}{here}.kernel", TRANSPOSED, layer))
        rules.append(rule(f"{theirs}{there}.bias", f"{ours}{here}.bias", SAME, layer))
    return rules


def same(theirs: str, ours: str, names: Mapping[str, str], layer: str = "") -> list[Rule]:
    """Parameters that both have in the same layout: {their name: ours}."""
    return [rule(theirs + there, ours + here, SAME, layer) for there, here in names.items()]


# --- The table of one model -------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A rule at its place: of one layer, or of the whole model."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]  # full paths
    unit: int | None  # the place in stacked parameters; None: not stacked
    transform: Transform


class Table(NamedTuple):
    """Every rule of one model, at its places."""

    entries: list[Entry]
    shapes: dict[str, tuple[int, ...]]  # of the file's tensors, by name

    def of_parameter(self) -> dict[str, list[tuple[Entry, int]]]:
        """For each of our parameters its entries, one a unit, and its place among those of the entry."""
        found: dict[str, list[tuple[Entry, int]]] = {}
        for entry in self.entries:
            for i, name in enumerate(entry.ours):
                found.setdefault(name, []).append((entry, i))
        return found


def table(rules: Iterable[Rule], pattern: Sequence[str], parameters: Mapping[str, Any]) -> Table:
    """The rules at their places in a model.

    Args:
      pattern: families of the repeating unit.
      parameters: of the model, by dotted path; shapes are looked at.

    Raises:
      AssertionError: a parameter that no rule makes, or more than one: a fault of the family's file.
    """
    entries, made = [], []
    for one in rules:
        of_layer = "{N}" in one.theirs[0]
        places = [i for i, layer in enumerate(pattern) if one.layer in ("", layer)] if of_layer else [None]
        for place in places:
            prefix = "" if place is None else f"units.blocks.{place}."
            ours = tuple(prefix + name for name in one.ours)
            there = [name in parameters for name in ours]
            if not any(there):
                continue
            assert all(there), f"{ours} are not all parameters of the model"
            units = [None] if place is None else range(parameters[ours[0]].shape[0])
            for unit in units:
                number = None if unit is None else unit * len(pattern) + place
                theirs = tuple(name.replace("{N}", str(number)) for name in one.theirs)
                if number in one.absent:
                    shapes = [parameters[name].shape[1:] for name in ours]
                    entries.append(Entry((), ours, unit, _nothing(shapes)))
                else:
                    entries.append(Entry(theirs, ours, unit, one.transform))
            made += ours
    assert sorted(made) == sorted(parameters), f"parameters without one rule: {sorted(set(made) ^ set(parameters))}"
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        dummies = [_dummy(_shape(entry, parameters[name].shape)) for name in entry.ours]
        for name, array in zip(entry.theirs, entry.transform.write(*dummies), strict=True):
            assert name not in shapes, f"{name} stands in two rules"
            shapes[name] = array.shape
    return Table(entries, shapes)


def _nothing(shapes: Sequence[tuple[int, ...]]) -> Transform:
    """Zeros of no tensor."""
    return Transform(lambda: tuple(map(_dummy, shapes)), lambda *ours: ())


def _shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if entry.unit is None else shape[1:]


def _dummy(shape: tuple[int, ...]) -> np.ndarray:
    """Of that shape, in one byte."""
    return np.broadcast_to(np.int8(0), shape)
