"""What is shown of runs: a line of the table for each, and by paper a plot (PNG) and a page (HTML)."""

import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from benchmarks import record
from benchmarks.papers.models import make_model
from benchmarks.papers.set_up import Setup
from zoo.evaluate import html, report
from zoo.figures import Chart, Line, Table, shown

HEADINGS = ("task", "mixer", "state bytes", "length", "rate", "published", "median", "range", "seeds", "seconds")
WIDTHS = (21, 21, 12, 7, 8, 13, 7, 14, 6, 9)


class Cell(NamedTuple):
    """A set-up with its runs: of several learning rates the one that seed 0's validation rows choose."""

    setup: Setup
    runs: list[dict]
    state_bytes: int  # of one sequence, of the task's length

    @property
    def name(self) -> str:
        """Of its line in a chart."""
        setup = self.setup
        return setup.mixer if setup.is_tuned or setup.label == setup.task.name else f"{setup.mixer}, {setup.label}"

    @property
    def of_pattern(self) -> bool:
        """The family stands in a pattern, a second time: in the table of all alone."""
        return "mixer" in self.setup.model

    def accuracies(self, length: int) -> list[float]:
        return [run[f"accuracy_{length}"] for run in self.runs]

    def rows(self) -> list[list[str]]:
        """Of each length that was tested."""
        setup, seconds = self.setup, statistics.median(run["seconds"] for run in self.runs)
        rows = []
        for length in (setup.task.length, *setup.test_lengths):
            found = self.accuracies(length)
            rows.append(
                [
                    setup.label, setup.mixer, f"{self.state_bytes:,}", f"{length}",
                    f"{setup.optimizer.learning_rate:g}", setup.published, f"{statistics.median(found):.1f}",
                    f"{min(found):.1f} - {max(found):.1f}", f"{len(found)}", f"{seconds:.1f}",
                ]
            )  # fmt: skip
        return rows


def cell(tried: Sequence[tuple[Setup, list[dict]]]) -> Cell | None:
    """Of set-ups that differ in their optimizer, with the runs of each; None: there is none yet.

    The first run of each chooses.
    """

    def validation(setup_runs: tuple[Setup, list[dict]]) -> float:
        setup, runs = setup_runs
        return runs[0].get(f"validation_{setup.task.length}", 0.0)

    found = [(setup, runs) for setup, runs in tried if runs]
    if not found:
        return None
    setup, runs = max(found, key=validation)
    return Cell(setup, runs, state_bytes(setup))


def state_bytes(setup: Setup) -> int:
    """Of one sequence as long as the task's: recurrent states, or the keys and values of all its tokens."""
    state = jax.eval_shape(lambda: make_model(setup, 0).init_state(1, setup.task.context_length)["layers"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def line(cells: Iterable[str], widths: Sequence[int] = WIDTHS) -> str:
    texts, numbers = 2, zip(cells, widths, strict=True)
    return " ".join(f"{cell:<{width}}" if i < texts else f"{cell:>{width}}" for i, (cell, width) in enumerate(numbers))


def charts(paper: str, cells: Sequence[Cell]) -> list[Chart]:
    """Accuracy by the size of the state, where a family has several; by length, where several were tested."""
    found = []
    if paper.startswith("mqar"):
        for task in dict.fromkeys(cell.setup.task for cell in cells):
            lines = {}
            for of in cells:
                if of.setup.task == task and not of.of_pattern:
                    point = of.state_bytes, statistics.median(of.accuracies(task.length))
                    lines.setdefault(of.setup.mixer, []).append(point)
            title = f"MQAR, {task.pairs} pairs in {task.length} tokens"
            of_mixers = [Line(mixer, sorted(points), mixer) for mixer, points in lines.items()]
            if of_mixers:
                found.append(Chart(title, "state of a sequence, bytes", "accuracy, %", of_mixers))
    for task in dict.fromkeys(cell.setup.task for cell in cells if cell.setup.test_lengths):
        lines = []
        for of in cells:
            if of.setup.task == task:
                lengths = (task.length, *of.setup.test_lengths)
                points = [(length, statistics.median(of.accuracies(length))) for length in lengths]
                lines.append(Line(of.name, points, of.name))
        found.append(Chart(task.name, "tokens", "accuracy, %", lines))
    return found


def by_task(paper: str, cells: Sequence[Cell]) -> Table:
    """A row for each model, a column for each task, and the mean of all where there are all."""
    cells = [of for of in cells if not of.of_pattern]
    tasks = list(dict.fromkeys(cell.setup.label for cell in cells))
    medians = {(of.name, of.setup.label): statistics.median(of.accuracies(of.setup.task.length)) for of in cells}
    rows = []
    for name in dict.fromkeys(cell.name for cell in cells):
        found = [medians.get((name, task)) for task in tasks]
        mean = None if None in found else statistics.mean(found)
        rows.append([name, *(shown(value, ".1f") for value in (*found, mean))])
    return Table(f"{paper}, accuracy in %, median of seeds", ["", *tasks, "mean"], rows, texts=1)


def conclusions(cells: Sequence[Cell]) -> list[str]:
    """What a table of accuracies says by itself."""
    del cells
    return []


def write(paper: str, cells: Sequence[Cell]) -> list[pathlib.Path]:
    """The page of all `cells`, and the charts as a picture, beside the kept runs."""
    rows = [row for cell in cells for row in cell.rows()]
    drawn = charts(paper, cells)
    tables = [by_task(paper, cells)] if all(cell.setup.is_tuned for cell in cells) else []
    tables.append(Table("Each model and task", HEADINGS, rows, texts=2))
    mixers = {cell.name: cell.setup.mixer for cell in cells}
    return write_page(paper, mixers, [html.Section("Accuracy on rows that chose nothing", drawn, tables)], drawn)


def write_page(
    paper: str, mixers: Mapping[str, str], sections: Sequence[html.Section], drawn: Sequence[Chart]
) -> list[pathlib.Path]:
    """A page of `sections`, and a picture of the charts `drawn`. `mixers`: of each name that a line may have."""
    about = [", ".join(f"{name} {value}" for name, value in record.environment().items())]
    folder = record.RESULTS / "papers"
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{paper}.html"]
    written[0].write_text(html.page(f"Published set-ups: {paper}", about, mixers, sections))
    if drawn:
        written.append(folder / f"{paper}.png")
        report.draw(drawn, mixers, written[-1])
    return written
