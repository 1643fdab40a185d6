"""A synthetic task as data.source: `NAME`, or with sizes of its own `NAME?pairs=8&vocab_size=256`."""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from zoo.data.options import read
from zoo.data.synthetic.task import TASKS, Batch, Task, make, options
from zoo.errors import UsageError
from zoo.settings import nearest

if TYPE_CHECKING:
    from zoo.config import Config

VALIDATION_ROWS = 512
_TRAINING, _VALIDATION = 0, 1  # parts of the seed


def is_task(spec: str) -> bool:
    """Whether a source names a task, with options or without."""
    return spec.partition("?")[0].strip() in TASKS


def find(config: "Config", source: str | None = None, context_length: int | None = None) -> Task | None:
    """The task that data.source (or `source`) names, as long as rows of the context have room for; None: it is text.

    Raises:
      UsageError: a task beside other sources, an unknown option, a context too short for it, or a vocabulary too small.
    """
    spec = (config.data.source if source is None else source).strip()
    name, _, query = spec.partition("?")
    if name not in TASKS:
        _check_text(spec)
        return None
    context = config.train.context_length if context_length is None else context_length
    task = of_spec(spec, context)
    if 0 < config.model.vocab_size < task.vocab_size:
        raise UsageError(
            f"model.vocab_size: got {config.model.vocab_size}, {name} needs at least {task.vocab_size}; 0 takes what "
            "it needs, or give the task fewer"
        )
    return task


def of_spec(
    spec: str, context_length: int, *, setting: str = "data.source", length: str = "train.context_length"
) -> Task:
    """The task of `NAME` or `NAME?pairs=8&vocab_size=256`, in rows of so many tokens; `setting` and `length` are where
    the two were set, for messages.

    Raises:
      UsageError: an unknown option, or a context too short for the task.
    """
    name, rows = spec.strip().partition("?")[0], ""
    try:
        sizes = options_of(spec)
        rows = f"; rows have {context_length} tokens ({length})"
        return make(name, context_length - TASKS[name].question(sizes), **sizes)
    except UsageError as error:
        raise UsageError(f"{setting}: {error}{rows}") from None


def options_of(spec: str) -> dict[str, int | float | bool]:
    """What `NAME?pairs=8&vocab_size=256` sets. UsageError for an unknown option."""
    name, _, query = spec.strip().partition("?")
    return read(name, query, options(name))


def _check_text(spec: str) -> None:
    """UsageError for what is no text: a task beside other sources, or one that is spelt wrongly."""
    if any(is_task(part) for part in spec.split(",")):
        raise UsageError(f"data.source: got {spec!r}; a synthetic task cannot be mixed with other sources")
    name = spec.partition("?")[0]
    known = {task.partition(":")[0] for task in TASKS}
    is_form = re.fullmatch(r"[\w:]+(\?.*=.*)?", spec) and not os.path.lexists(spec)
    if is_form and difflib.get_close_matches(name.partition(":")[0], known, 1, 0.85):
        raise UsageError(f"data.source: unknown synthetic task {name!r}; known, nearest first: {nearest(name, TASKS)}")


def labels(config: "Config", *, training: bool) -> int | None:
    """Targets of a row that count, at most, in training or in an evaluation; None: data.source is text, and all do."""
    task = find(config)
    return None if task is None else task.labels(training=training)


def training_batch(task: Task, config: "Config", step: int) -> Batch:
    """The global batch of a step: a function of the seed and the step."""
    return task.fresh(_seed(config, _TRAINING), int(step), config.train.batch_size, training=True)


@dataclasses.dataclass(frozen=True)
class ValidationRows:
    """Held-out rows in fixed order, in the form of `zoo.data.ValidationBatches`; only the answers count."""

    task: Task
    seed: int
    batch_size: int
    max_batches: int  # 0: all
    rows: Sequence[int] | None = None  # of each batch, to have no others; None: all
    text_bytes: int = 0
    every: bool = False  # every target counts, not those alone that are asked for

    @property
    def labels(self) -> int:
        """Targets of a row that are asked for, at most."""
        return self.task.labels(training=self.every)

    @property
    def num_tokens(self) -> int:
        return _num_asked(self.task, self.seed, self.batch_size)

    @property
    def fingerprint(self) -> str:
        return f"{self.task}, seed {self.seed}"

    def only(self, rows: Sequence[int]) -> "ValidationRows":
        """The same batches, of each these rows alone."""
        return dataclasses.replace(self, rows=rows)

    def at_most(self, max_batches: int) -> "ValidationRows":
        """So many batches; 0: all."""
        return dataclasses.replace(self, max_batches=max_batches)

    @property
    def num_documents(self) -> int:
        return len(self) * self.batch_size

    def documents(self, i: int) -> np.ndarray:
        """Of batch number i: its rows' numbers, int [b, T]. A row is what a document is of text."""
        rows = np.arange(self.batch_size) if self.rows is None else np.asarray(self.rows)
        return np.repeat((i * self.batch_size + rows)[:, None], self.task.context_length, axis=1)

    def __len__(self) -> int:
        batches = -(-VALIDATION_ROWS // self.batch_size)
        return min(batches, self.max_batches) if self.max_batches else batches

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            batch = self.task.fresh(self.seed, index, self.batch_size, training=self.every)
            left = VALIDATION_ROWS - index * self.batch_size
            batch["weights"][left:] = 0
            batch["bytes"] = batch["weights"] * 0
            yield batch if self.rows is None else {name: array[list(self.rows)] for name, array in batch.items()}


@functools.lru_cache(maxsize=16)
def _num_asked(task: Task, seed: int, batch_size: int) -> int:
    if task.asks_alike:
        return VALIDATION_ROWS * task.asked
    return sum(int(batch["weights"].sum()) for batch in ValidationRows(task, seed, batch_size, 0))


def validation_rows(task: Task, config: "Config", max_batches: int) -> ValidationRows:
    batch_size = config.eval.batch_size or config.train.batch_size
    return ValidationRows(task, _seed(config, _VALIDATION), batch_size, max_batches)


def _seed(config, part):
    return 2 * config.train.seed + part
