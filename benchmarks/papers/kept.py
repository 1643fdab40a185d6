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


def run_or_recall(
    paper: str, setups: Sequence[Setup], seeds: int, again: bool, partial: bool, recall_only: bool = False
) -> list[list[dict]]:
    """Of each set-up the runs of seeds 0 ... seeds - 1: kept ones, and new ones as many at once as there are devices.

    Args:
      setups: that differ in their learning rate alone: programs are compiled once for all.
      again: repeat what is kept.
      partial: keep nothing.
      recall_only: run nothing; what is not kept is left out.
    """
    kept = {} if again else kept_runs(paper)
    keys = {(at, seed): f"{setup.name} {seed}" for at, setup in enumerate(setups) for seed in range(seeds)}
    found = {
        key: kept[key] for (at, _), key in keys.items() if key in kept and kept[key]["setup"] == setups[at].description
    }
    missing = [] if recall_only else [(place, key) for place, key in keys.items() if key not in found]
    trainer = Trainer(setups[0]) if missing else None
    for first in range(0, len(missing), jax.device_count()):
        together = missing[first : first + jax.device_count()]
        runs = [Run(seed, setups[at].optimizer.learning_rate) for (at, seed), _ in together]
        for ((at, _), key), result in zip(together, trainer.train_and_test(runs), strict=True):
            found[key] = {"setup": setups[at].description} | result | record.environment()
        if not partial:
            record.write(f"papers_{paper}", {"runs": kept_runs(paper) | found})
    return [[found[keys[at, seed]] for seed in range(seeds) if keys[at, seed] in found] for at in range(len(setups))]
