"""`python -m benchmarks.papers encoders`: set-ups of equal size, a cell end to end, and what is said of the figures."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from benchmarks import record
from benchmarks.papers import encoder_report, encoders, models, source_rows, training
from benchmarks.papers.row_task import RowTask
from zoo import flops
from zoo.config import validate_model
from zoo.data import baselines


def set_ups(*labels):
    return [setup for setup in encoders.setups() if setup.label in labels]


def small(setup):
    return dataclasses.replace(setup, steps=2, d_model=16, rows=min(setup.rows, 64))


def test_families_are_models_of_equal_size():
    """Of the tasks that need no package: a linear map of a step, 12 d_model^2 a layer, and a head."""
    found = set_ups("listops 64", "listops 128", "lorenz 24", "lorenz 48")
    assert len(found) == 2 * 10 + 2 * 12
    for setup in found:
        config = models.model_config(setup)
        validate_model(config)
        of_layers = flops.num_parameters(config) - 64 * (
            setup.task.length + (16 + 10 if config.head == "classes" else 12 + 3 * setup.task.horizon)
        )
        assert of_layers == pytest.approx(24 * 64**2, rel=0.04), setup.name


def test_every_task_stands_at_two_lengths():
    labels = list(dict.fromkeys(setup.label for setup in encoders.setups()))
    expected = "listops 64, listops 128, digits 64, digits 16, mnist1d 40, mnist1d 20, GunPoint 150, GunPoint 30"
    assert labels == f"{expected}, lorenz 24, lorenz 48, vic_elec 12, vic_elec 42".split(", ")


def test_a_pass_has_every_row_once_and_seeds_have_other_orders():
    setup = dataclasses.replace(set_ups("listops 64")[0], rows=12, batch_size=4)
    rows = source_rows.SourceRows(setup)
    stack = next(rows.stacks(0, 6))  # two passes
    assert stack["tokens"].shape == (6, 4, 64) and stack["weights"].shape == (6, 4)
    first, second = np.split(stack["tokens"].reshape(24, 64), 2)
    assert {*map(bytes, first)} == {*map(bytes, second)} and len({*map(bytes, first)}) == 12
    assert not np.array_equal(first, second)
    assert not np.array_equal(stack["tokens"], next(rows.stacks(1, 6))["tokens"])


def test_a_task_whose_package_is_not_there_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    task = RowTask("ucr?name=GunPoint", "classes", 149)  # another length: sources are kept
    assert "ucr needs the package aeon: pip install 'sequence-zoo[ucr]'" in task.missing
    assert RowTask("listops", "classes", 64).missing == ""


@pytest.mark.slow
@pytest.mark.parametrize("label, mixer", [("lorenz 24", "conv_linear"), ("listops 64", "gla")])
def test_a_cell_is_trained_tested_and_shown(label, mixer, monkeypatch, tmp_path):
    (setup,) = (small(setup) for setup in set_ups(label) if setup.mixer == mixer)
    [run] = training.run(setup, [0])
    cell = encoder_report.cell([(setup, [run])])
    [row] = cell.rows()
    assert row[:2] == [label, mixer] and row[2] == f"{flops.num_parameters(models.model_config(setup)):,}"
    if label.startswith("lorenz"):
        expected = baselines.measure(setup.task.rows())
        assert run["baselines"].keys() == {"linear regression", "last value"}
        assert run["baselines"]["last value"]["mse_at"]["24"] == expected["last value"]["mse_by_step"][23]
        assert np.mean([run["mse_at"]["1"], run["mse_at"]["24"]]) > 0 and 0 < run["mae"] < 5
    else:
        assert 0 <= run["accuracy"] <= 100
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    written = encoder_report.write("encoders", [cell])
    assert mixer in written[0].read_text() and (len(written) == 2) == label.startswith("lorenz")


def cell(task, mixer, figures):
    """Of runs with these figures; a series' linear regression errs by 0.5."""
    setup = next(setup for setup in set_ups(task) if setup.mixer == mixer)
    runs = [{"parameters": 1000, "ms_a_step": None, "seconds": 1.0} for _ in figures]
    for run, figure in zip(runs, figures, strict=True):
        errors = {"mse": figure, "mae": figure, "mse_at": {"1": figure, "24": 2 * figure}}
        base = {"linear regression": {"mse": 0.5, "mae": 0.6, "mse_at": {"1": 0.1, "24": 0.9}}}
        run |= errors | {"baselines": base} if setup.task.head == "values" else {"accuracy": figure}
    return encoder_report.cell([(setup, runs)])


def test_what_the_figures_say():
    cells = [
        cell("digits 64", "gla", [94.0, 95.0, 97.0]), cell("digits 64", "rala", [94.9]),
        cell("lorenz 24", "gla", [0.4, 0.6]), cell("lorenz 24", "linear_attention", [0.3, 0.35]),
        cell("lorenz 24", "conv_linear", [0.1, 0.2]), cell("lorenz 24", "convolutions", [0.18, 0.6]),
        cell("vic_elec 42", "mamba", [0.7]),
    ]  # fmt: skip
    digits, lorenz, parts, electricity = encoder_report.conclusions(cells)
    assert digits == "digits 64: a median of 95 % (ours) or more: gla (1) of 2 families"
    assert "horizon 24: squared errors below the linear regression's 0.5000, of every seed: linear_att" in lorenz
    assert "linear_attention, conv_linear (2); above it: none; on both sides: gla, convolutions (2)" in lorenz
    assert parts == (
        "lorenz 24: conv_linear errs less than (every seed) linear_attention and less than (seeds overlap) "
        "convolutions; parameters: 1,000, 1,000, 1,000"
    )
    assert "horizon 48" in electricity and "of every seed: none; above it: mamba (1)" in electricity
    [row] = cells[2].rows()
    assert row[3:7] == ["-", "-", "0.5000", "0.4000 - 0.6000"]
