"""The command: `python -m benchmarks.papers --help`."""

import argparse
import itertools
import operator
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax

from benchmarks import papers, record
from benchmarks.papers.kept import Runs
from benchmarks.papers.row_task import RowTask
from benchmarks.papers.set_up import Setup
from zoo.errors import UsageError, exit_with_message, warn
from zoo.settings import argument, nearest


def chosen(setups: list[Setup], mixers: str, tasks: str) -> list[Setup]:
    """Those of comma-separated mixers and tasks; "": all.

    Raises:
      UsageError: a name that no set-up has.
    """
    wanted = {}
    for field, given in (("mixer", mixers), ("label", tasks)):
        known = list(dict.fromkeys(getattr(setup, field) for setup in setups))
        wanted[field] = given.split(",") if given else known
        if unknown := sorted(set(wanted[field]) - set(known)):
            flag = "--mixers" if field == "mixer" else "--tasks"
            near = nearest(unknown[0], known)
            raise UsageError(f"{flag}: unknown {', '.join(unknown)}; expected some of, nearest first, {near}")
    return [setup for setup in setups if setup.mixer in wanted["mixer"] and setup.label in wanted["label"]]


def cells_of(setups: Sequence[Setup]) -> list[list[list[Setup]]]:
    """By model and task; of each, by what differs in the learning rate alone, and shares programs."""
    cells = [list(cell) for _, cell in itertools.groupby(setups, lambda setup: (setup.label, setup.mixer))]
    by_programs = operator.attrgetter("programs")
    return [
        [list(group) for _, group in itertools.groupby(sorted(cell, key=by_programs), by_programs)] for cell in cells
    ]


def found_of(cell: Sequence[Sequence[Setup]], runs: Runs, seeds: int, report: ModuleType) -> Any:
    """The report's cell of one model and task: seed 0 tries every set-up, the others the one that it chose."""
    tried = [pair for group in cell for pair in zip(group, runs.of(group, [0]), strict=True)]
    of_first = report.cell(tried)
    return of_first and report.cell([(of_first.setup, runs.of([of_first.setup], range(seeds))[0])])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.papers", description=papers.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paper", choices=papers.PAPERS)
    add("--full", action="store_true", help="as published, where the default is reduced for a CPU: for an accelerator")
    add("--seeds", type=argument(int, unit="seed"), default=3)
    add("--mixers", default="", help="some of them, comma-separated; all by default")
    add("--tasks", default="", help="some of them, comma-separated; all by default")
    add("--steps", type=argument(int, at_least=0), default=0, help="fewer than the set-up's, for a look; not kept")
    add("--again", action="store_true", help="repeat runs whose results are kept")
    add("--kept", action="store_true", help="run nothing: the table, plot and page of what is kept")
    args = parser.parse_args(argv)
    paper = papers.PAPERS[args.paper]
    if args.full and paper.full is None:
        names = ", ".join(name for name, paper in papers.PAPERS.items() if paper.full)
        raise UsageError(f"--full: {args.paper} has one form alone; it is of {names}")
    name = args.paper + ("_full" if args.full else "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux alone has it
    jax.config.update("jax_num_cpu_devices", cores)
    print(", ".join(f"{name} {value}" for name, value in record.environment().items()))
    report = paper.report
    print(report.line(report.HEADINGS))
    cells, missing = [], {}
    for cell in cells_of(chosen(list((paper.full if args.full else paper.setups)()), args.mixers, args.tasks)):
        task = cell[0][0].task
        if isinstance(task, RowTask) and task not in missing:
            missing[task] = task.missing
            if missing[task]:
                warn(f"left out, but for what is kept: {cell[0][0].label}: {missing[task]}")
        runs = Runs(name, again=args.again, partial=args.steps > 0, recall_only=args.kept or bool(missing.get(task)))
        for setup in itertools.chain(*cell):
            setup.steps = args.steps or setup.steps
        if found := found_of(cell, runs, args.seeds, report):
            cells.append(found)
            print(*map(report.line, found.rows()), sep="\n", flush=True)
    for sentence in report.conclusions(cells):
        print(sentence)
    if cells and not args.steps:
        print("written:", *report.write(name, cells))


if __name__ == "__main__":
    with exit_with_message():
        main()
