"""A synthetic task as a set-up trains on it: rows drawn from a generator, and accuracy on fresh ones."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from benchmarks.papers.set_up import Setup
from zoo.data.synthetic import Batch, Task
from zoo.model import LanguageModel

TEST_ROWS = 500


class SyntheticRows:
    """In the form that `benchmarks.papers.training` asks for."""

    def __init__(self, setup: Setup):
        self.setup, self._on_all = setup, bool(setup.rows) or setup.task.trains_on_all

    def loss(self, model: LanguageModel, batch: Batch, key: jax.Array | None) -> jax.Array:
        losses = model.token_losses(
            batch["tokens"], batch["targets"], batch["weights"], dropout_key=key, labels=self._labels()
        )
        return losses.sum() / batch["weights"].sum()  # every row has as many weights, or one less

    def _labels(self) -> int | None:
        """The most targets of a row that are trained on; None: any may be."""
        rows = self.setup.task.rows(np.random.default_rng(0), 1, training=True)
        return None if self._on_all and (rows.known != rows.asked).any() else self.setup.task.asked

    def stacks(self, seed: int, steps: int) -> Iterator[Batch]:
        """Of fresh rows; or of a training set that is shuffled anew each time that it was passed over."""
        setup, rng = self.setup, np.random.default_rng([seed, 1])
        if setup.rows:
            rows = setup.task.rows(np.random.default_rng([seed, 0]), setup.rows, training=True)
            epoch = setup.rows // setup.batch_size
            steps = max(size for size in range(1, min(steps, epoch) + 1) if epoch % size == 0)
        while True:
            if setup.rows:
                order = rng.permutation(setup.rows)[: epoch * setup.batch_size]
                parts = map(rows.take, order.reshape(-1, steps * setup.batch_size))
            else:
                parts = [setup.task.rows(rng, steps * setup.batch_size, training=True)]
            for drawn in parts:
                batch = drawn.batch(answers_only=not self._on_all)
                yield {name: array.reshape(steps, setup.batch_size, -1) for name, array in batch.items()}

    def tests(self, graphdef: nnx.GraphDef) -> Callable[[nnx.State, int], dict[str, float]]:
        """Accuracy in per cent by the length of the task; `validation_` of rows that choose among learning rates."""
        setup, accuracy = self.setup, _accuracy_of(graphdef)

        def tests(params: nnx.State, seed: int) -> dict[str, float]:
            found = {}
            if setup.is_tuned:
                found[f"validation_{setup.task.length}"] = _test(accuracy, params, setup.task, [seed, 3])
            for length in (setup.task.length, *setup.test_lengths):
                task = dataclasses.replace(setup.task, length=length)
                found[f"accuracy_{length}"] = _test(accuracy, params, task, [seed, 2])
            return found

        return tests


def _test(accuracy: Callable, params: nnx.State, task: Task, seed: list[int]) -> float:
    """Accuracy on fresh rows, in per cent."""
    pieces = max(1, task.length // 256)  # rows at once: memory stays the same
    rows = task.rows(np.random.default_rng(seed), TEST_ROWS)
    parts = [rows.take(part).batch(answers_only=True) for part in np.array_split(np.arange(TEST_ROWS), pieces)]
    right, asked = (sum(x) for x in zip(*(accuracy(params, part) for part in parts), strict=True))
    return 100 * float(right) / float(asked)


def _accuracy_of(graphdef: nnx.GraphDef) -> Callable:
    @jax.jit
    def accuracy(params, batch):
        logits, _ = nnx.merge(graphdef, params)(batch["tokens"])
        right = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
        return right.sum(), batch["weights"].sum()

    return accuracy
