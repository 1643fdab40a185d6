"""What a task of `python -m zoo.evaluate --tasks=...` is: what it measures, as JSON, and how that is shown.

What a task leaves is data first. Tables and charts are made of the JSON, of one run or of several, so that
`zoo.compare` shows what it reads from files as `zoo.evaluate` shows what it has measured.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from zoo import data, memory
from zoo.checkpoints import Run
from zoo.config import Config
from zoo.data import synthetic
from zoo.data.rows import Batch
from zoo.errors import UsageError
from zoo.evaluate.pieces import Reader
from zoo.figures import Chart, Table

LONGEST = 16  # times the training length
_ROWS = 8  # of text that are read at once

Results = Mapping[str, dict]  # what the same task measured of each run, by the run's name


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure, and on what."""

    config: Config  # of the run; its data section says what text is read, and with which tokenizer
    run: Run
    context_lengths: list[int]  # tokens
    batches: int  # at most; 0: all

    @property
    def training_length(self) -> int:
        return self.config.train.context_length

    @functools.cached_property
    def trained_on(self) -> synthetic.Task | None:
        """The synthetic task that is evaluated on; None: text."""
        return synthetic.find(self.config)

    @property
    def longest(self) -> int:
        """Tokens that tasks beyond the training length go to: 16 times as many, or all positions that are learned."""
        model, length = self.run.model, LONGEST * self.training_length
        return min(length, model.max_positions) if model.learned_positions else length

    def multiples(self) -> list[int]:
        """1, 2, 4, 8 and 16 times the training length, as far as the model's positions go."""
        lengths = [self.training_length << i for i in range(LONGEST.bit_length())]
        return [length for length in lengths if length <= self.longest]

    @functools.cached_property
    def reader(self) -> Reader:
        """Reads rows of any length by one program, for all tasks."""
        rows = min(_ROWS, self.config.eval.batch_size or self.config.train.batch_size)
        return Reader(self.run.model, rows, self.training_length, self.longest, answers=self.trained_on is not None)

    def check_reader(self, task: str) -> None:
        """UsageError if the states of `reader` do not fit."""
        try:
            advice = "name other --tasks, or lower eval.batch_size in its config.json"
            memory.check_state(self.run.model, self.reader.rows, self.longest, advice)
        except UsageError as error:
            raise UsageError(f"--tasks: {task}: {error}") from error

    def track(self, steps: Iterable[Any], what: str) -> Iterable[Any]:
        """`steps`, with a bar where someone looks."""
        console = Console(stderr=True)
        return track(steps, what, console=console, transient=True, disable=not sys.stderr.isatty())


class Task:
    """A task of the registry (`zoo.evaluate.tasks`).

    Attributes:
      name: as in --tasks.
      about: what it measures, in a sentence.
      of_text: what it measures of runs compares on the same text alone.
      both_ways: whether bidirectional models can do it.
      head: that a run needs for it.
    """

    name: str
    about: str
    of_text: ClassVar[bool] = False
    both_ways: ClassVar[bool] = False
    head: ClassVar[str] = "tokens"

    def check(self, request: Request) -> None:
        """UsageError if it cannot be measured; nothing is compiled yet."""

    def measure(self, request: Request) -> tuple[dict, dict[str, np.ndarray]]:
        """JSON, and arrays by name that are kept in a file beside it (most tasks keep none)."""
        raise NotImplementedError

    def tables(self, results: Results) -> list[Table]:
        raise NotImplementedError

    def charts(self, results: Results) -> list[Chart]:
        raise NotImplementedError

    def figures(self, result: dict) -> dict[str, float]:
        """Of what was measured, the figures whose mean over seeds says something, by name; none by default."""
        del result
        return {}


def predictions(request: Request) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch of the validation rows of a head of classes or values, without what fills the last one up, and what
    the head says of it (`LanguageModel.predict`)."""
    graphdef, parameters = nnx.split(request.run.model)
    predict = jax.jit(lambda parameters, batch: nnx.merge(graphdef, parameters).predict(batch))
    batches = data.validation_batches(request.config, max_batches=request.batches)
    for batch in request.track(batches, request.config.data.source):
        there = batch["weights"] > 0
        predicted = np.asarray(predict(parameters, batch), np.float32)
        yield {name: array[there] for name, array in batch.items()}, predicted[there]
