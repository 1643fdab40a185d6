"""What is shown, as data: tables and charts, before they are lines of a terminal, a PNG or HTML."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """Of a chart; a point without a value is left out."""

    name: str
    points: Sequence[tuple[float, float | None]]
    run: str  # whose it is


class Chart(NamedTuple):
    """Lines over one axis. `marked`: an x to draw a line at, and what it is."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = True  # to the base of 2
    log_y: bool = False
    marked: tuple[float, str] | None = None

    def finite(self) -> list[list[tuple[float, float]]]:
        """The points of each line that can be drawn."""
        return [
            [
                (x, y)
                for x, y in line.points
                if y is not None and math.isfinite(x) and math.isfinite(y) and not (self.log_y and y <= 0)
            ]
            for line in self.lines
        ]


class Intervals(NamedTuple):
    """Of each name a value between two others, one under the other."""

    title: str
    x: str
    rows: Sequence[tuple[str, float, float, float]]  # name, low, value, high


class Table(NamedTuple):
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 0  # so many columns are text, and stand on the left


def of_runs(title: str, headings: Sequence[str], rows: Mapping[str, Sequence[Sequence[str]]]) -> Table:
    """One table of the rows of all runs; where there are several, a column says whose a row is."""
    if len(rows) == 1:
        (own,) = rows.values()
        return Table(title, headings, own)
    return Table(title, ["run", *headings], [[run, *row] for run, own in rows.items() for row in own], texts=1)


def shown(value: float | None, form: str) -> str:
    """A number by a format such as ",.3f"; "-" where there is none."""
    return "-" if value is None else format(value, form)


def interval(low: float | None, high: float | None, form: str) -> str:
    """ "-0.012 to 0.034"."""
    return "-" if low is None or high is None else f"{format(low, form)} to {format(high, form)}"


def line_names(of_run: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Names of the lines of each run: the run's, where it has one, and the line's own, where one run has all."""
    if len(of_run) == 1:
        return {run: list(names) for run, names in of_run.items()}
    return {run: [run] if len(names) == 1 else [f"{run}, {name}" for name in names] for run, names in of_run.items()}
