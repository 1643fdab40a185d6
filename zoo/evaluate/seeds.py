"""Runs that differ in their seed alone: what a task measured of each, in the mean, with its 95 % interval.

    mean +- t s / sqrt(n),   s the deviation of n seeds, t the 97.5 % point of Student's distribution with n - 1 degrees

as of figures that are normal over seeds. An interval of one run's own is of its rows, and says nothing of seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from zoo import config as zoo_config
from zoo.config import Config
from zoo.errors import UsageError
from zoo.evaluate.task import Task
from zoo.figures import Table, interval

_MAY_DIFFER = ("train.seed", "data.cache_dir")


class OverSeeds(NamedTuple):
    values: list[float]  # of each run
    mean: float
    low: float
    high: float


def check(configs: Mapping[str, Config]) -> None:
    """UsageError for runs, by workdir, that differ in more than their seed, or not in it."""
    (first, own), *others = configs.items()
    for workdir, config in others:
        different = [x for x in zoo_config.difference(own, config) if x.partition(":")[0] not in _MAY_DIFFER]
        if different:
            shown = "; ".join(different[:5]) + ("; ..." if len(different) > 5 else "")
            raise UsageError(
                f"--workdir: {workdir} differs from {first} in more than train.seed: {shown}; evaluate each by itself, "
                "and compare them by zoo.compare"
            )
    seeds = [config.train.seed for config in configs.values()]
    if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
        raise UsageError(f"--workdir: two runs have train.seed = {min(twice)}; expected another seed in each")


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Of a figure of at least two runs."""
    from scipy.special import stdtrit  # 0.2 s that this alone needs

    mean, count = statistics.fmean(values), len(values)
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return OverSeeds(list(values), mean, mean - half, mean + half)


def measured(task: Task, results: Sequence[dict]) -> dict[str, OverSeeds]:
    """By name each figure that a task has of every run."""
    figures = [task.figures(result) for result in results]
    return {name: over_seeds([of_run[name] for of_run in figures]) for name in figures[0]}


def table(task: str, found: Mapping[str, OverSeeds]) -> Table:
    count = len(next(iter(found.values())).values)
    rows = [
        [
            name,
            f"{of.mean:.4f}",
            interval(of.low, of.high, ".4f"),
            interval(min(of.values), max(of.values), ".4f"),
        ]
        for name, of in found.items()
    ]
    return Table(f"{task}, {count} seeds", ["", "mean", "95 % interval", "range"], rows, texts=1)
