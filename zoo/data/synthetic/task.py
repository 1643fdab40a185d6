"""What a synthetic task is: a dataclass of its sizes, that makes rows from a random generator.

A task at one size makes `Rows`: tokens, their targets, which tokens have a target, and which of those are asked for.
Its sizes are settings (`zoo.settings`), so that a source may set them: `mqar?vocab_size=256&pairs=8`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from zoo.errors import UsageError
from zoo.settings import nearest

Batch = dict[str, np.ndarray]
POSITION = "position"  # the axis of tasks whose every token is an answer to a shorter row


class Rows(NamedTuple):
    """Rows of a task, each array [n, T].

    Attributes:
      tokens: int.
      targets: int; 0 where there is none.
      known: bool: has a target.
      asked: bool: has one that a test asks for; known, too.
    """

    tokens: np.ndarray
    targets: np.ndarray
    known: np.ndarray
    asked: np.ndarray

    def take(self, which: np.ndarray) -> "Rows":
        """Some of the rows, by their indices."""
        return Rows(*(array[which] for array in self))

    def batch(self, *, answers_only: bool) -> Batch:
        """tokens, targets, segment_ids int32 [n, T], weights float32 [n, T]: 1 where asked, or at every target."""
        arrays = {"tokens": self.tokens, "targets": self.targets, "segment_ids": np.ones_like(self.tokens)}
        weights = (self.asked if answers_only else self.known).astype(np.float32)
        return {name: np.ascontiguousarray(array, np.int32) for name, array in arrays.items()} | {"weights": weights}


def next_tokens(sequences: np.ndarray, asked: np.ndarray | int) -> Rows:
    """Rows whose targets are their next tokens.

    Args:
      sequences: int [n, T + 1].
      asked: bool [n, T + 1], the tokens that are asked for; or so many, at the end.
    """
    if isinstance(asked, int):
        asked = np.broadcast_to(np.arange(sequences.shape[1]) >= sequences.shape[1] - asked, sequences.shape)
    targets = sequences[:, 1:]
    return Rows(sequences[:, :-1], targets, np.ones(targets.shape, bool), asked[:, 1:])


def only_asked(tokens: np.ndarray, targets: np.ndarray, asked: np.ndarray) -> Rows:
    """Rows of which nothing but the answers can be predicted."""
    return Rows(tokens, np.where(asked, targets, 0), asked, asked)


@dataclasses.dataclass(frozen=True, repr=False)
class Task:
    """A task at one size. Subclasses declare `vocab_size` and what else they can be set to, as settings.

    Attributes:
      name: one of TASKS.
      length: tokens of a row before the question; of a task without one, all.
    """

    name: str
    length: int

    trains_on_all: ClassVar[bool] = False  # on every target, whether asked for or not
    asks_alike: ClassVar[bool] = True  # `asked` targets in every row, not just at most
    recalled_by: ClassVar[int] = 0  # the last tokens of a question, behind which its answer stood before; 0: nowhere
    axis: ClassVar[tuple[str, tuple]] = ("", ())  # what an evaluation varies: a size and its values; POSITION: nothing
    kept_as: ClassVar[dict[str, Any]] = {}  # what runs were kept under that is no field any more
    came_later: ClassVar[tuple[str, ...]] = ()  # fields that runs were kept without: not said where they are 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            declared = field.metadata.get("setting")
            if declared and (problem := declared.problem(getattr(self, field.name))):
                raise UsageError(f"{self.name}: {field.name}: {problem}")
        for name, value in self.chosen().items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        if problem := self.problem():
            raise UsageError(f"{self.name}: {problem}")

    def chosen(self) -> dict[str, int]:
        """What sizes that were left at 0 are, by the others."""
        return {}

    def problem(self) -> str | None:
        """What is wrong with sizes that are each right by themselves: "got ..., expected ..."."""
        raise NotImplementedError

    @classmethod
    def question(cls, sizes: Mapping[str, Any]) -> int:
        """Tokens of a row after the first `length`, at these sizes."""
        return 0

    @property
    def asked(self) -> int:
        """Targets of a row that are asked for; at most so many, where rows differ."""
        return 1

    @property
    def context_length(self) -> int:
        """Tokens of a row."""
        return self.length + self.question(vars(self))

    def labels(self, *, training: bool) -> int:
        """Targets of a row that count, at most."""
        return self.context_length if training and self.trains_on_all else self.asked

    def rows(self, rng: np.random.Generator, count: int, *, training: bool = False) -> Rows:
        """`count` rows, for a test or for `training`, which few tasks tell apart."""
        raise NotImplementedError

    def fresh(self, seed: int, index: int, count: int, *, training: bool = False) -> Batch:
        """Batch number `index` of an endless stream: a function of its arguments alone."""
        rows = self.rows(np.random.default_rng([seed, index]), count, training=training)
        return rows.batch(answers_only=not (training and self.trains_on_all))

    def along_axis(self) -> dict[Any, "Task"]:
        """This task by the values of its axis that fit its other sizes; without an axis by its length alone."""
        name, values = self.axis
        found = {}
        for value in values:
            with contextlib.suppress(UsageError):
                found[value] = dataclasses.replace(self, **{name: value})
        return found or {self.context_length: self}

    def __repr__(self) -> str:
        """What runs are kept under, and known by: of a task that stands it must not change."""
        names = ["name", "vocab_size", "length"]
        names += [field.name for field in dataclasses.fields(self) if field.name not in names]
        names = [name for name in names if getattr(self, name) or name not in self.came_later]
        said = {name: getattr(self, name) for name in names} | self.kept_as
        return f"Task({', '.join(f'{name}={value!r}' for name, value in said.items())})"


TASKS: dict[str, type[Task]] = {}


def task(*names: str) -> Callable[[type[Task]], type[Task]]:
    """Make a class of tasks known by these names."""

    def register(cls: type[Task]) -> type[Task]:
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
        TASKS.update(dict.fromkeys(names, cls))
        return cls

    return register


def make(name: str, length: int, **sizes: Any) -> Task:
    """The task of that name, at a length and other sizes than its own.

    Raises:
      UsageError: an unknown name or size, or a size that does not fit.
    """
    if name not in TASKS:
        raise UsageError(f"unknown synthetic task {name!r}; known, nearest first: {nearest(name, TASKS)}")
    known = options(name)
    for size in sizes:
        if size not in known:
            has = f"known, nearest first: {nearest(size, known)}"
            raise UsageError(f"{name}: unknown option {size!r}; {has}")
    return TASKS[name](name, length, **sizes)


def options(name: str) -> dict[str, Any]:
    """The settings of a task's sizes, by name."""
    fields = dataclasses.fields(TASKS[name])
    return {field.name: field.metadata["setting"] for field in fields if "setting" in field.metadata}


def distinct(rng: np.random.Generator, count: int, size: int, chosen: int) -> np.ndarray:
    """Rows of `chosen` different numbers below `size`, in random order, int [count, chosen] (Floyd's algorithm)."""
    found = np.empty((count, chosen), np.int64)
    for i in range(chosen):
        largest = size - chosen + i
        drawn = rng.integers(0, largest + 1, count)
        found[:, i] = np.where((found[:, :i] == drawn[:, None]).any(1), largest, drawn)
    return np.take_along_axis(found, rng.random(found.shape).argsort(axis=1), axis=1)
