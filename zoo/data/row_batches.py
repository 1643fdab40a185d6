"""Sources of rows (`zoo.data.rows`) as a run reads them: for the heads `classes` and `values` (`zoo.heads`).

In the form of `zoo.data.TrainingDataset` and `zoo.data.ValidationBatches`. Batch `step` is a function of the seed and
the step alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.data import rows
from zoo.data.rows import Batch, RowSource
from zoo.errors import UsageError
from zoo.settings import nearest

if TYPE_CHECKING:
    from zoo.config import Config

_ROWS = {"classes": "labelled sequences", "values": "a series"}


def find(config: "Config") -> RowSource | None:
    """The source of rows that data.source names; None: it is text, or a synthetic task.

    Raises:
      UsageError: a source and a head that do not fit; what the source says of its options and files.
    """
    spec, head = config.data.source.strip(), config.model.head
    name = spec.partition("?")[0]
    if not rows.is_source(spec):
        if head != "tokens":
            known = nearest(name, [*rows.SOURCES])
            raise UsageError(
                f"data.source: {name!r} is for model.head=tokens, and model.head={head} needs {_ROWS[head]}; sources "
                f"of rows, nearest first: {known}"
            )
        return None
    if head == "tokens":  # said before anything is read
        raise UsageError(
            f"model.head: got tokens, and {name} has labelled rows or a series; set model.head=classes or values"
        )
    source = rows.find(config)
    if source.head != head:
        raise UsageError(
            f"model.head: got {head}, and {name} has {_ROWS[source.head]}; set model.head={source.head}, or another "
            "data.source"
        )
    if config.data.weights or config.data.validation_source:
        setting = "weights" if config.data.weights else "validation_source"
        raise UsageError(f"data.{setting}: {name} is one source with validation rows of its own; leave it empty")
    _check_sizes(config, source)
    return source


def _check_sizes(config: "Config", source: RowSource) -> None:
    """UsageError where the model's sizes, where they are set, are not the source's."""
    model = config.model
    asked = {"classes": (model.classes, source.num_classes), "channels": (model.channels, source.channels)}
    for setting, (got, has) in asked.items():
        if got and got != has:
            raise UsageError(f"model.{setting}: got {got}, {source.name} has {has}; use 0, which takes what it has")
    if 0 < model.vocab_size < source.vocab_size:
        raise UsageError(
            f"model.vocab_size: got {model.vocab_size}, {source.name} needs at least {source.vocab_size}; 0 takes it"
        )
    if model.patch > 1 and not source.channels:
        raise UsageError(f"model.patch: got {model.patch}, of numbers, and {source.name} has tokens; set it to 1")


def checked(source: RowSource, batch: Batch) -> Batch:
    """The batch, if it is what the source says of itself: a label beyond the classes would be a loss that is no number,
    many steps later.

    Raises:
      UsageError: the array, and the first row in which it is wrong.
    """
    steps = source.length + source.horizon
    numbers, lasts = {"values": (steps, source.channels)}, {}
    if source.head == "classes":
        lasts = {"tokens": (0, source.vocab_size - 1), "lengths": (1, steps), "label": (0, source.num_classes - 1)}
    expected = numbers if source.channels else {"tokens": (steps,)}
    expected |= {} if source.head == "values" else {"lengths": (), "label": ()}
    for name, shape in expected.items():
        array = batch.get(name)
        if array is None or array.shape[1:] != shape:
            got = "none" if array is None else f"rows of shape {array.shape[1:]}"
            raise UsageError(f"data.source: {source.name}: {name}: got {got}, expected rows of shape {shape}")
        low, high = lasts.get(name, (0, 0))
        wrong = ~np.isfinite(array) if name == "values" else (array < low) | (array > high)
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            what = "finite numbers" if name == "values" else f"{low} to {high}"
            raise UsageError(f"data.source: {source.name}: {name}: got {array[wrong][0]} in row {row}, expected {what}")
    return batch


def check(source: RowSource, config: "Config") -> None:
    """UsageError for a source whose first rows are not what it says (`checked`); nothing was compiled yet."""
    checked(source, source.validation_batch(0, 1))
    checked(source, source.train_batch(config.train.seed, 0, 1))


def training_batch(source: RowSource, config: "Config", step: int, rows: Sequence[int]) -> Batch:
    """These rows of the batch of a step, and weights float32 [b]: 1."""
    batch = checked(source, source.train_batch(config.train.seed, int(step), config.train.batch_size))
    taken = {name: np.ascontiguousarray(array[list(rows)]) for name, array in batch.items()}
    return taken | {"weights": np.ones(len(rows), np.float32)}


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """The validation rows in fixed order; the last batch is filled up with rows of weight 0."""

    source: RowSource
    batch_size: int
    max_batches: int = 0  # 0: all
    rows: Sequence[int] | None = None  # of each batch, to have no others; None: all
    labels: int = 1  # what stands for no text
    text_bytes: int = 0

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def num_tokens(self) -> int:
        """Steps of the rows' inputs."""
        return self.source.validation_rows * self.source.length

    def only(self, rows: Sequence[int]) -> "ValidationBatches":
        """The same batches, of each these rows alone."""
        return dataclasses.replace(self, rows=rows)

    def at_most(self, max_batches: int) -> "ValidationBatches":
        """So many batches, spread evenly over the rows; 0: all."""
        return dataclasses.replace(self, max_batches=max_batches)

    @property
    def _all(self) -> int:
        return -(-self.source.validation_rows // self.batch_size)

    def __len__(self) -> int:
        """Number of batches."""
        return min(self._all, self.max_batches) if self.max_batches else self._all

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            start = i * self._all // len(self) * self.batch_size
            there = min(self.batch_size, self.source.validation_rows - start)
            batch = checked(self.source, self.source.validation_batch(start, start + there))
            # Rows that fill up are copies of the first, which every head can read.
            filled = np.r_[np.arange(there), np.zeros(self.batch_size - there, np.int64)]
            batch = {name: array[filled] for name, array in batch.items()}
            batch["weights"] = (np.arange(self.batch_size) < there).astype(np.float32)
            yield batch if self.rows is None else {name: array[list(self.rows)] for name, array in batch.items()}


def info(source: RowSource, config: "Config") -> dict[str, Any]:
    """What `zoo.data.corpus_info` says of a source of rows: train_rows and validation_rows besides."""
    rows = source.train_rows or config.train.steps * config.train.batch_size
    return {
        "source": config.data.source,
        "fingerprint": source.fingerprint[:16],
        "train_rows": rows,
        "validation_rows": source.validation_rows,
        "train_tokens": rows * source.length,
        "validation_tokens": source.validation_rows * source.length,
        "train_bytes": 0,
        "validation_bytes": 0,
        "lost_text": 0.0,
        "gzip_bits_per_byte": None,
    }
