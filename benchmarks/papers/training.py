"""Runs of a set-up: seeds and learning rates side by side, by programs that are compiled once."""

import dataclasses
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from benchmarks.papers.models import make_model, optimizer_of
from benchmarks.papers.set_up import Setup
from zoo.data.synthetic import Batch, Task

TEST_ROWS, STEPS_AT_ONCE = 500, 200


class Run(NamedTuple):
    seed: int
    learning_rate: float


class Trainer:
    """Trains and tests models of one set-up, whatever its learning rate."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self._graphdef, params = nnx.split(make_model(setup, 0))
        unit_rate = dataclasses.replace(setup.optimizer, learning_rate=1.0)  # updates are in proportion to it
        self._optimizer = optimizer_of(dataclasses.replace(setup, optimizer=unit_rate), params)
        self._accuracy = accuracy_of(self._graphdef)
        self._programs: dict[int, Callable] = {}  # by the number of runs at once

    def train_and_test(self, runs: Sequence[Run]) -> list[dict[str, float]]:
        """Train a model for each run side by side, then test each: accuracy in per cent by the length of the task.

        Every run has devices of its own, at least one, over which its rows are shared out. `seconds` are those of the
        training of all, divided by their number. `validation_` stands for rows that choose among learning rates.
        """
        setup = self.setup
        if len(runs) not in self._programs:
            self._programs[len(runs)] = self._program(len(runs))
        train = self._programs[len(runs)]
        models = [nnx.split(make_model(setup, seed))[1] for seed, _ in runs]
        states = [
            (params, self._optimizer.init(params), jax.random.key(seed), jnp.float32(rate))
            for params, (seed, rate) in zip(models, runs, strict=True)
        ]
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        batches = [stacks(setup, seed, STEPS_AT_ONCE) for seed, _ in runs]
        started, done = time.perf_counter(), 0
        while done < setup.steps:
            stack = jax.tree.map(lambda *arrays: np.stack(arrays), *(next(of_run) for of_run in batches))
            state, losses = train(state, stack)
            done += losses.shape[1]
        final_losses = jax.device_get(losses.mean(1))
        seconds = (time.perf_counter() - started) / len(runs)
        results = []
        for index, (seed, _) in enumerate(runs):
            params = jax.device_put(jax.tree.map(operator.itemgetter(index), state[0]), jax.devices()[0])
            result = {"seconds": seconds, "loss": float(final_losses[index])}
            if setup.is_tuned:
                result[f"validation_{setup.task.length}"] = self._test(params, setup.task, [seed, 3])
            for length in (setup.task.length, *setup.test_lengths):
                task = dataclasses.replace(setup.task, length=length)
                result[f"accuracy_{length}"] = self._test(params, task, [seed, 2])
            results.append(result)
        return results

    def _test(self, params: nnx.State, task: Task, seed: list[int]) -> float:
        """Accuracy on fresh rows, in per cent."""
        pieces = max(1, task.length // 256)  # rows at once: memory stays the same
        rows = task.rows(np.random.default_rng(seed), TEST_ROWS)
        parts = [rows.take(part).batch(answers_only=True) for part in np.array_split(np.arange(TEST_ROWS), pieces)]
        right, asked = (sum(x) for x in zip(*(self._accuracy(params, part) for part in parts), strict=True))
        return 100 * float(right) / float(asked)

    def _program(self, at_once: int) -> Callable:
        """(state, batches) -> (state, losses), each with an axis of runs; batches of several steps."""
        setup, graphdef, optimizer = self.setup, self._graphdef, self._optimizer
        labels = _labels(setup)

        def loss(params, batch, key):
            key = key if setup.embedding_dropout else None
            model = nnx.merge(graphdef, params)
            losses = model.token_losses(
                batch["tokens"], batch["targets"], batch["weights"], dropout_key=key, labels=labels
            )
            return losses.sum() / batch["weights"].sum()  # every row has as many weights, or one less

        def step(state, batch):
            params, opt, key, rate = state
            key, dropout_key = jax.random.split(key)
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("rows"))
            flat, unflatten = ravel_pytree(jax.value_and_grad(loss)(params, batch, dropout_key))
            value, gradient = unflatten(jax.lax.pmean(flat, "rows"))  # one sum: each is a meeting of the threads
            if setup.optimizer.clip_norm:
                scale = jnp.minimum(1.0, setup.optimizer.clip_norm / (optax.tree.norm(gradient) + 1e-12))
                gradient = jax.tree.map(lambda g: g * scale, gradient)
            updates, opt = optimizer.update(gradient, opt, params)
            updates = jax.tree.map(lambda update: rate * update, updates)
            return (optax.apply_updates(params, updates), opt, key, rate), value

        def steps_of_a_run(state, batches):  # both with an axis of one run
            state, losses = jax.lax.scan(step, *jax.tree.map(lambda x: x[0], (state, batches)))
            return jax.tree.map(lambda x: x[None], (state, losses))

        shares = math.gcd(setup.batch_size, jax.device_count() // at_once)
        devices = np.array(jax.devices()[: at_once * shares]).reshape(at_once, shares)
        mesh = jax.sharding.Mesh(devices, ("runs", "rows"))
        by_run, by_row = P("runs"), P("runs", None, "rows")
        return jax.jit(
            jax.shard_map(
                steps_of_a_run, mesh=mesh, in_specs=(by_run, by_row), out_specs=(by_run, by_run), check_vma=False
            ),
            donate_argnums=0,
            compiler_options={"xla_cpu_multi_thread_eigen": False},  # a core is a device: none is left to share an op
        )


def run(setup: Setup, seeds: Sequence[int]) -> list[dict[str, float]]:
    """The results of each seed: see `Trainer.train_and_test`."""
    return Trainer(setup).train_and_test([Run(seed, setup.optimizer.learning_rate) for seed in seeds])


def _on_all(setup: Setup) -> bool:
    """Whether every known target is trained on, whether a test asks for it or not."""
    return bool(setup.rows) or setup.task.trains_on_all


def _labels(setup: Setup) -> int | None:
    """The most targets of a row that are trained on; None: any may be."""
    rows = setup.task.rows(np.random.default_rng(0), 1, training=True)
    return None if _on_all(setup) and (rows.known != rows.asked).any() else setup.task.asked


def stacks(setup: Setup, seed: int, steps: int) -> Iterator[Batch]:
    """Batches of `steps` steps, stacked, of fresh rows; or of at most so many, of a training set that is shuffled anew
    each time that it was passed over."""
    rng = np.random.default_rng([seed, 1])
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
            batch = drawn.batch(answers_only=not _on_all(setup))
            yield {name: array.reshape(steps, setup.batch_size, -1) for name, array in batch.items()}


def accuracy_of(graphdef: nnx.GraphDef) -> Callable:
    @jax.jit
    def accuracy(params, batch):
        logits, _ = nnx.merge(graphdef, params)(batch["tokens"])
        right = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
        return right.sum(), batch["weights"].sum()

    return accuracy
