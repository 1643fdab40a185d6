"""What is shown of runs of `encoders`: accuracies, errors of series beside their baselines, and which is less.

In the form of `benchmarks.papers.report`.
"""

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.papers import report
from benchmarks.papers.encoders import CONVOLUTIONS, HELD_TO
from benchmarks.papers.set_up import Setup
from zoo.evaluate import html
from zoo.figures import Chart, Intervals, Line, Table, shown

HEADINGS = ("task", "mixer", "parameters", "ms a step", "published", "median", "range", "seeds", "seconds")
WIDTHS = (14, 17, 11, 10, 10, 9, 18, 6, 8)
_LINEAR = "linear regression"


class Cell(NamedTuple):
    """A set-up with its runs."""

    setup: Setup
    runs: list[dict]

    @property
    def of_series(self) -> bool:
        return self.setup.task.head == "values"

    @property
    def figures(self) -> list[float]:
        """Of each run: accuracy in per cent, or the mean squared error."""
        return [run["mse" if self.of_series else "accuracy"] for run in self.runs]

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    def rows(self) -> list[list[str]]:
        form, figures = ".4f" if self.of_series else ".1f", self.figures
        steps = [run["ms_a_step"] for run in self.runs if run["ms_a_step"] is not None]
        return [
            [
                self.setup.label, self.setup.mixer, f"{self.runs[0]['parameters']:,}",
                shown(statistics.median(steps) if steps else None, ".1f"), self.setup.published,
                format(self.median, form), f"{format(min(figures), form)} - {format(max(figures), form)}",
                f"{len(figures)}", f"{statistics.median(run['seconds'] for run in self.runs):.1f}",
            ]
        ]  # fmt: skip


def cell(tried: Sequence[tuple[Setup, list[dict]]]) -> Cell | None:
    """Of the one set-up and its runs; None: there is none yet."""
    ((setup, runs),) = tried
    return Cell(setup, runs) if runs else None


def line(cells: Iterable[str]) -> str:
    return report.line(cells, WIDTHS)


def _by_task(cells: Sequence[Cell], *, of_series: bool) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for of in cells:
        if of.of_series == of_series:
            found.setdefault(of.setup.label, []).append(of)
    return found


def conclusions(cells: Sequence[Cell]) -> list[str]:
    """In words: who reaches what a task is held to; who errs less than the linear regression; what conv_linear adds."""
    found = []
    for task, own in _by_task(cells, of_series=False).items():
        if own[0].setup.task.name in HELD_TO:
            bar, whose = HELD_TO[own[0].setup.task.name]
            names = [of.setup.mixer for of in own if of.median >= bar]
            found.append(f"{task}: a median of {bar:g} % ({whose}) or more: {_listed(names)} of {len(own)} families")
    for task, own in _by_task(cells, of_series=True).items():
        baseline = own[0].runs[0]["baselines"][_LINEAR]["mse"]
        less = [of.setup.mixer for of in own if max(of.figures) < baseline]
        more = [of.setup.mixer for of in own if min(of.figures) > baseline]
        between = [of.setup.mixer for of in own if of.setup.mixer not in less + more]
        found.append(
            f"{task}, horizon {own[0].setup.task.horizon}: squared errors below the {_LINEAR}'s {baseline:.4f}, of "
            f"every seed: {_listed(less)}; above it: {_listed(more)}; on both sides: {_listed(between)}"
        )
        by_mixer = {of.setup.mixer: of for of in own}
        if {"conv_linear", "linear_attention", CONVOLUTIONS} <= by_mixer.keys():
            both, *halves = (by_mixer[m] for m in ("conv_linear", "linear_attention", CONVOLUTIONS))
            words = [f"{_beside(both, of)} {of.setup.mixer}" for of in halves]
            sizes = [f"{of.runs[0]['parameters']:,}" for of in (both, *halves)]
            found.append(f"{task}: conv_linear errs {' and '.join(words)}; parameters: {', '.join(sizes)}")
    return found


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} ({len(names)})" if names else "none"


def _beside(one: Cell, other: Cell) -> str:
    """In words, by medians; whether every seed says the same."""
    less = one.median < other.median
    ordered = (one, other) if less else (other, one)
    apart = max(ordered[0].figures) < min(ordered[1].figures)
    return ("less than" if less else "no less than") + (" (every seed)" if apart else " (seeds overlap)")


def _series_tables(task: str, own: Sequence[Cell]) -> tuple[Table, Chart]:
    """Errors of families and baselines by step of the horizon, medians of seeds."""
    baselines = own[0].runs[0]["baselines"]
    by_step = {name: errors["mse_at"] for name, errors in baselines.items()}
    whole = {name: [errors["mse"], errors["mae"]] for name, errors in baselines.items()}
    steps = next(iter(by_step.values())).keys()
    for of in own:
        name = of.setup.mixer
        by_step[name] = {step: statistics.median(run["mse_at"][step] for run in of.runs) for step in steps}
        whole[name] = [of.median, statistics.median(run["mae"] for run in of.runs)]
    rows = [[name, *(f"{value:.4f}" for value in (*whole[name], *at.values()))] for name, at in by_step.items()]
    title = f"{task}, horizon {own[0].setup.task.horizon}: errors, median of seeds"
    headings = ["", "squared", "absolute", *(f"squared, step {step}" for step in steps)]
    lines = [Line(name, [(int(step), value) for step, value in at.items()], name) for name, at in by_step.items()]
    return Table(title, headings, rows, texts=1), Chart(title, "step", "mean squared error", lines, log_y=True)


def write(paper: str, cells: Sequence[Cell]) -> list[pathlib.Path]:
    """The page of all `cells`, and the charts of series as a picture, beside the kept runs."""
    classes, series = (_by_task(cells, of_series=flag) for flag in (False, True))
    intervals = [
        Intervals(task, "accuracy, %", [(of.setup.mixer, min(of.figures), of.median, max(of.figures)) for of in own])
        for task, own in classes.items()
    ]
    shown_series = [_series_tables(task, own) for task, own in series.items()]
    tables, charts = [table for table, _ in shown_series], [chart for _, chart in shown_series]
    rows = [row for of in cells for row in of.rows()]
    sections = [
        html.Section("Every run's figures", [], [Table("", HEADINGS, rows, texts=2)], conclusions(cells)),
        html.Section("Classes", intervals),
        html.Section("Series", charts, tables),
    ]
    mixers = {of.setup.mixer: of.setup.mixer for of in cells}
    baselines = {name for own in series.values() for name in own[0].runs[0]["baselines"]}
    return report.write_page(paper, mixers | dict.fromkeys(sorted(baselines), ""), sections, charts)
