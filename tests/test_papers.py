"""Published set-ups: a step of many devices is the step of one, runs are kept under their set-up, initial weights."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import papers, record
from benchmarks.papers import __main__ as command
from benchmarks.papers import h3, kept, models, report, set_up, training
from zoo.config import OptimizerConfig
from zoo.data.synthetic import make

ROOT = pathlib.Path(__file__).parents[1]
SMALL = set_up.Setup(
    make("induction_heads", vocab_size=8, length=6),
    "attention",
    published="-",
    steps=8,
    batch_size=4,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    rows=16,
    d_model=16,
    d_ff=32,
    settings={"num_heads": 1},
)


@pytest.mark.slow
def test_seeds_side_by_side_and_rows_shared_out_over_devices_train_as_on_one():
    program = """
        import json
        import jax
        jax.config.update("jax_num_cpu_devices", 4)
        from benchmarks.papers import training
        from tests.test_papers import SMALL
        assert jax.device_count() == 4
        beside, another = training.run(SMALL, [0, 1])
        [shared] = training.run(SMALL, [0])
        jax.device_count = lambda: 1
        print("RUNS", json.dumps([*training.run(SMALL, [0]), *training.run(SMALL, [1]), beside, shared, another]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert process.returncode == 0, process.stderr
    alone, alone_another, beside, shared, another = json.loads(process.stdout.split("RUNS")[1])
    for actual, expected in ((beside, alone), (shared, alone), (another, alone_another)):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert actual["accuracy_6"] == expected["accuracy_6"]
    assert another["loss"] != pytest.approx(alone["loss"], rel=1e-3)


def test_a_run_is_kept_until_its_set_up_changes(monkeypatch, tmp_path):
    runs = []

    class Trainer:
        def __init__(self, setup):
            self.steps = setup.steps

        def train_and_test(self, asked):
            runs.append((self.steps, *((seed, rate) for seed, rate in asked)))
            return [{"accuracy_6": 50.0 + seed} for seed, _ in asked]

    monkeypatch.setattr(kept, "Trainer", Trainer)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    record.RESULTS.parent.mkdir()
    longer = dataclasses.replace(SMALL, steps=9)
    for setup, seeds, again, partial in (
        (SMALL, 1, False, False),
        (SMALL, 1, False, False),  # recalled
        (SMALL, 4, False, False),  # 3 more, on 2 devices
        (longer, 1, False, True),  # not kept
        (SMALL, 4, False, False),  # recalled
        (longer, 1, False, False),
        (longer, 1, True, False),
    ):
        [found] = kept.Runs("h3", again=again, partial=partial).of([setup], range(seeds))
        assert [run["accuracy_6"] for run in found] == [50.0 + seed for seed in range(seeds)]
    rate = SMALL.optimizer.learning_rate
    expected = [(8, 0), (8, 1, 2), (8, 3), (9, 0), (9, 0), (9, 0)]
    assert runs == [(steps, *((seed, rate) for seed in seeds)) for steps, *seeds in expected]
    assert kept.kept_runs("h3").keys() == {f"induction_heads attention {seed}" for seed in range(4)}
    [left] = kept.Runs("h3", recall_only=True).of([SMALL], range(5))  # `longer` took the place of one
    assert [run["accuracy_6"] for run in left] == [51.0, 52.0, 53.0]


def tuned(rate):
    optimizer = dataclasses.replace(SMALL.optimizer, learning_rate=rate)
    return dataclasses.replace(SMALL, optimizer=optimizer, is_tuned=True, rows=0)


@pytest.mark.slow
def test_learning_rates_are_arguments_of_one_program(monkeypatch):
    """Whatever stands beside it, a run is that of its own set-up."""
    setups = [tuned(1e-2), tuned(1e-3)]
    assert command.cells_of(setups) == [[setups]]
    trainer = training.Trainer(setups[0])
    runs = [training.Run(0, setup.optimizer.learning_rate) for setup in setups]
    together = [trainer.train_and_test([run])[0] for run in runs]
    assert len(trainer._programs) == 1
    alone = training.run(setups[1], [0])[0]
    assert together[1]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert together[0]["loss"] != pytest.approx(alone["loss"], rel=1e-3)
    assert alone.keys() == {"seconds", "ms_a_step", "loss", "validation_6", "accuracy_6"}


def test_validation_rows_of_the_first_seed_choose_the_learning_rate():
    setups = [tuned(1e-2), tuned(1e-3), tuned(1e-4)]
    figures = [[(50, 90)], [(60, 10), (30, 70), (40, 30)], []]  # validation, accuracy
    runs = [[{"validation_6": v, "accuracy_6": a, "seconds": 1.0} for v, a in of] for of in figures]
    cell = report.cell([*zip(setups, runs, strict=True)])
    assert cell.setup is setups[1] and cell.accuracies(6) == [10, 70, 30]
    task, mixer, size, length, rate, _, median, span, seeds, _ = cell.rows()[0]
    assert (rate, median, span, seeds) == ("0.001", "30.0", "10.0 - 70.0", "3")
    assert int(size.replace(",", "")) == 2 * 2 * (7 * 16 * 4 + 4)  # two layers: keys and values of 7 tokens, two counts
    assert report.cell([(setups[2], [])]) is None


def test_the_first_seed_tries_all_learning_rates_and_the_others_have_the_one_it_chose(monkeypatch):
    asked_for = []

    class Trainer:
        def __init__(self, setup): ...

        def train_and_test(self, asked):
            asked_for.extend(asked)
            return [{"validation_6": 90 - abs(rate - 1e-3), "accuracy_6": 50 + seed} for seed, rate in asked]

    monkeypatch.setattr(kept, "Trainer", Trainer)
    runs = kept.Runs("none", again=True, partial=True)
    cell = command.found_of([[tuned(1e-2), tuned(1e-3)], [tuned(1e-4)]], runs, 3, report)
    assert asked_for == [(0, 1e-2), (0, 1e-3), (0, 1e-4), (1, 1e-3), (2, 1e-3)]
    assert cell.setup.optimizer.learning_rate == 1e-3 and cell.accuracies(6) == [50, 51, 52]


@pytest.mark.parametrize("mixer", ["s4d", "h3"])
def test_h3s_set_ups_start_from_matrices_of_the_released_deviation(mixer):
    setup = next(setup for setup in h3.setups() if setup.mixer == mixer)
    found = nnx.to_flat_state(nnx.state(models.make_model(setup, seed=0), nnx.Param))
    deviations = {path[-2]: float(np.std(value[...])) for path, value in found if path[-1] == "kernel"}
    assert deviations.pop("down") == pytest.approx(0.01, rel=1e-3)
    assert len(deviations) >= 2 and list(deviations.values()) == pytest.approx([0.02] * len(deviations), rel=1e-3)


@pytest.mark.parametrize("mixer", ["attention", "s4d", "h3"])
def test_h3s_set_ups_have_gpt2s_norms_and_a_bias_in_every_projection(mixer):
    setup = next(setup for setup in h3.setups() if setup.mixer == mixer)
    plain, made = (models.make_model(dataclasses.replace(setup, as_gpt2=flag), seed=0) for flag in (False, True))
    before, after = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (plain, made))
    biases = after.keys() - before.keys()
    assert biases == {(*path[:-1], "bias") for path in before if path[-1] in ("kernel", "scale")}
    x = jax.random.normal(jax.random.key(0), (2, 3, setup.d_model))
    expected = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(made.norm(x), expected, atol=1e-5)
    rows = setup.task.rows(np.random.default_rng(0), 4)
    batch = jax.tree.map(jnp.asarray, rows.batch(answers_only=False))
    graphdef, params = nnx.split(made)
    gradient = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p).token_losses(**batch).sum()))(params)
    used = {path for path, value in nnx.to_flat_state(gradient) if path[-1] == "bias" and abs(value[...]).min() > 0}
    of_keys = {path for path in biases if mixer == "attention" and path[-2] == "k"}  # add the same to all scores of a q
    assert used | of_keys == biases


