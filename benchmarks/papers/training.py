"""Runs of a set-up: seeds and learning rates side by side, by programs that are compiled once.

What a set-up trains on is of its task: `synthetic_rows`, `source_rows`. Each has

    loss(model, batch, key)     of a device's part of a batch
    stacks(seed, steps)         batches of `steps` steps, or of at most so many, stacked, without end
    tests(graphdef)             a function of parameters and a seed: what is kept of a run
"""

import dataclasses
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from benchmarks.papers.models import make_model, optimizer_of
from benchmarks.papers.row_task import RowTask
from benchmarks.papers.set_up import Setup
from benchmarks.papers.source_rows import SourceRows
from benchmarks.papers.synthetic_rows import SyntheticRows

STEPS_AT_ONCE = 200


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
        self._rows = (SourceRows if isinstance(setup.task, RowTask) else SyntheticRows)(setup)
        self._tests = self._rows.tests(self._graphdef)
        self._programs: dict[int, Callable] = {}  # by the number of runs at once

    def train_and_test(self, runs: Sequence[Run]) -> list[dict[str, float]]:
        """Train a model for each run side by side, then test each.

        Every run has devices of its own, at least one, over which its rows are shared out. `seconds` are those of the
        training of all, divided by their number; `ms_a_step` those of a step times the devices of a run, without the
        first steps, before which the program is compiled.
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
        batches = [self._rows.stacks(seed, STEPS_AT_ONCE) for seed, _ in runs]
        started, done, first = time.perf_counter(), 0, None
        while done < setup.steps:
            stack = jax.tree.map(lambda *arrays: np.stack(arrays), *(next(of_run) for of_run in batches))
            state, losses = train(state, stack)
            done += losses.shape[1]
            if first is None:
                jax.block_until_ready(losses)
                first = done, time.perf_counter()
        final_losses = jax.device_get(losses.mean(1))
        ended = time.perf_counter()
        seconds, after = (ended - started) / len(runs), done - first[0]
        ms_a_step = 1000 * (ended - first[1]) * self._shares(len(runs)) / after if after else None
        results = []
        for index, (seed, _) in enumerate(runs):
            params = jax.device_put(jax.tree.map(operator.itemgetter(index), state[0]), jax.devices()[0])
            of_training = {"seconds": seconds, "ms_a_step": ms_a_step, "loss": float(final_losses[index])}
            results.append(of_training | self._tests(params, seed))
        return results

    def _shares(self, at_once: int) -> int:
        """Devices of a run, over which its rows are shared out."""
        return math.gcd(self.setup.batch_size, jax.device_count() // at_once)

    def _program(self, at_once: int) -> Callable:
        """(state, batches) -> (state, losses), each with an axis of runs; batches of several steps."""
        setup, graphdef, optimizer = self.setup, self._graphdef, self._optimizer

        def loss(params, batch, key):
            return self._rows.loss(nnx.merge(graphdef, params), batch, key if setup.embedding_dropout else None)

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

        shares = self._shares(at_once)
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
