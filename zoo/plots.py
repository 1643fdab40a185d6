"""Figures: one look for a family everywhere, and a label at the end of each line, none over another.

Nothing is shown; each function writes a PNG. A family keeps its colour and dash in every figure, by its place in the
registry; softmax attention, which the others are held against, is black and thick.
"""

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from zoo.config import MLP_LAYER
from zoo.figures import Chart
from zoo.mixers import MIXERS

Row = dict[str, float | int | None]  # of metrics.jsonl

# Told apart with the usual kinds of colour blindness too: the "muted" scheme of Paul Tol's "Colour schemes" (SRON
# technical note, 2021), in an order in which neighbours contrast, and its two palest made darker for lines.
COLOURS = ("#332288", "#cc6677", "#117733", "#3fa7dc", "#882255", "#999933", "#44aa99", "#aa4499", "#d99f2b")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 1.5, 1, 1.5)), (0, (9, 3)))
MARKERS = ("", "s", "^", "D", "v", "P", "X", "*")  # where colours and dashes do not suffice
FONT_SIZE = 8  # points
_LABEL = 0.1  # of the axes' width, to the right of them: where a label's text begins
_LINE_INCHES = 1.3 * FONT_SIZE / 72  # of a label


class Style(NamedTuple):
    """Keyword arguments of a line."""

    color: str
    linestyle: str | tuple
    linewidth: float = 1.3
    marker: str = ""


_EVERY = [Style(c, dash, marker=m) for m in MARKERS for dash in DASHES for c in COLOURS]
_ATTENTION = Style("black", "-", 2.6)


def families() -> dict[str, Style]:
    """The style of each family."""
    others = iter(_EVERY)
    return {name: _ATTENTION if name == "attention" else next(others) for name in MIXERS}