def test_h3s_set_ups_decay_all_but_A_B_and_dt():
    setup = next(setup for setup in h3.setups() if setup.mixer == "h3")
    params = nnx.state(models.make_model(setup, seed=0), nnx.Param)
    optimizer = models.optimizer_of(dataclasses.replace(setup, optimizer=OptimizerConfig(warmup_steps=0)), params)
    ones = jax.tree.map(jnp.ones_like, params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(ones), ones)
    moved = {path[-1]: float(abs(value[...]).max()) > 0 for path, value in nnx.to_flat_state(updates)}
    still = {name for name, moves in moved.items() if not moves}
    assert still == {"log_dt", "log_rate", "frequency", "b_real", "b_imag", "b"}
    assert all(moved[name] for name in ("D", "scale", "bias", "kernel", "c", "c_real"))


def cells(setups, accuracy):
    """Cells of one run a length, whose accuracy is a function of the set-up and the length."""
    for setup in setups:
        lengths = (setup.task.length, *setup.test_lengths)
        run = {f"accuracy_{length}": accuracy(setup, length) for length in lengths} | {"seconds": 1.0}
        yield report.cell([(setup, [run])])


def test_mqar_is_drawn_by_the_size_of_the_state_and_extrapolation_by_length():
    of_mqar = [s for s in papers.PAPERS["mqar"].setups() if s.mixer == "gla" and s.optimizer.learning_rate == 2e-3]
    found = [*cells(of_mqar[::-1], lambda setup, _: float(setup.d_model))]
    [chart] = report.charts("mqar", found)
    (gla,) = chart.lines  # two layers of 4 heads, each of K = d / 8 and V = d / 4, float32
    assert gla.points == [(4 * 2 * width**2 // 8, width) for width in (16, 32, 64)] and gla.name == "gla"
    table = report.by_task("mqar", found)
    assert table.rows == [["gla", "64.0", "32.0", "16.0", "37.3"]]
    of_lengths = [setup for setup in papers.PAPERS["extrapolation"].setups() if setup.mixer == "attention"]
    [chart] = report.charts("extrapolation", [*cells(of_lengths, lambda _, length: 1000 / length)])
    assert [line.name for line in chart.lines] == ["attention, no positions", "attention"]
    assert chart.lines[0].points == [(2**i, 1000 / 2**i) for i in range(6, 13)]


def set_ups(paper):
    """Reduced and full ones, by the name of the results that they are kept under."""
    forms = {paper: papers.PAPERS[paper].setups, f"{paper}_full": papers.PAPERS[paper].full}
    return {name: [*form()] for name, form in forms.items() if form}


@pytest.mark.parametrize("paper", papers.PAPERS)
def test_every_set_up_has_runs_of_its_own(paper):
    for name, setups in set_ups(paper).items():
        names = [setup.name for setup in setups]
        assert len(set(names)) == len(names), name


@pytest.mark.parametrize("paper", papers.PAPERS)
def test_kept_runs_are_of_the_set_ups(paper):
    """Or a command would train them again."""
    for kept_as, setups in set_ups(paper).items():
        descriptions = {setup.name: setup.description for setup in setups}
        for name, run in kept.kept_runs(kept_as).items():
            assert run["setup"] == descriptions[name.rsplit(" ", 1)[0]], name


@pytest.mark.slow
def test_every_set_up_is_a_model():
    """Of the new papers, at each width."""
    seen = set()
    for paper in ("mqar", "mad", "extrapolation"):
        for setup in papers.PAPERS[paper].setups():
            kind = setup.mixer, setup.d_model, str(setup.model)
            if kind not in seen:
                seen.add(kind)
                assert report.state_bytes(setup) > 0
