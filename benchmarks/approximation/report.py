"""Tables, in Markdown, and a plot of what was measured."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.approximation.forms import FORMS
from zoo import plots
from zoo.figures import Chart, Line, Table, shown

NUMBERS_OF_FEATURES = ("performer", "performer, relu")


def median(row: Mapping) -> float:
    return statistics.median(row["errors"])


def directions(kept: Mapping) -> list[str]:
    return list(dict.fromkeys(row["direction"] for row in kept["rows"]))


def longest(kept: Mapping) -> int:
    return max(row["length"] for row in kept["rows"])


def slope(rows: Sequence[Mapping]) -> float:
    """Of log error in log size: -1/2 where errors are those of a mean of so many numbers."""
    sizes, errors = zip(*((row["size"], median(row)) for row in rows), strict=True)
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def by_size(kept: Mapping, direction: str) -> Table:
    """At the longest length: a row a form, with the error at each size, and the slope of random features."""
    rows = []
    for name, form in FORMS.items():
        found = [row for row in kept["rows"] if (row["form"], row["direction"]) == (name, direction)]
        found = [row for row in found if row["length"] == longest(kept)]
        if not found:
            continue
        each = [f"{row['size']}: {median(row):.3f}" if form.size else f"{median(row):.3f}" for row in found]
        fall = f"{slope(found):.2f}" if name in NUMBERS_OF_FEATURES and len(found) > 1 else ""
        rows.append([name, form.size, ", ".join(each), fall])
    title = f"{kept['what']}, {direction}, {longest(kept)} tokens"
    return Table(title, ["", "size", "error by size", "slope"], rows, texts=3)


def by_length(kept: Mapping, direction: str) -> Table:
    lengths = sorted({row["length"] for row in kept["rows"]})
    rows = []
    for name, form in FORMS.items():
        usual = [row for row in kept["rows"] if (row["form"], row["direction"]) == (name, direction)]
        found = {row["length"]: median(row) for row in usual if row["size"] == form.usual}
        if found:
            size = f"{form.size} {form.usual}" if form.size else ""
            rows.append([name, size, *(shown(found.get(length), ".3f") for length in lengths)])
    return Table(f"{kept['what']}, {direction}", ["", "size", *map(str, lengths)], rows, texts=2)


def ranks(kept: Mapping) -> Table:
    rows = [
        [row["of"], f"{row['effective']:.1f}", f"{row['numerical']:.1f}", f"{row['largest']}"] for row in kept["ranks"]
    ]
    headings = ["of a head", "effective rank", "above 1%", "at most"]
    return Table(f"{kept['what']}, bidirectional, {longest(kept)} tokens", headings, rows, texts=1)


def markdown(table: Table) -> str:
    rule = ["---" if i < table.texts else "---:" for i in range(len(table.headings))]
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.headings, rule, *table.rows)]
    return "\n".join([f"{table.title}:", "", *lines, ""])


def tables(inputs: Mapping[str, Mapping]) -> list[str]:
    found = []
    for kept in inputs.values():
        features = f"about e^{kept['exponent']:.1f} features"
        found.append(
            f"**{kept['what']}.** A random feature's estimate of a key's weight has a variance of"
            f" exp(|q + k|^2 / sqrt(K)) - 1 times its square: {features} leave an error of the weight's own size.\n"
        )
        for direction in directions(kept):
            found += [markdown(by_size(kept, direction)), markdown(by_length(kept, direction))]
        found.append(markdown(ranks(kept)))
    return found


def charts(inputs: Mapping[str, Mapping]) -> list[Chart]:
    found = []
    for kept in inputs.values():
        for direction in directions(kept):
            title = f"{kept['what']}, {direction}"
            found.append(_chart_by_size(kept, direction, title))
        outputs = {
            row["of"].removeprefix("output, "): row["spectrum"] for row in kept["ranks"] if "output" in row["of"]
        }
        spectra = [Line(name, list(enumerate(values, 1)), name) for name, values in outputs.items()]
        title = f"{kept['what']}, outputs"
        found.append(Chart(title, "singular value", "over the largest", spectra, log_x=False, log_y=True))
    return found


def _chart_by_size(kept: Mapping, direction: str, title: str) -> Chart:
    rows = [row for row in kept["rows"] if row["direction"] == direction and row["length"] == longest(kept)]
    widest = [FORMS[row["form"]].rows(row["size"]) for row in rows if row["size"]]
    lines = []
    for name, form in FORMS.items():
        points = [(form.rows(row["size"]), median(row)) for row in rows if row["form"] == name]
        if points and not form.size:  # one number: a level
            points = [(x, points[0][1]) for x in (min(widest), max(widest))]
        if points:
            lines.append(Line(name, points, name))
    return Chart(title, "rows kept of the past", "error", lines, log_y=True)


def draw(inputs: Mapping[str, Mapping], path: pathlib.Path) -> None:
    drawn = charts(inputs)
    mixers = {name: form.family for name, form in FORMS.items()}
    mixers |= {line.run: "" for chart in drawn for line in chart.lines if line.run not in mixers}
    mixers["softmax"] = "attention"
    plots.charts(drawn, mixers, path)