def styles(mixers: Sequence[str]) -> list[Style]:
    """A style for each line, no two alike (up to 360 lines), from the `model.mixer` of each.

    The first line of a family has its family's style. Further ones, and patterns of several families, take what no
    family has, then what no family in the figure has, then markers.
    """
    own = families()
    names = [{part.strip() for part in mixer.split(",")} - {MLP_LAYER} for mixer in mixers]
    singles = [next(iter(name)) if len(name) == 1 else "" for name in names]
    chosen: list[Style | None] = [
        own.get(family) if family not in singles[:i] else None for i, family in enumerate(singles)
    ]
    taken = set(chosen)
    free = [s for s in sorted(_EVERY, key=lambda s: (s.marker != "", s in own.values())) if s not in taken]
    spare = iter(free * (1 + len(mixers) // max(len(free), 1)))
    return [style or next(spare) for style in chosen]


# --- Labels -----------------------------------------------------------------------------------------------------------


def spread(wanted: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """The positions `gap` apart or more that are nearest to `wanted` (least squares), in [low, high] if they fit there.

    With y_i = z_i + i gap in sorted order it is an isotonic regression of z, which pooling adjacent violators solves
    (Ayer et al. 1955); the bounds then clip z.
    """
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(order))
    pools: list[list[float]] = []  # mean, number
    for z in wanted[order] - offsets:
        pools.append([z, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    z = np.repeat([mean for mean, _ in pools], [number for _, number in pools])
    placed = np.empty(len(order))
    placed[order] = np.clip(z, low, max(low, high - offsets[-1])) + offsets if len(order) else []
    return placed


def label_line_ends(axes: Axes, labels: Sequence[tuple[Line2D, str]]) -> list[Text]:
    """Right of the axes: a sample of each line and its name, led to from its last finite point; none over another.

    Call it when all else is drawn. Where the axes are too low for all labels, the labels get smaller.
    """
    ends = [(line, text, _last_point(line)) for line, text in labels]
    ends = [(line, text, end) for line, text, end in ends if end is not None]
    if not ends:
        return []
    look = {"fontsize": FONT_SIZE, "va": "center", "parse_math": False, "transform": axes.transAxes}
    texts = [axes.text(1 + _LABEL, 0.5, _shown(text), color=line.get_color(), **look) for line, text, _ in ends]
    figure = axes.figure
    figure.draw_without_rendering()  # lays the figure out, with room for the labels
    box = axes.get_window_extent()
    if (needed := len(texts) * _height(texts)) > box.height:
        for text in texts:
            text.set_fontsize(FONT_SIZE * box.height / needed)
    gap = _height(texts)
    wanted = np.array([axes.transData.transform(end)[1] for *_, end in ends])
    placed = spread(np.clip(wanted, box.y0, box.y1), gap, box.y0 + gap / 2, box.y1 - gap / 2)
    for (line, _, end), text, y in zip(ends, texts, (placed - box.y0) / box.height, strict=True):
        text.set_y(y)
        sample = Line2D([1 + 0.55 * _LABEL, 1 + 0.95 * _LABEL], [y, y])
        sample.update_from(line)
        sample.set(transform=axes.transAxes, clip_on=False, clip_path=None, marker="")
        axes.add_artist(sample)
        axes.annotate("", end, (1 + 0.45 * _LABEL, y), textcoords="axes fraction", arrowprops=_lead(line.get_color()))
    return texts


def label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> list[Text]:
    """Beside each point (x, y, name, colour) its name, at the nearest place where it hides no other name or point."""
    figure = axes.figure
    figure.draw_without_rendering()
    dots = axes.transData.transform([(x, y) for x, y, *_ in points])
    taken = [np.hstack([dots - 4, dots + 4])]  # x0, y0, x1, y1
    texts = []
    for (x, y, name, colour), dot in zip(points, dots, strict=True):
        text = axes.annotate(
            _shown(name), (x, y), (0, 0), textcoords="offset pixels", color=colour, fontsize=FONT_SIZE, parse_math=False
        )
        size = text.get_window_extent()
        for radius, angle in ((r, math.radians(a)) for r in range(7, 400, 6) for a in range(0, 360, 30)):
            left = radius * math.cos(angle) + size.width * (math.cos(angle) - 1) / 2
            low = radius * math.sin(angle) + size.height * (math.sin(angle) - 1) / 2
            corners = dot + (left, low), dot + (left, low) + (size.width, size.height)
            inside = (axes.bbox.p0 < corners[0]).all() and (corners[1] < axes.bbox.p1).all()
            others = np.concatenate(taken)
            if inside and not ((others[:, :2] <= corners[1]) & (corners[0] <= others[:, 2:])).all(axis=1).any():
                break
        text.set_position((left, low))
        taken.append(np.hstack(corners)[None])
        texts.append(text)
        if radius > 20:
            nearest = np.clip(dot, *corners) - dot
            axes.annotate("", (x, y), nearest, textcoords="offset pixels", arrowprops=_lead(colour), zorder=1)
    return texts


def _lead(colour: str) -> dict:
    return {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 0}


def _last_point(line: Line2D) -> tuple[float, float] | None:
    finite = [(x, y) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(x) and math.isfinite(y)]
    return finite[-1] if finite else None


def _height(texts: list[Text]) -> float:
    """Pixels of the highest text, and a little air."""
    return 1.03 * max(text.get_window_extent().height for text in texts)


def _shown(name: str, longest: int = 40) -> str:
    """`name` without what the font lacks, cut to a length that fits."""
    name = "".join(c if c.isprintable() and _font().get_char_index(ord(c)) else "?" for c in name)
    return name if len(name) <= longest else f"{name[: longest - 13]}...{name[-10:]}"


@functools.cache
def _font() -> FT2Font:
    return font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))


def height(num_labels: int, least: float) -> float:
    """Inches of axes that `num_labels` labels fit beside."""
    return max(least, 0.8 + num_labels * _LINE_INCHES)


# --- Figures ----------------------------------------------------------------------------------------------------------


def _axes(figure: Figure, *shape: int, **options) -> np.ndarray:
    panels = np.atleast_1d(figure.subplots(*shape, **options))
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return panels


def _curve(axes: Axes, rows: Iterable[Row], x: str, y: str, style: Style) -> Line2D:
    """A line through a metric's rows. Evaluations are dots, joined as far as they were made on the same tokens."""
    with_both = [row for row in rows if row.get(y) is not None and x in row]
    points = [(row[x], row[y], row.get("eval_tokens", row.get("eval_rows"))) for row in with_both]
    joined: list[tuple[float, float]] = []
    for i, (at, value, tokens) in enumerate(points):
        if y != "loss" and i and tokens != points[i - 1][2]:
            joined.append((at, math.nan))
        joined.append((at, value))
    at, values = zip(*joined, strict=True) if joined else ((), ())
    marker = style.marker or ("" if y == "loss" else "o")
    every = max(1, len(joined) // 10) if y == "loss" else None
    return axes.plot(at, values, **style._replace(marker=marker)._asdict(), markersize=4, markevery=every)[0]


def loss(rows: Sequence[Row], mixer: str, path: str | os.PathLike, unit: str = "nats per token") -> None:
    """One run's training and validation loss against tokens."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    (axes,) = _axes(figure)
    style = styles([mixer])[0]
    training = _curve(axes, rows, "tokens", "loss", style._replace(linewidth=0.9, linestyle="-"))
    training.set_alpha(0.7)
    validation = _curve(axes, rows, "tokens", "eval_loss", style)
    axes.set(xlabel="tokens", ylabel=f"loss ({unit})")
    label_line_ends(axes, [(training, "training"), (validation, "validation")])
    FigureCanvasAgg(figure).print_png(path)


def comparison(runs: Sequence[tuple[str, str, Sequence[Row]]], path: str | os.PathLike) -> None:
    """Of runs (name, mixer, rows): training loss and validation bits per byte, against tokens and against seconds."""
    high = 2 * height(len(runs), 3.6)
    figure = Figure(figsize=(13, high), layout="constrained")
    panels = _axes(figure, 2, 2, sharex="col", sharey="row")
    labels = {"loss": "training loss (nats per token)", "eval_bits_per_byte": "validation bits per byte"}
    named = []
    for row, (metric, label) in zip(panels, labels.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, x in zip(row, ("tokens", "seconds"), strict=True):
            lines = [
                (_curve(axes, rows, x, metric, style), name)
                for (name, _, rows), style in zip(runs, styles([mixer for _, mixer, _ in runs]), strict=True)
            ]
        named.append((row[1], lines))
    panels[1][0].set_xlabel("tokens")
    panels[1][1].set_xlabel("seconds of training")
    for axes, lines in named:
        label_line_ends(axes, lines)
    FigureCanvasAgg(figure).print_png(path)


def charts(panels: Sequence[Chart], mixers: Mapping[str, str], path: str | os.PathLike) -> None:
    """Charts one under the other. Lines look as their runs' mixers do; where one run has all, dark to light."""
    high = sum(height(len(chart.lines), 4) for chart in panels)
    figure = Figure(figsize=(7, high), layout="constrained")
    shares = [height(len(chart.lines), 4) for chart in panels]
    looks = dict(zip(mixers, styles(list(mixers.values())), strict=True))
    named = []
    for axes, chart in zip(_axes(figure, len(panels), 1, height_ratios=shares).flat, panels, strict=True):
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(chart.lines)))
        lines = []
        for line, points, shade in zip(chart.lines, chart.finite(), shades, strict=True):
            look = Style(shade, "-") if len(mixers) == 1 else looks[line.run]
            look = look._replace(marker=look.marker or "o")
            x, y = zip(*points, strict=True) if points else ((), ())
            lines.append((axes.plot(x, y, **look._asdict(), markersize=4)[0], line.name))
        if chart.log_x:
            axes.set_xscale("log", base=2)
        elif all(float(x).is_integer() for points in chart.finite() for x, _ in points):  # layers, steps
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if chart.log_y:
            axes.set_yscale("log")
        if chart.marked:
            axes.axvline(chart.marked[0], color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
        named.append((axes, lines))
    for axes, lines in named:
        label_line_ends(axes, lines)
    FigureCanvasAgg(figure).print_png(path)


def side_by_side(rows: Sequence[dict], positions: Sequence[int], path: str | os.PathLike) -> None:
    """Of `benchmarks.zoo`: what is learnt against the speed of training, decoding against the tokens behind it."""
    figure = Figure(figsize=(14, height(len(rows), 5.5)), layout="constrained")
    quality, decoding = _axes(figure, 1, 2)
    looks = styles([row["family"] for row in rows])
    points, lines = [], []
    for row, style in zip(rows, looks, strict=True):
        at = row["train_tokens_per_second"], row["bits_per_byte"]
        quality.scatter(*at, color=style.color, s=60 if style == _ATTENTION else 25, zorder=2)
        points.append((*at, row["family"], style.color))
        speeds = [row["decode_tokens_per_second"][str(n)] for n in positions]
        (line,) = decoding.loglog(positions, speeds, **style._replace(marker="o")._asdict(), markersize=3)
        lines.append((line, row["family"]))
    quality.margins(0.08)
    quality.set(xlabel="training tokens/s", ylabel=f"validation bits per byte after {rows[0]['tokens']:,} tokens")
    decoding.set(xlabel="tokens behind", ylabel="decoded tokens/s, one sequence")
    label_line_ends(decoding, lines)
    label_points(quality, points)
    FigureCanvasAgg(figure).print_png(path)
