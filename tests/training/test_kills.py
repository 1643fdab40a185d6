"""Real processes, stopped at random steps and started again, end as the run that was never stopped, bit by bit."""

import json
import pathlib
import random
import signal
import time

import pytest

from zoo import data, metrics

RECORDING = pathlib.Path(__file__).parent / "recording_train.py"
STEPS = 47  # of eight packs: the corpus has 380


@pytest.fixture
def config(make_config):
    """Nearly one epoch, with dropout, so that its randomness has to come back too."""
    settings = {"train.batch_size": 8, "train.context_length": 64, "checkpoint.every": 5, "model.dropout": 0.1,
                "optimizer.learning_rate": 1e-2, "train.steps": STEPS}  # fmt: skip
    return make_config(**settings)


@pytest.fixture
def run(start, config, tmp_path):
    def run(name, pause):
        return start(config, tmp_path / name, script=RECORDING, before=[tmp_path / f"{name}.batches", str(pause)])

    return run


def stop_at(process, workdir, step, number):
    """Send the signal once the run's rows have come to `step`; return what the process printed."""
    deadline = time.monotonic() + 300
    rows = workdir / "metrics.jsonl"
    while not (rows.exists() and f'"step": {step},' in rows.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=300)[0]


def to_the_end(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_a_kill_and_a_sigterm_change_nothing_and_repeat_or_skip_no_token(run, losses, config, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    to_the_end(run("whole", 0.0))

    kill, term = sorted(random.Random().sample(range(2, STEPS - 2), 2))  # `python -m benchmarks.soak` has more
    process = run("stopped", 0.03)
    output = stop_at(process, stopped, kill, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, (kill, output)

    # SIGTERM saves the step in progress and exits 0.
    process = run("stopped", 0.03)
    output = stop_at(process, stopped, term, signal.SIGTERM)
    assert process.returncode == 0, output
    saved_at = int(output.split("SIGTERM: saved at step ")[1].split(";")[0])
    assert saved_at >= term and (stopped / "checkpoints" / str(saved_at) / "DIGEST.json").exists()
    assert f"at step {saved_at}" in to_the_end(run("stopped", 0.0))

    # To the last bit: every loss, every gradient norm, the evaluation at the end.
    assert losses(stopped) == losses(whole), (kill, term)
    assert metrics.read(stopped)[-1]["eval_loss"] == metrics.read(whole)[-1]["eval_loss"]

    # What the surviving weights were trained on: of each step, the batch that the last process to take it took.
    lines = [json.loads(line) for line in (tmp_path / "stopped.batches").read_text().splitlines()]
    trained_on = dict(lines)
    assert sorted(trained_on) == list(range(STEPS))
    rows = [row for step in sorted(trained_on) for row in trained_on[step]]
    undisturbed = [json.loads(line)[1] for line in (tmp_path / "whole.batches").read_text().splitlines()]
    assert rows == [row for batch in undisturbed for row in batch]
    packs = data.training_dataset(config).tokens_per_epoch // config.train.context_length
    assert packs - config.train.batch_size < len(rows) <= packs  # an epoch, but for a rest smaller than a batch
    assert len(set(rows)) == len(rows)  # with no pack in it twice
