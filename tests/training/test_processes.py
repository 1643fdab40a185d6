"""Several processes that train one run, on one machine: real processes, each with fake devices of its own."""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from zoo import checkpoints, metrics

# What one of two cores does late, XLA takes for a deadlock after a while, and ends the process.
XLA = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
SETTINGS = {"model.num_layers": 1, "model.dropout": 0.1, "train.batch_size": 8, "train.steps": 8, "checkpoint.every": 4,
            "optimizer.learning_rate": 1e-3, "optimizer.eps": 1e-3, "optimizer.schedule": "constant",
            "eval.every": 0}  # fmt: skip


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def start_all(start):
    """start_all(config, workdir, [4, 4], flags): a process with so many devices each, together one run."""

    def run(config, workdir, devices, *flags, only=None, environments=None, **options):
        port, started = free_port(), []
        for i, count in enumerate(devices):
            place = [f"--coordinator=localhost:{port}", f"--num_processes={len(devices)}", f"--process_id={i}"]
            place = (place if len(devices) > 1 else []) + (only or {}).get(i, [])
            flag = f"--xla_force_host_platform_device_count={count}"
            environment = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {XLA} {flag}"}
            environment |= environments[i] if environments else {}
            started.append(start(config, workdir, *flags, *place, environment=environment, **options))
        return started

    return run


