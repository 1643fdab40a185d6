"""The registry of what `python -m zoo.evaluate --tasks=...` can measure.

A task is a function of a `Request` that returns JSON, and how that is shown and drawn.
"""

import copy
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.progress import track

from zoo import data
from zoo.config import Config
from zoo.errors import UsageError
from zoo.evaluate import report
from zoo.evaluate.perplexity import perplexity
from zoo.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure, and on what."""

    config: Config  # of the run; its data section says what text is read, and with which tokenizer
    model: LanguageModel
    context_lengths: list[int]  # tokens
    batches: int  # at most; 0: all


class Task(NamedTuple):
    run: Callable[[Request], dict]
    tables: Callable[[dict], list[RenderableType]]
    plot: Callable[[dict, pathlib.Path], None]


def _perplexity(request: Request) -> dict:
    """Perplexity at each context length. Rows of other lengths than the run's keep the number of tokens in a batch."""
    datasets = {}
    for length in request.context_lengths:
        if request.model.learned_positions and length > request.model.max_positions:
            raise UsageError(
                f"--context_length: {length} exceeds the model's {request.model.max_positions} learned positions"
            )
        config = copy.deepcopy(request.config)
        rows = config.eval.batch_size or config.train.batch_size
        config.eval.batch_size = max(1, rows * config.train.context_length // length)
        datasets[length] = data.validation_batches(config, length, max_batches=request.batches)
    results = []
    for length, batches in datasets.items():
        console = Console(stderr=True)
        shown = track(batches, f"context {length}", console=console, transient=True, disable=not sys.stderr.isatty())
        results.append({"context_length": length} | perplexity(request.model, shown, batches.labels))
    return {"by_context_length": results}


def _plot_perplexity(result: dict, path: pathlib.Path) -> None:
    from zoo import plots  # matplotlib, which few commands need

    plots.loss_by_position(result["by_context_length"], path)


TASKS: dict[str, Task] = {
    "perplexity": Task(_perplexity, report.perplexity_tables, _plot_perplexity),
}
