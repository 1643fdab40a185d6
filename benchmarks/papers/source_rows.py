"""A source of rows as a set-up trains on it: its training part in memory, shuffled anew at each pass.

Tested on all of its validation part: accuracy in per cent of classes, errors of values beside the series' baselines.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.papers.row_task import RowTask
from benchmarks.papers.set_up import Setup
from zoo.data import baselines
from zoo.data.row_batches import ValidationBatches
from zoo.data.rows import Batch
from zoo.model import LanguageModel

TEST_ROWS = 128  # of a batch


class SourceRows:
    """In the form that `benchmarks.papers.training` asks for."""

    def __init__(self, setup: Setup):
        self.setup = setup

    def loss(self, model: LanguageModel, batch: Batch, key: jax.Array | None) -> jax.Array:
        return model.batch_losses(batch, dropout_key=key).mean()  # every row weighs 1

    def stacks(self, seed: int, steps: int) -> Iterator[Batch]:
        rng, rows = np.random.default_rng([seed, 1]), _training_rows(self.setup.task, self.setup.rows)
        count, shape = len(rows["weights"]), (steps, self.setup.batch_size)
        passes = -(-steps * self.setup.batch_size // count)
        while True:
            order = np.concatenate([rng.permutation(count) for _ in range(passes)])[: steps * self.setup.batch_size]
            yield {name: array[order].reshape(*shape, *array.shape[1:]) for name, array in rows.items()}

    def tests(self, graphdef: nnx.GraphDef) -> Callable[[nnx.State, int], dict[str, Any]]:
        """`parameters`, and of classes `accuracy`; of values the model's errors and, by name, the `baselines`'."""
        predict = jax.jit(lambda params, batch: nnx.merge(graphdef, params).predict(batch))
        measure = {"classes": _accuracy, "values": _errors}[self.setup.task.head]

        def tests(params: nnx.State, seed: int) -> dict[str, Any]:
            del seed  # all rows are read
            parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
            return {"parameters": parameters} | measure(self.setup.task, functools.partial(predict, params))

        return tests


@functools.lru_cache(maxsize=1)
def _training_rows(task: RowTask, drawn: int) -> Batch:
    """The training part, or so many rows of a source that draws them; and weights of 1."""
    source = task.rows()
    batch = source.train_batch(0, 0, drawn or source.train_rows)
    return batch | {"weights": np.ones(drawn or source.train_rows, np.float32)}


def _predictions(task: RowTask, predict: Callable) -> Iterator[tuple[Batch, np.ndarray]]:
    for batch in ValidationBatches(task.rows(), TEST_ROWS):
        there = batch["weights"] > 0
        yield {name: array[there] for name, array in batch.items()}, np.asarray(predict(batch))[there]


def _accuracy(task: RowTask, predict: Callable) -> dict[str, float]:
    right = [(logits.argmax(1) == batch["label"]) for batch, logits in _predictions(task, predict)]
    return {"accuracy": 100 * float(np.concatenate(right).mean())}


def _errors(task: RowTask, predict: Callable) -> dict[str, Any]:
    sums, rows = np.zeros((2, task.horizon)), 0
    for batch, predicted in _predictions(task, predict):
        error = predicted - batch["values"][:, -task.horizon :].astype(np.float64)
        sums += np.stack([error**2, np.abs(error)]).mean(3).sum(1)
        rows += len(error)
    return shortened(baselines.errors(sums / rows)) | {"baselines": _baselines(task)}


@functools.lru_cache(maxsize=1)
def _baselines(task: RowTask) -> dict[str, dict[str, Any]]:
    return {name: shortened(found) for name, found in baselines.measure(task.rows(), task.season).items()}


def shortened(errors: dict[str, Any]) -> dict[str, Any]:
    """Of `baselines.errors` mse, mae, and mse_at some steps of the horizon."""
    by_step = errors["mse_by_step"]
    at = {f"{step}": by_step[step - 1] for step in baselines.chosen_steps(len(by_step))}
    return {"mse": errors["mse"], "mae": errors["mae"], "mse_at": at}
