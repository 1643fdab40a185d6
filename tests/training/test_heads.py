"""Heads of classes and values: what they compute, runs with them, and what is refused."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from zoo import checkpoints, compare, data, flops, heads, metrics
from zoo import config as zoo_config
from zoo.data import row_batches, rows
from zoo.errors import UsageError
from zoo.evaluate import __main__ as evaluate
from zoo.generate import __main__ as generate
from zoo.generate import forecast
from zoo.model import LanguageModel
from zoo.training import train


class Marked(rows.RowSource):
    """Tokens at random, and one of three marks among them: the label. Rows have half to all of the context's tokens."""

    head, name, fingerprint = "classes", "marked", "marked"
    num_classes, vocab_size, validation_rows = 3, 10, 10

    def __init__(self, length):
        self.length = length

    def train_batch(self, seed, step, batch_size):
        rng = np.random.default_rng([seed, step])
        tokens = rng.integers(3, 10, (batch_size, self.length))
        lengths = rng.integers(self.length // 2, self.length, batch_size)
        label = rng.integers(0, 3, batch_size)
        tokens[np.arange(batch_size), rng.integers(0, lengths)] = label
        tokens[np.arange(self.length) >= lengths[:, None]] = 0  # the padding is a mark, too
        return {name: x.astype(np.int32) for name, x in (("tokens", tokens), ("lengths", lengths), ("label", label))}

    def validation_batch(self, start, stop):
        return {name: x[start:stop] for name, x in self.train_batch(2**20, 0, self.validation_rows).items()}


class Waves(rows.RowSource):
    """Two sines of any phase."""

    head, name, fingerprint, channels, validation_rows = "values", "waves", "waves", 2, 10

    def __init__(self, length, horizon):
        self.length, self.horizon = length, horizon

    def train_batch(self, seed, step, batch_size):
        phase = np.random.default_rng([seed, step]).random((batch_size, 1, 2)) * 2 * np.pi
        steps = np.arange(self.length + self.horizon)[:, None]
        return {"values": np.sin(steps * np.array([0.4, 0.7]) + phase).astype(np.float32)}

    def validation_batch(self, start, stop):
        return {name: x[start:stop] for name, x in self.train_batch(2**20, 0, self.validation_rows).items()}


def make_waves(config, options):
    del options
    return Waves(config.train.context_length, config.model.horizon)


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    monkeypatch.setitem(rows.SOURCES, "marked", lambda config, _: Marked(config.train.context_length))
    monkeypatch.setitem(rows.SOURCES, "waves", make_waves)


def small(mixer, direction="causal", **settings):
    size = {"mixer": mixer, "direction": direction, "num_layers": 1, "d_model": 16, "d_ff": 8, "vocab_size": 10}
    return dataclasses.replace(zoo_config.ModelConfig(), **size | settings)


@pytest.fixture
def of_classes(make_config):
    def make(**settings):
        sizes = {"model.mixer": "linear_attention", "train.context_length": 16, "train.batch_size": 16}
        run = {"optimizer.schedule": "constant", "optimizer.learning_rate": 3e-2, "eval.batches": 0, "train.steps": 60}
        run |= {"checkpoint.every": 30, "eval.every": 0, "eval.batch_size": 4}
        of_source = {"model.head": "classes", "data.source": "marked"}
        return make_config(**sizes | run | of_source | settings)

    return make


def test_classes_are_learned_and_evaluated(of_classes, tmp_path, capsys):
    summary = train(of_classes(), tmp_path / "run")
    assert summary["eval_accuracy"] == 1.0 and summary["eval_loss"] < 0.3 and summary["eval_rows"] == 10
    assert "nats per row, accuracy 100.00%" in capsys.readouterr().out
    evaluate.main([f"--workdir={tmp_path / 'run'}"])
    found = json.loads((tmp_path / "run" / "evaluate.json").read_text())["tasks"]["classes"]
    assert found["loss"] == pytest.approx(summary["eval_loss"], rel=1e-4)
    labels = np.bincount(Marked(16).validation_batch(0, 10)["label"], minlength=3)
    assert found["confusion"] == np.diag(labels).tolist()
    assert [found["low"], found["high"]] == pytest.approx([0.7225, 1], abs=1e-4)  # Wilson's of 10 out of 10
    for flag, message in (
        ("--context_length=8", "validation rows; leave it out"),
        ("--tasks=recall", "head=tokens, and"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([f"--workdir={tmp_path / 'run'}", flag])
        assert message in capsys.readouterr().err


OF_VALUES = {"model.head": "values", "data.source": "waves", "model.horizon": 4, "model.patch": 2}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["classes", "values"])
def test_a_resumed_run_is_the_run_in_one_go(of_classes, tmp_path, head):
    """To the last bit of every parameter, with dropout and an evaluation on both sides."""
    settings = {"model.dropout": 0.1, "eval.every": 20} | (OF_VALUES if head == "values" else {})
    train(of_classes(**settings), tmp_path / "whole")
    for steps in (30, 60):
        train(of_classes(**settings, **{"train.steps": steps}), tmp_path / "parts")
    parts, whole = (metrics.read(tmp_path / name)[-1] for name in ("parts", "whole"))
    assert parts | {"seconds": 0} == whole | {"seconds": 0}
    of = {
        name: checkpoints.named_leaves(nnx.state(checkpoints.load_run(tmp_path / name).model, nnx.Param))
        for name in ("parts", "whole")
    }
    assert all(np.array_equal(x[...], of["parts"][name][...]) for name, x in of["whole"].items())


@pytest.mark.slow
@pytest.mark.parametrize("head, metric", [("classes", "eval_accuracy"), ("values", "eval_mae")])
def test_figures_are_exported_compared_and_taken_over_seeds(of_classes, tmp_path, capsys, head, metric):
    settings = {"train.steps": 20, "model.direction": "bidirectional", "metrics.tensorboard": True}
    settings |= OF_VALUES if head == "values" else {}
    workdirs = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    summaries = [train(of_classes(**settings, **{"train.seed": i}), w) for i, w in enumerate(workdirs)]
    rows = metrics.read(workdirs[0])
    assert rows[-1][metric] == pytest.approx(summaries[0][metric])
    events = b"".join(path.read_bytes() for path in workdirs[0].rglob("*tfevents*"))
    assert metric.encode() in events
    evaluate.main([f"--workdir={workdir}" for workdir in workdirs])
    found = json.loads((workdirs[0] / "evaluate-seeds.json").read_text())["tasks"][head]
    figure = {"classes": "accuracy", "values": "mean absolute error"}[head]
    assert found[figure]["values"] == pytest.approx([summary[metric] for summary in summaries], rel=1e-4)
    assert found[figure]["low"] <= found[figure]["mean"] <= found[figure]["high"]
    assert f"{head}, 2 seeds" in capsys.readouterr().out
    compare.main([*map(str, workdirs), f"--output={tmp_path / 'comparison'}"])
    records = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert [record[metric] for record in records] == pytest.approx([summary[metric] for summary in summaries])
    assert records[0]["eval_bits_per_byte"] is None and records[0]["state_bytes"] is None
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert "seed0" in page and f"<h2>{head}" in page
    assert metric.removeprefix("eval_") in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*(f"--workdir={workdir}" for workdir in workdirs), "--output=x.json"])
    assert "--output: it is of one run; give one --workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "pool, mixer, direction",
    [
        ("mean", "attention", "bidirectional"),
        ("last", "gla", "causal"),
        pytest.param("last", "attention", "bidirectional", marks=pytest.mark.slow),
        pytest.param("mean", "gla", "causal", marks=pytest.mark.slow),
    ],
)
def test_classes_read_a_rows_own_positions(pool, mixer, direction):
    model = LanguageModel(small(mixer, direction, head="classes", head_pool=pool, classes=3), rngs=nnx.Rngs(0))
    batch = Marked(8).train_batch(0, 0, 2)
    other = batch | {"tokens": np.where(np.arange(8) < batch["lengths"][:, None], batch["tokens"], 7)}
    predict = nnx.jit(lambda model, batch: model.predict(batch))
    found = predict(model, batch)
    np.testing.assert_array_equal(found, predict(model, other))
    hidden, _ = model.hidden(batch["tokens"][:1, : batch["lengths"][0]])
    read = hidden[0].mean(0) if pool == "mean" else hidden[0, -1]
    np.testing.assert_allclose(found[0], model.head.linear(read), rtol=1e-4, atol=1e-5)


