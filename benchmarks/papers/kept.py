"""Runs are kept in benchmarks/results/ when they end, and not repeated."""

import json
from collections.abc import Sequence

import jax

from benchmarks import record
from benchmarks.papers.set_up import Setup
from benchmarks.papers.training import Run, Trainer


def kept_runs(paper: str) -> dict[str, dict]:
    """Earlier runs by the name of their set-up, and seed."""
    path = record.path(f"papers_{paper}")
    return json.loads(path.read_text())["runs"] if path.exists() else {}


class Runs:
    """Of set-ups whose programs are compiled once, in one process: kept runs, and new ones.

    Args:
      paper: by whose name they are kept.
      again: repeat what is kept.
      partial: keep nothing.
      recall_only: run nothing; what is not kept is left out.
    """

    def __init__(self, paper: str, *, again: bool = False, partial: bool = False, recall_only: bool = False):
        self._paper, self._partial, self._recall_only = paper, partial, recall_only
        self._kept = {} if again else kept_runs(paper)
        self._trainers: dict[str, Trainer] = {}

    def of(self, setups: Sequence[Setup], seeds: Sequence[int]) -> list[list[dict]]:
        """Of each set-up the runs of `seeds`, new ones as many at once as there are devices.

        The set-ups differ in their learning rate alone: they share programs.
        """
        kept = self._kept
        keys = {(at, seed): f"{setup.name} {seed}" for at, setup in enumerate(setups) for seed in seeds}
        found = {
            key: kept[key]
            for (at, _), key in keys.items()
            if key in kept and kept[key]["setup"] == setups[at].description
        }
        missing = [] if self._recall_only else [(place, key) for place, key in keys.items() if key not in found]
        for first in range(0, len(missing), jax.device_count()):
            together = missing[first : first + jax.device_count()]
            runs = [Run(seed, setups[at].optimizer.learning_rate) for (at, seed), _ in together]
            for ((at, _), key), result in zip(together, self._trainer(setups[0]).train_and_test(runs), strict=True):
                found[key] = {"setup": setups[at].description} | result | record.environment()
            kept |= found
            if not self._partial:
                record.write(f"papers_{self._paper}", {"runs": kept_runs(self._paper) | found})
        return [[found[keys[at, seed]] for seed in seeds if keys[at, seed] in found] for at in range(len(setups))]

    def _trainer(self, setup: Setup) -> Trainer:
        if setup.programs not in self._trainers:
            self._trainers[setup.programs] = Trainer(setup)
        return self._trainers[setup.programs]
