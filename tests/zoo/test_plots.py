"""Figures: lines that can be told apart, labels that can be read."""

import itertools
import warnings

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from zoo import plots
from zoo.mixers import MIXERS


def overlaps(texts: list[Text]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [(a, b) for (a, box), (b, other) in itertools.combinations(boxes, 2) if box.overlaps(other)]


@pytest.mark.parametrize(
    "mixers",
    [
        list(MIXERS),
        [*MIXERS, *(f"gla,{family}" for family in MIXERS), *["mamba"] * 10],
        ["gla"] * 40,
        ["attention"] * 40,
        ["gla,gla,attention"] * 100,
    ],
    ids=["families", "patterns", "gla", "attention", "many"],
)
def test_no_two_lines_look_alike(mixers):
    styles = plots.styles(mixers)
    assert len({(s.color, s.linestyle, s.marker) for s in styles}) == len(mixers)
    if len(mixers) <= 40:
        assert not any(s.marker for s in styles)  # colours and dashes suffice
    assert sum(s.color == "black" for s in styles) == ("attention" in mixers)


def test_a_family_looks_the_same_in_every_figure_and_attention_stands_out():
    alone = {family: plots.styles([family])[0] for family in MIXERS}
    assert alone == plots.families()
    order = [*reversed(MIXERS), "mamba", "mamba,attention"]
    assert dict(zip(order, plots.styles(order)[: len(MIXERS)], strict=False)) == alone
    assert plots.styles(["gla,mlp"]) == [alone["gla"]]  # an MLP as a layer is no mixer
    assert alone["attention"].linewidth >= 2 * max(s.linewidth for f, s in alone.items() if f != "attention")


def test_labels_move_as_little_as_they_must():
    assert plots.spread(np.array([5.0, 1.0]), 1, 0, 10).tolist() == [5, 1]
    assert plots.spread(np.array([5.0, 5.0, 5.0]), 2, 0, 10).tolist() == [3, 5, 7]
    assert plots.spread(np.array([0.0, 0.0, 9.9]), 2, 0, 10).tolist() == [0, 2, 9.9]
    placed = plots.spread(np.random.default_rng(0).random(40) * 10, 1, 0, 100)
    assert np.diff(np.sort(placed)).min() > 1 - 1e-9


@pytest.mark.parametrize("number, inches, scale", [(2, 4, "linear"), (15, 5, "log"), (40, 6, "log"), (40, 3, "linear")])
def test_labels_at_line_ends_do_not_overlap(number, inches, scale):
    figure = Figure(figsize=(8, inches), layout="constrained")
    axes = figure.subplots()
    ends = np.random.default_rng(number).normal(100, 1, number)  # close to one another, next to one far away
    ends[0] = 1
    lines = [axes.plot([0, 1], [200, end])[0] for end in ends]
    axes.set_yscale(scale)
    texts = plots.label_line_ends(axes, [(line, f"family_{i}") for i, line in enumerate(lines)])
    figure.draw_without_rendering()
    assert len(texts) == number and overlaps(texts) == []
    assert all(figure.bbox.x1 >= text.get_window_extent().x1 for text in texts)  # none cut off
    assert max(text.get_window_extent().y1 for text in texts) <= axes.get_window_extent().y1 + 2


@pytest.mark.parametrize("number", [15, 40])
def test_labels_of_points_do_not_overlap(number):
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    at = np.random.default_rng(number).normal(size=(number, 2))
    axes.scatter(*at.T)
    axes.margins(0.08)
    texts = plots.label_points(axes, [(x, y, f"a_family_{i}", "black") for i, (x, y) in enumerate(at)])
    figure.draw_without_rendering()
    assert overlaps(texts) == []
    dots = axes.transData.transform(at)
    assert not any(text.get_window_extent().contains(*dot) for text in texts for dot in dots)


def rows(value: float, steps: int = 30) -> list[dict]:
    found = []
    for step in range(10, steps + 1, 10):
        common = {"step": step, "tokens": 100 * step, "seconds": step / 4}
        found.append(common | {"loss": value + 1 / step, "mfu": None})
        found.append(common | {"eval_loss": value, "eval_bits_per_byte": value, "eval_tokens": 7 if step < 30 else 9})
    return found


def test_names_of_any_kind_and_runs_without_rows_are_drawn(tmp_path):
    names = ["$\\frac{$", "_hidden", "a\x1b[31mred", "x" * 300, "\u6587\u5b57", "new"]
    runs = [(name, "gla", rows(1.0)) for name in names[:-1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.comparison([*runs, ("new", "gla", [])], tmp_path / "loss.png")
        plots.loss([], "gla", tmp_path / "empty.png")
        plots.loss(rows(float("nan")), "gla", tmp_path / "nan.png")
        plots.loss(rows(1.0), "gla,attention", tmp_path / "one.png")
    high, wide, _ = matplotlib.image.imread(tmp_path / "loss.png").shape
    assert high < 1000 and wide < 1500  # a long name does not blow it up


def test_evaluations_of_other_tokens_are_not_joined():
    axes = Figure().subplots()
    line = plots._curve(axes, rows(1.0), "tokens", "eval_loss", plots.styles(["gla"])[0])
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False]
