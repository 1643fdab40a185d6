"""A bidirectional model trained from text: resumed bit by bit, evaluated, and asked for what it cannot do."""

import shutil

import pytest

from zoo import evaluate, interop
from zoo.checkpoints import load_run
from zoo.data import validation_batches
from zoo.errors import UsageError
from zoo.evaluate.__main__ import main as evaluate_run
from zoo.generate.__main__ import main as generate
from zoo.training.loop import train


@pytest.mark.slow
def test_a_masked_run_resumes_bit_by_bit_and_is_measured_by_its_masks(make_config, tmp_path, losses, capsys):
    config = make_config(
        **{
            "model.mixer": "attention,gla", "model.direction": "bidirectional", "train.objective": "masked_tokens",
            "train.mask.span_length": 3, "train.steps": 8, "checkpoint.every": 4, "eval.every": 4,
        }
    )  # fmt: skip
    workdir = tmp_path / "run"
    summary, before = train(config, workdir), losses(workdir)
    assert summary["eval_bits_per_byte"] is summary["table_bits_per_byte"] is None
    shutil.rmtree(workdir / "checkpoints" / "8")
    again = train(config, workdir)
    assert losses(workdir) == before
    assert (again["eval_loss"], again["eval_accuracy"]) == (summary["eval_loss"], summary["eval_accuracy"])

    run, batches = load_run(workdir), validation_batches(config)
    measured = evaluate.perplexity(run.model, batches, batches.labels)
    assert measured["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert measured["accuracy"] == pytest.approx(summary["eval_accuracy"])

    evaluate_run([f"--workdir={workdir}", f"--cache_dir={config.data.cache_dir}"])
    out, error = capsys.readouterr()
    assert "accuracy" in out and error.count("asks for the next token, which a bidirectional model reads") == 3
    with pytest.raises(SystemExit):
        generate([f"--workdir={workdir}", "--prompt=def"])
    out, error = capsys.readouterr()
    assert "nothing to generate; train with model.direction=causal" in error
    with pytest.raises(UsageError, match="is a bidirectional model, and no family of other packages is one"):
        interop.export_run(str(workdir), str(tmp_path / "out"))
