"""Runs from start to end, resumed, refused and failed, in this process."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import checkpoints, compare, data, files, metrics
from zoo.checkpoints import digest
from zoo.errors import RunError, UsageError
from zoo.training import loop, train
from zoo.training.signals import StopSignal

STEPS = 10


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def config(make_config):
    return make_config(**{"train.steps": STEPS, "model.mixer": "mlp", "metrics.tensorboard": True, "eval.every": 5})


@pytest.fixture
def run(finished, config, tmp_path):
    """A copy of a finished run of ten steps, with checkpoints of steps 5 and 10."""
    if not finished.exists():
        train(config, finished, profile_steps=2)
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_leaves_what_is_promised(run, config, losses):
    names = {path.name for path in run.iterdir()}
    assert {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "loss.png",
        "summary.json",
        "tensorboard",
        "profile",
    } <= names
    found = losses(run)
    assert list(found) == list(range(1, STEPS + 1)) and found[STEPS][0] < found[1][0]
    rows = metrics.read(run)
    tokens_per_step = config.train.batch_size * config.train.context_length
    assert [row["tokens"] for row in rows if "loss" in row] == [n * tokens_per_step for n in found]
    assert all(row["tokens_per_second"] > 0 and row["mfu"] is None for row in rows if "loss" in row)  # a CPU
    assert np.all(np.diff([row["seconds"] for row in rows]) >= 0)
    summary = json.loads((run / "summary.json").read_text())
    *_, earlier, evaluation = (row for row in rows if "eval_loss" in row)
    assert earlier["eval_tokens"] == 2 * tokens_per_step  # eval.batches
    assert evaluation["eval_tokens"] == summary["eval_tokens"] == data.validation_batches(config).num_tokens
    assert evaluation["step"] == STEPS and evaluation == rows[-1]
    assert summary["table_bytes"] > 0.9 * STEPS * tokens_per_step and 0 < summary["table_bits_per_byte"] < 8
    assert summary["eval_bits_per_byte"] == evaluation["eval_bits_per_byte"] > 0
    assert summary["gzip_bits_per_byte"] > 0 and summary["tokens"] == STEPS * tokens_per_step
    assert any((run / "profile").rglob("*.xplane.pb"))
    assert any((run / "tensorboard").iterdir()) and (run / "loss.png").stat().st_size > 1000


def test_evaluation_is_the_mean_over_the_validation_tokens(run, config):
    reopened = checkpoints.load_run(run)
    nats = tokens = text_bytes = 0.0
    for rows in data.validation_batches(reopened.config):
        batch = jax.tree.map(jnp.asarray, rows)
        losses = reopened.model.token_losses(
            batch["tokens"], batch["targets"], batch["weights"], segment_ids=batch["segment_ids"]
        )
        nats, tokens, text_bytes = (
            nats + losses.sum(),
            tokens + batch["weights"].sum(),
            text_bytes + batch["bytes"].sum(),
        )
    row = metrics.read(run)[-1]
    assert row["eval_loss"] == pytest.approx(float(nats / tokens), rel=1e-5)
    assert row["eval_bits_per_byte"] == pytest.approx(float(nats / text_bytes) / np.log(2), rel=1e-5)


def test_a_run_that_still_trains_can_be_compared(config, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.training.loop._Loop.run", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    (found,) = compare.read_runs([str(tmp_path / "run")])
    assert found.corpus == data.corpus_info(config)["fingerprint"] and not found.finished


def test_a_finished_run_started_again_does_nothing(run, config):
    rows = metrics.read(run)
    train(config, run)
    assert metrics.read(run) == rows


def test_a_longer_run_continues_the_finished_one(run, config):
    config.train.steps, config.eval.every, config.checkpoint.keep_last = 12, 4, 1
    first = metrics.read(run)
    assert train(config, run)["step"] == 12
    rows = metrics.read(run)
    assert rows[: len(first)] == first and rows[len(first)]["step"] == 11
    assert rows[-1]["seconds"] > first[-1]["seconds"]
    assert checkpoints.read_config(run).train.steps == 12


def test_damage_to_the_newest_checkpoint_costs_steps_but_changes_nothing(run, config, losses, capsys):
    before = losses(run)
    array = max((run / "checkpoints" / "10").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    train(config, run)
    captured = capsys.readouterr()
    assert "10 is damaged" in captured.err and "at step 5" in captured.out
    assert losses(run) == before
    assert checkpoints.load_run(run).step == STEPS


def test_rows_are_means_since_the_row_before_also_over_a_resume(make_config, tmp_path, config):
    """Rows come at steps 4, 8, 10; the checkpoint of step 5 is between two of them."""
    config.train.log_every = 4
    train(config, tmp_path / "run")
    rows = {row["step"]: row["loss"] for row in metrics.read(tmp_path / "run") if "loss" in row}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    train(config, tmp_path / "run")
    assert {row["step"]: row["loss"] for row in metrics.read(tmp_path / "run") if "loss" in row} == rows
    assert list(rows) == [4, 8, 10]


@pytest.mark.parametrize("bad", ["loss", "parameters"])
def test_a_state_that_is_not_finite_stops_the_run_and_is_never_saved(make_config, tmp_path, config, monkeypatch, bad):
    config.checkpoint.every = 1
    original = loop.build

    def poisoned(*args):
        programs = original(*args)

        class Train:  # the sixth step goes wrong
            def lower(self, *shapes):
                compiled = programs.train.lower(*shapes)

                class Compiled:
                    def compile(self):
                        step = compiled.compile()

                        def run(state, batch):
                            sixth = int(jax.device_get(state.step)) == 5
                            state, values = step(state, batch)
                            if sixth and bad == "loss":
                                values["loss"] = jax.device_put(np.float32("nan"))
                            if sixth and bad == "parameters":
                                values["parameter_norm"] = jax.device_put(np.float32("inf"))
                            return state, values

                        return run

                return Compiled()

        return programs._replace(train=Train())

    monkeypatch.setattr(loop, "build", poisoned)
    with pytest.raises(RunError, match=r"at step 6; the checkpoint of step 5 is kept.*learning_rate"):
        train(config, tmp_path / "run")
    assert checkpoints.complete_steps(tmp_path / "run" / "checkpoints") == [4, 5]
    assert max(row["step"] for row in metrics.read(tmp_path / "run")) == 5


def test_a_config_that_differs_is_refused_by_field(run, config):
    config.model.d_model, config.train.seed = 32, 1
    with pytest.raises(UsageError, match=r"another config: model.d_model: 16 -> 32; train.seed: 0 -> 1"):
        train(config, run)


def test_the_checkpoint_says_what_was_trained_also_without_config_json(run, config, monkeypatch):
    config.model.d_model = 32
    (run / "config.json").write_bytes(b"\xff{")
    monkeypatch.setattr(loop, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(UsageError, match="another config: model.d_model: 16 -> 32"):
        train(config, run)


def test_other_text_than_the_run_had_is_refused(run, config, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(os.path.dirname(config.data.source), folder)
    (folder / "00.txt").write_text("another text " * 100)
    saved = json.loads((run / "config.json").read_text())
    config.data.source = saved["data"]["source"] = f"{folder}/*.txt"
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="the text is not the one"):
        train(config, run)


def test_two_processes_do_not_train_in_one_folder(run, config):
    import fcntl

    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process trains there"):
            train(config, run)


def test_a_vocabulary_smaller_than_a_token_is_refused(make_config, tmp_path):
    with pytest.raises(UsageError, match="model.vocab_size: 100 is smaller"):
        train(make_config(**{"model.vocab_size": 100}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_load_run_finds_the_step_asked_for(run):
    newest, older = checkpoints.load_run(run), checkpoints.load_run(run, step=5)
    assert (newest.step, older.step) == (10, 5)
    assert not np.array_equal(newest.model.embed.embedding[...], older.model.embed.embedding[...])
    assert newest.model.tokenizer_size == newest.tokenizer.vocab_size == 257 < newest.model.vocab_size == 320
    with pytest.raises(UsageError, match="no checkpoint of step 7; it has steps 5, 10"):
        checkpoints.load_run(run, step=7)
    with pytest.raises(UsageError, match="is no run"):
        checkpoints.load_run(run / "nowhere")


def test_load_run_passes_over_damage_and_touches_nothing(run, capsys):
    os.truncate(run / "checkpoints" / "10" / "DIGEST.json", 10)
    assert checkpoints.load_run(run).step == 5
    assert "10 is damaged" in capsys.readouterr().err
    assert (run / "checkpoints" / "10").exists()
    with pytest.raises(UsageError, match="no undamaged checkpoint of step 10"):
        checkpoints.load_run(run, step=10)


def test_init_from_starts_anew_with_the_weights_of_another_run(run, config, tmp_path, losses, capsys):
    new = copy.deepcopy(config)
    new.train.seed, new.model.positions = 3, "none"
    train(new, tmp_path / "new", init_from=str(run))
    output = capsys.readouterr()
    loss = checkpoints.evaluation_loss(run, 10)  # of eval.batches, as of all checkpoints
    assert f"init_from   {run}, step 10, validation loss {loss:.4f}, mlp" in output.out
    assert "which shapes do not show: model.positions: rope -> none (there -> here)" in output.err
    model = checkpoints.load_run(run).model
    batch = jax.tree.map(jnp.asarray, next(data.training_dataset(new).iterator(0)))
    nats = model.token_losses(batch["tokens"], batch["targets"], batch["weights"], segment_ids=batch["segment_ids"])
    found = losses(tmp_path / "new")
    assert list(found) == list(range(1, STEPS + 1))
    assert found[1][0] == pytest.approx(float(nats.mean()), rel=1e-5)
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["init_from"] == str(run)


def test_init_from_refuses_what_does_not_fit(run, config, tmp_path):
    with pytest.raises(UsageError, match="is no run"):
        train(config, tmp_path / "new", init_from=str(tmp_path / "nowhere"))
    config.model.d_model = 32
    with pytest.raises(UsageError, match=r"--init_from=.* another architecture: model.d_model: 16 there, 32 here"):
        train(config, tmp_path / "other", init_from=str(run))


def test_a_disk_that_fills_costs_nothing_but_time(run, finished, config, tmp_path, losses, monkeypatch):
    """The row of step 7 and those after it find no room; the checkpoint does."""
    original = metrics.Writer._append

    def append(self, line):
        if b'"step": 7,' in line or self.unwritten[1:]:
            raise files.WriteError("metrics.jsonl", OSError(errno.ENOSPC, "No space left on device"))
        original(self, line)

    config.eval.every = 4
    monkeypatch.setattr(metrics.Writer, "_append", append)
    message = r"^metrics.jsonl cannot be written \(No space left on device\); the state of step 8 is saved. Mend that"
    with pytest.raises(RunError, match=message):
        train(config, tmp_path / "full")
    assert metrics.read(tmp_path / "full")[-1]["step"] == 6
    monkeypatch.undo()
    train(config, tmp_path / "full")
    assert losses(tmp_path / "full") == losses(finished)


def test_a_validation_loss_that_is_not_finite_is_never_saved(config, tmp_path, monkeypatch):
    config.eval.every = 10
    original = loop.build
    poisoned = lambda *_: {"nats": np.float32("nan"), "tokens": np.float32(1), "bytes": np.float32(1)}  # noqa: E731
    monkeypatch.setattr(loop, "build", lambda *args: original(*args)._replace(evaluate=poisoned))
    with pytest.raises(
        RunError, match="validation loss = nan at step 10; the checkpoint of step 5 is kept. Go on .*lower"
    ):
        train(config, tmp_path / "run")
    assert checkpoints.complete_steps(tmp_path / "run" / "checkpoints") == [5]
    assert not any("eval_loss" in row for row in metrics.read(tmp_path / "run"))


def test_another_learning_rate_continues_and_is_noted(run, config, capsys):
    before = metrics.read(run)
    config.train.steps, config.optimizer.learning_rate, config.optimizer.schedule = 12, 1e-3, "constant"
    with pytest.raises(UsageError, match="--override=optimizer.learning_rate,optimizer.schedule"):
        train(config, run)
    names = ["optimizer.learning_rate", "optimizer.schedule"]
    train(config, run, override=names)
    rows = metrics.read(run)
    assert rows[: len(before)] == before
    assert [row["learning_rate"] for row in rows[len(before) :] if "loss" in row] == [pytest.approx(1e-3)] * 2
    (noted,) = [json.loads(line) for line in (run / "overrides.jsonl").read_text().splitlines()]
    assert noted == {
        "step": 10, "train.steps": [10, 12], "optimizer.learning_rate": [3e-3, 1e-3],
        "optimizer.schedule": ["cosine", "constant"],
    }  # fmt: skip
    assert (
        "changed     at step 10: train.steps: 10 -> 12; optimizer.learning_rate: 0.003 -> 0.001"
        in capsys.readouterr().out
    )
    train(config, run)  # trained with it by now: nothing to name
    assert len((run / "overrides.jsonl").read_text().splitlines()) == 1


def test_a_running_run_needs_its_text_no_more(finished, run, config, tmp_path, losses, monkeypatch):
    folder, original = tmp_path / "corpus", loop._Loop.compile
    shutil.copytree(os.path.dirname(config.data.source), folder, ignore=shutil.ignore_patterns("cache"))
    config.data.source, config.data.cache_dir, config.eval.every = f"{folder}/*.txt", str(tmp_path / "cache"), 5

    def compile(self):
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "cache")
        original(self)

    monkeypatch.setattr(loop._Loop, "compile", compile)
    assert train(config, tmp_path / "new")["step"] == STEPS
    assert losses(tmp_path / "new") == losses(finished)
    assert metrics.read(tmp_path / "new")[-1]["eval_loss"] == metrics.read(finished)[-1]["eval_loss"]


def test_a_checkpoint_deleted_while_it_is_read_is_no_loss(run, monkeypatch, capsys):
    checkpoint, original = run / "checkpoints" / "10", digest.verify

    def verify(path, *limit, **only):
        if path == checkpoint:  # the run saves step 12, and deletes this one
            checkpoint.rename(checkpoint.with_name("12"))
        original(path, *limit, **only)

    monkeypatch.setattr(digest, "verify", verify)
    assert checkpoints.load_run(run).step == 12
    (run / "checkpoints" / "12").rename(checkpoint)
    with pytest.raises(UsageError, match="no checkpoint of step 10; it has steps 5, 12"):
        checkpoints.load_run(run, step=10)
    assert capsys.readouterr().err == ""


def test_a_run_that_failed_does_not_wait_for_its_threads():
    code = (
        "import threading, time\nfrom zoo.errors import RunError, exit_with_message\n"
        "threading.Thread(target=time.sleep, args=[60]).start()\n"
        "with exit_with_message(at_once=True): raise RunError('no room')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (1, "error: no room\n")


def test_a_closed_terminal_asks_to_stop_unless_that_is_ignored(monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_first_interrupt_asks_and_the_second_insists():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with StopSignal() as stop:
        assert stop.name is None
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