def wait_for_step(workdir, step, process):
    deadline, rows = time.monotonic() + 300, workdir / "metrics.jsonl"
    while not (rows.exists() and f'"step": {step},' in rows.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def ends(started, *codes):
    """What each printed; their exit codes are `codes`."""
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert tuple(process.returncode for process in started) == codes, "\n---\n".join(printed)
    return printed


def keep_checkpoints(workdir, last):
    """Of steps up to `last`: the run goes on from there."""
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > last:
            shutil.rmtree(path)


def close(found, wanted, steps):
    assert [found[step][0] for step in steps] == pytest.approx([wanted[step][0] for step in steps], rel=1e-5)


def test_two_processes_stop_together_and_one_goes_on(start_all, make_config, losses, tmp_path):
    config, workdir = make_config(**SETTINGS | {"train.steps": 1000}), tmp_path / "run"
    two = start_all(config, workdir, [2, 2], "--config.mesh.fsdp=2")
    wait_for_step(workdir, 5, two[0])
    two[1].send_signal(signal.SIGTERM)
    first, second = ends(two, 0, 0)
    stopped = int(re.search(r"SIGTERM of process 1: saved at step (\d+);", first)[1])
    assert "step" not in second and ", 2 processes" in first  # the console is of process 0
    together = losses(workdir)
    assert list(together) == list(range(1, stopped + 1))
    assert checkpoints.load_run(workdir).step == stopped  # as zoo.evaluate opens it, in one process

    keep_checkpoints(workdir, 4)
    more = f"--config.train.steps={max(stopped, 6)}"
    ends(start_all(config, workdir, [4], "--config.mesh.fsdp=2", more), 0)
    close(losses(workdir), together, range(1, stopped + 1))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_text_is_tokenized_once_wherever_it_is_kept(start_all, make_config, tmp_path, shared):
    """On shared storage by process 0; on storage of its own (here: another home) by each."""
    config = make_config(**SETTINGS | {"train.steps": 1, "data.cache_dir": ""})
    script, told = tmp_path / "telling_train.py", tmp_path / "told"
    script.write_text(TELLING)
    homes = [tmp_path / "home", tmp_path / ("home" if shared else "another")]
    places = [{"XDG_CACHE_HOME": str(home)} for home in homes]
    two = start_all(config, tmp_path / "run", [1, 1], script=script, before=[told], environments=places)
    ends(two, 0, 0)
    assert sorted(told.read_text().split()) == (["0"] if shared else ["0", "1"])


TELLING = """
import sys
from zoo import processes, train
from zoo.data import cache
told, write = sys.argv.pop(1), cache._write
def telling(*arguments):
    with open(told, "a") as file:
        file.write(f"{processes.index()}\\n")
    write(*arguments)
cache._write = telling
train.run()
"""


@pytest.mark.slow
def test_two_processes_start_from_the_weights_of_one_and_pass_over_a_damaged_checkpoint(
    start_all, make_config, losses, tmp_path
):
    config, other = make_config(**SETTINGS), tmp_path / "other"
    ends(start_all(config, other, [1]), 0)
    flags = ["--config.mesh.fsdp=2", f"--init_from={other}"]
    ends(start_all(config, tmp_path / "one", [2], *flags), 0)
    first, _ = ends(start_all(config, tmp_path / "two", [1, 1], *flags), 0, 0)
    assert f"init_from   {other}, step 8" in first
    close(losses(tmp_path / "two"), losses(tmp_path / "one"), range(1, 9))

    largest = max((tmp_path / "two" / "checkpoints" / "8").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    first, second = ends(start_all(config, tmp_path / "two", [1, 1], "--config.mesh.fsdp=2"), 0, 0)
    assert "8 is damaged" in first and "resumed     at step 4" in first and "damaged" not in second
    close(losses(tmp_path / "two"), losses(tmp_path / "one"), range(1, 9))


@pytest.mark.slow
def test_the_commands_of_the_page_for_a_workstation(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    page = (root / "docs" / "processes.md").read_text()
    block = re.search(r"## On a workstation\n\n```\n(.*?)```", page, re.DOTALL)[1]
    block = block.replace("7117", str(free_port())).replace("python train.py", f"{sys.executable} {root / 'train.py'}")
    assert block.count("--workdir=runs/two") == block.count("--process_id=") == 2
    block = block.replace("--workdir", "--config.train.steps=2 --config.eval.final_batches=1 --workdir")
    done = subprocess.run(
        ["bash", "-c", f"{block}wait"], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0 and "2 x cpu (cpu), 2 processes" in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=4 tensor=2", "sequence=8", "data=2 tensor=2 sequence=2"])
def test_killed_and_resumed_on_other_processes(start_all, make_config, losses, tmp_path, mesh):
    """One of two is killed, then both; one process with eight devices and four with two go on: the same losses."""
    config = make_config(**SETTINGS | {"train.steps": 12, "checkpoint.every": 2})
    flags = ["--heartbeat_timeout=6", *(f"--config.mesh.{size}" for size in mesh.split())]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ends(start_all(config, whole, [8], *flags), 0)

    two = start_all(config, killed, [4, 4], *flags)
    wait_for_step(killed, 3, two[0])
    two[1].kill()
    began = time.monotonic()
    survivor, _ = ends(two, 1, -signal.SIGKILL)
    assert time.monotonic() - began < 6 + 30
    assert survivor.splitlines()[-1].startswith("error: process 1 is gone, no sign of it for 6 s; repeat")
    assert "Traceback" not in survivor

    two = start_all(config, killed, [4, 4], *flags)
    wait_for_step(killed, 5, two[0])
    for process in two:
        process.kill()
    ends(two, -signal.SIGKILL, -signal.SIGKILL)

    one = start_all(config, killed, [8], *flags)
    wait_for_step(killed, 8, one[0])
    one[0].kill()
    ends(one, -signal.SIGKILL)

    last = ends(start_all(config, killed, [2, 2, 2, 2], *flags), 0, 0, 0, 0)[0]
    assert "resumed     at step" in last
    close(losses(killed), losses(whole), range(1, 13))
    found, wanted = (metrics.read(path)[-1]["eval_loss"] for path in (killed, whole))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_a_machine_of_process_0_that_stands_still_ends_the_others(start_all, make_config, tmp_path):
    config = make_config(**SETTINGS | {"train.steps": 100_000})
    two = start_all(config, tmp_path / "run", [1, 1], "--heartbeat_timeout=5")
    wait_for_step(tmp_path / "run", 3, two[0])
    (beside,) = pathlib.Path(f"/proc/{two[0].pid}/task/{two[0].pid}/children").read_text().split()
    two[0].send_signal(signal.SIGSTOP)
    os.kill(int(beside), signal.SIGSTOP)
    try:
        printed = two[1].communicate(timeout=60)[0]
        assert two[1].returncode == 1 and "Traceback" not in printed
        assert printed.splitlines()[-1].startswith("error: process 0's machine does not answer, for 5 s; repeat")
    finally:
        os.kill(int(beside), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_ends_the_other(start_all, make_config, tmp_path, victim):
    """Stopped, it gives no sign; `victim` 0 takes nothing with it, for the coordinator is a process of its own."""
    config = make_config(**SETTINGS | {"train.steps": 100_000})
    two = start_all(config, tmp_path / "run", [1, 1], "--heartbeat_timeout=5")
    wait_for_step(tmp_path / "run", 3, two[0])
    two[victim].send_signal(signal.SIGSTOP)
    other = two[1 - victim]
    printed = other.communicate(timeout=60)[0]
    assert other.returncode == 1
    assert printed.splitlines()[-1].startswith(f"error: process {victim} is gone, no sign of it for 5 s")


@pytest.mark.slow
def test_a_process_that_lives_but_does_no_step_ends_all(start_all, make_config, tmp_path):
    config, hangs = make_config(**SETTINGS | {"train.steps": 100_000}), tmp_path / "hangs"
    script = tmp_path / "hanging_train.py"
    script.write_text(HANGING)
    flags = ("--step_timeout=5", "--heartbeat_timeout=60")
    two = start_all(config, tmp_path / "run", [1, 1], *flags, script=script, before=[hangs])
    wait_for_step(tmp_path / "run", 3, two[0])
    hangs.write_text("1")
    for printed in ends(two, 1, 1):
        assert re.search(r"nothing was finished for 5 s: process 1 did not begin step \d+, which the", printed)


HANGING = """
import os, sys, time
from zoo import processes, train
from zoo.training.step import Programs
hangs, put = sys.argv.pop(1), Programs.put
def slow(self, batch, sequences=0):
    while os.path.exists(hangs) and processes.index() == 1:
        time.sleep(1)
    return put(self, batch, sequences)
Programs.put = slow
train.run()
"""


@pytest.mark.slow
def test_a_disk_that_one_process_loses_ends_all(start_all, make_config, tmp_path):
    config, workdir = make_config(**SETTINGS | {"train.steps": 100_000, "checkpoint.every": 3}), tmp_path / "run"
    two = start_all(config, workdir, [1, 1], "--config.mesh.fsdp=2")
    wait_for_step(workdir, 7, two[0])
    resource.prlimit(two[1].pid, resource.RLIMIT_FSIZE, (100, 100))  # no file of it may be larger: not even the shards
    first, second = ends(two, 1, 1)
    said = second.splitlines()[-1].replace("error:", "error: process 1:")  # TensorStore says more before it
    assert re.search("the checkpoint of step .* could not be written .*; the checkpoint of step .* is intact", said)
    assert said in first and "Traceback" not in first
    saved = checkpoints.complete_steps(workdir / "checkpoints")[-1]
    one = start_all(config, workdir, [1])
    wait_for_step(workdir, saved + 20, one[0])  # beyond the rows of before
    one[0].terminate()
    assert f"resumed     at step {saved}" in ends(one, 0)[0]


@pytest.mark.slow
def test_processes_that_disagree_are_refused_with_what_differs(start_all, make_config, tmp_path):
    config = make_config(**SETTINGS)
    two = start_all(config, tmp_path / "run", [1, 1], only={1: ["--config.optimizer.learning_rate=2e-3"]})
    first, second = ends(two, 2, 2)
    said = "the settings differ from those of process 0: optimizer.learning_rate: 0.001 there, 0.002 here"
    assert f"error: process 1: {said}" in first and f"error: {said}" in second

    script = tmp_path / "other_text.py"
    script.write_text(OTHER_TEXT)
    first, second = ends(start_all(config, tmp_path / "run", [1, 1], script=script), 2, 2)
    assert "error: process 1: the fingerprints differ from those of process 0: data: " in first
    assert "compiled" not in first

    two = start_all(config, tmp_path / "run", [1, 1], only={1: [f"--workdir={tmp_path / 'own'}"]})
    assert "--workdir: " in ends(two, 2, 2)[0]
    two = start_all(config, tmp_path / "run", [1, 1], "--config.data.source=gone.txt")
    assert "error: data.source: no file" in ends(two, 2, 2)[0]


OTHER_TEXT = """
import dataclasses
from zoo import data, processes, train
original = data.training_dataset
def other(*arguments):
    dataset = original(*arguments)
    return dataclasses.replace(dataset, fingerprint="another") if processes.index() else dataset
data.training_dataset = other
train.run()
"""
