"""benchmarks/train.py, on a CPU at a tiny model."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ("model.num_layers=2", "model.d_model=16", "train.batch_size=2", "train.context_length=16")
PROGRAM = """
import pathlib, sys
from absl import app
from benchmarks import measure, record, train
record.RESULTS = pathlib.Path(sys.argv.pop(1)) / "benchmarks" / "results"
interleaved = measure.interleaved
def spy(functions, **options):
    print("in turn:", *functions)
    return interleaved(functions, **options)
measure.interleaved = spy
if sys.argv[1] == "accelerator":
    train._on_cpu = lambda mesh: False
    sys.argv.pop(1)
app.run(train.main, flags_parser=train._parse)
"""


def run(tmp_path, *arguments):
    (tmp_path / "benchmarks").mkdir()
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_overrides_apply_and_each_row_has_its_costs(tmp_path):
    overrides = [f"--config.{setting}" for setting in (*SMALL, "model.remat=minimal", "model.vocab_size=64")]
    options = ["--steps=2", "--mixers=gla,attention", "--optimizer=adamw"]
    done = run(tmp_path, *overrides, *options)
    assert done.returncode == 0, done.stderr
    assert "configs/gla.py:tiny: 2 x 16 tokens a step, float32, adamw, remat minimal" in done.stdout
    assert "in turn: gla attention matmul\n" in done.stdout  # CPUs are noisy
    measured = json.loads((tmp_path / "benchmarks" / "results" / "train_adamw.cpu.json").read_text())
    assert measured["overrides"]["train.batch_size"] == 2
    assert [row["mixer"] for row in measured["rows"]] == ["gla", "attention"]
    for row in measured["rows"]:
        assert row["parameters"] < 64 * 16 + 2 * (12 * 16 * 16 + 1000)
        assert row["step_bytes"] > 3 * 4 * row["parameters"]  # parameters, Adam's moments, and more
        assert row["compile_seconds"] > 0 and row["mfu"] is None and row["tokens_per_second"] > 0


def test_accelerators_time_one_mixer_after_another_and_keep_each_size(tmp_path):
    overrides = [f"--config.{setting}" for setting in SMALL]
    options = ["--steps=2", "--mixers=retnet,attention", "--optimizer=adamw", "--compile_threads=2", "--profile"]
    done = run(tmp_path, "accelerator", "--config=configs/retnet.py:tiny", *overrides, *options)
    assert done.returncode == 0, done.stderr
    assert "in turn: retnet matmul\n" in done.stdout and "in turn: attention matmul\n" in done.stdout
    assert "attention: the profiler saw no device" in done.stdout
    measured = json.loads((tmp_path / "benchmarks" / "results" / "train_adamw_retnet_tiny.cpu.json").read_text())
    assert [row["mfu"] for row in measured["rows"]] == [None, None]  # of a CPU no peak is known, whatever it plays


def test_an_unknown_setting_or_a_bad_value_is_said_in_one_line(tmp_path):
    done = run(tmp_path, "--config.train.batchsize=2")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown config field 'train.batchsize'")