def test_values_add_to_the_last_value_and_are_scored_by_their_errors():
    model = LanguageModel(small("gla", head="values", channels=2, patch=2, horizon=3), rngs=nnx.Rngs(0))
    batch = {"values": np.random.default_rng(0).random((2, 11, 2), np.float32), "weights": np.array([1, 0], np.float32)}
    change = np.asarray(model.predict(batch)) - batch["values"][:, 7:8]
    model.head.linear.kernel[...] *= 2
    np.testing.assert_allclose(model.predict(batch) - batch["values"][:, 7:8], 2 * change, rtol=1e-4, atol=1e-6)
    errors = np.asarray(model.predict(batch) - batch["values"][:, 8:])[0]
    found = model.head.figures({name: float(x) for name, x in model.batch_scores(batch).items()})
    assert found["eval_loss"] == pytest.approx((errors**2).mean(), rel=1e-5) and found["eval_rows"] == 1
    assert found["eval_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    np.testing.assert_allclose(model.batch_losses(batch), [found["eval_loss"], 0], rtol=1e-5)


def test_a_causal_model_reads_a_series_patch_by_patch():
    model = LanguageModel(small("gla", head="values", channels=2, patch=2, horizon=3), rngs=nnx.Rngs(0))
    batch = {"values": np.random.default_rng(0).random((2, 11, 2), np.float32)}
    read, state = nnx.jit(lambda model, x, state: model.hidden(x, state=state)), model.init_state(2, 4)
    for patch in np.moveaxis(np.asarray(model.head.inputs(batch)[0]), 1, 0):
        hidden, state = read(model, patch[:, None], state)
    np.testing.assert_allclose(model.head.predict(hidden, batch), model.predict(batch), rtol=1e-5, atol=1e-5)


def test_values_are_learned_beside_what_a_series_says_without_a_model(make_config, tmp_path, capsys):
    run = {"train.steps": 60, "train.context_length": 16, "eval.every": 0, "eval.batch_size": 4, "eval.batches": 0}
    sizes = {"model.mixer": "gla", "model.patch": 2, "model.horizon": 9, "data.season": 9, "train.batch_size": 16}
    source = {"model.head": "values", "data.source": "waves", "optimizer.learning_rate": 3e-2}
    summary = train(make_config(**run | sizes | source), tmp_path / "run")
    found = summary["corpus"]["baselines"]
    values = Waves(16, 9).validation_batch(0, 10)["values"]
    for name, predicted in (("last value", values[:, 15:16]), ("seasonal", values[:, 7:16])):
        assert found[name]["mse"] == pytest.approx(((predicted - values[:, 16:]) ** 2).mean(), rel=1e-5)
        assert np.mean(found[name]["mae_by_step"]) == pytest.approx(found[name]["mae"])
    assert found["linear regression"]["mse"] < 1e-6  # two sines are a linear recurrence
    assert 0 < summary["eval_mae"] and summary["eval_loss"] < 0.25 * found["last value"]["mse"]
    evaluate.main([f"--workdir={tmp_path / 'run'}"])
    measured = json.loads((tmp_path / "run" / "evaluate.json").read_text())["tasks"]["values"]
    assert measured["model"]["mse"] == pytest.approx(summary["eval_loss"], rel=1e-4)
    assert measured["model"]["mae"] == pytest.approx(summary["eval_mae"], rel=1e-4)
    assert measured["baselines"] == found and measured["truth"] == pytest.approx(values[0, :, 0], abs=1e-6)
    assert f"linear regression: {found['linear regression']['mse']:.4f}" in capsys.readouterr().out
    rolled_forward(tmp_path / "run", values, capsys)


def rolled_forward(workdir, values, capsys):
    """The run's series from its last window on, as `zoo.generate` writes it."""
    generate.main([f"--workdir={workdir}", "--horizon=20", "--window=-1"])
    header, *rows = csv.reader((workdir / "forecast.csv").read_text().splitlines())
    assert header == ["step", "channel 1", "channel 2", "channel 1 (truth)", "channel 2 (truth)"]
    model = checkpoints.load_run(workdir).model
    predicted = [[float(x) for x in row[1:3]] for row in rows]
    np.testing.assert_allclose(predicted, forecast(model, values[-1:, :16], 20)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([[float(x) for x in row[3:]] for row in rows[:9]], values[-1, 16:], rtol=1e-4, atol=1e-5)
    assert rows[9][3:] == ["", ""] and (workdir / "forecast.png").exists()
    assert "20 steps after window 9; mean squared error of 9 of them" in capsys.readouterr().err
    for flag, message in (
        ("--prompt=a", "--prompt: of runs with model.head=tokens, and this one has values; leave it out"),
        ("--window=10", "--window: got 10, expected 0 to 9, the windows that validate, or -10 to -1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            generate.main([f"--workdir={workdir}", flag])
        assert message in capsys.readouterr().err


def test_a_language_models_body_serves_under_a_head_of_classes(of_classes, tmp_path, capsys):
    rows_of_text = {"model.vocab_size": 320, "train.steps": 2, "model.mixer": "mlp"}
    language = of_classes(**rows_of_text, **{"model.head": "tokens", "data.source": "mqar?pairs=2&vocab_size=64"})
    train(language, tmp_path / "language")
    new = of_classes(**rows_of_text, **{"optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0})
    train(new, tmp_path / "new", init_from=str(tmp_path / "language"))
    output = capsys.readouterr()
    assert "mlp; made anew: head." in output.out and "model.classes" not in output.err
    of = {n: checkpoints.load_run(tmp_path / n).model for n in ("language", "new")}
    for name in ("embed", "units", "norm"):
        there, here = (checkpoints.named_leaves(nnx.state(getattr(model, name))) for model in of.values())
        assert there.keys() == here.keys() and all(np.array_equal(there[leaf], here[leaf]) for leaf in there)
    with pytest.raises(UsageError, match="--workdir=.*needs model.head=tokens, and the run has model.head=classes"):
        heads.require_tokens(new.model, f"--workdir={tmp_path / 'new'}")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model.head": "tokens"}, "model.head: got tokens, and marked has labelled rows or a series; set model.head="),
        ({"data.source": "waves"}, "model.head: got classes, and waves has a series; set model.head=values"),
        ({"data.source": "stdlib"}, "data.source: 'stdlib' is for model.head=tokens, and model.head=classes needs"),
        ({"model.classes": 4}, "model.classes: got 4, marked has 3; use 0, which takes what it has"),
        ({"model.vocab_size": 5}, "model.vocab_size: got 5, marked needs at least 10; 0 takes it"),
        ({"model.patch": 2}, "model.patch: got 2, of numbers, and marked has tokens; set it to 1"),
        ({"data.weights": "1"}, "data.weights: marked is one source with validation rows of its own; leave it empty"),
        (
            {"model.head": "values", "data.source": "waves", "data.season": 17},
            "data.season: 17 steps are more than the input's 16 .train.context_length.; use at most",
        ),
    ],
)
def test_a_head_and_a_source_that_do_not_fit_are_refused(of_classes, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        train(of_classes(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": np.array([0, 3])}, "marked: label: got 3 in row 1, expected 0 to 2"),
        ({"lengths": np.array([0, 8])}, "marked: lengths: got 0 in row 0, expected 1 to 8"),
        ({"tokens": np.full((2, 8), 10)}, "marked: tokens: got 10 in row 0, expected 0 to 9"),
        ({"tokens": np.zeros((2, 7))}, r"marked: tokens: got rows of shape \(7,\), expected rows of shape \(8,\)"),
        ({"label": None}, "marked: label: got none, expected rows of shape"),
    ],
)
def test_rows_that_are_not_what_their_source_says_are_refused(change, message):
    source = Marked(8)
    batch = source.train_batch(0, 0, 2)
    assert row_batches.checked(source, batch) is batch
    with pytest.raises(UsageError, match=f"data.source: {message}"):
        row_batches.checked(source, {name: x for name, x in (batch | change).items() if x is not None})


def test_a_series_with_a_number_that_is_none_is_refused_before_anything_is_compiled(make_config, monkeypatch):
    broken = Waves.train_batch
    monkeypatch.setattr(Waves, "train_batch", lambda *given: {"values": broken(*given)["values"] * np.nan})
    config = make_config(**{"model.head": "values", "data.source": "waves"})
    with pytest.raises(UsageError, match="data.source: waves: values: got nan in row 0, expected finite numbers"):
        data.check(config)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train.objective": "masked_tokens"}, "train.objective: model.head=classes predicts no tokens"),
        ({"model.patch": 3}, "train.context_length: 16 steps are no multiple of model.patch = 3; use 15"),
        ({"model.head": "tokens", "model.patch": 2}, "model.patch: got 2, of numbers, and model.head=tokens reads"),
        ({"model.head": "class"}, "model.head: got 'class', expected one of tokens, classes, values; did you mean"),
    ],
)
def test_settings_of_a_head_that_do_not_fit_are_refused(of_classes, settings, message):
    with pytest.raises(UsageError, match=message):
        of_classes(**settings)


@pytest.mark.parametrize("head, shape", [("classes", (2, 4)), ("values", (2, 5, 3))])
def test_a_bfloat16_body_has_a_float32_head(head, shape):
    numbers = {"channels": 3, "patch": 2, "horizon": 5} if head == "values" else {"classes": 4}
    config = small("gla", head=head, dtype="bfloat16", **numbers)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in heads.of(config).arrays(config, 2, 8).items()}
    found = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)).predict(batch))
    assert (found.shape, found.dtype) == (shape, np.float32)


@pytest.mark.parametrize("head", heads.HEADS)
def test_parameters_and_products_of_a_head_are_counted(head):
    numbers = {"channels": 3, "patch": 2, "horizon": 5} if head == "values" else {}
    model = small("gla", head=head, classes=4, tie_embeddings=False, **numbers)
    made = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
    parameters = checkpoints.named_leaves(nnx.state(made, nnx.Param))
    assert flops.num_parameters(model) == sum(x.size for x in parameters.values())
    assert zoo_config.HEAD_CHOICES.keys() == heads.HEADS.keys()
    without = dataclasses.replace(model, mixer="mlp", num_layers=1)
    products = {"tokens": 2 * 16 * 10, "classes": 2 * 16 * 4 / 8, "values": 2 * 16 * 5 * 3 / 8 + 2 * 16 * 3}[head]
    body = 2 * 3 * 16 * 8 / (2 if numbers else 1)
    assert flops.forward_flops_per_token(without, 8) == pytest.approx(body + products)
