"""The soak's own parts, and the soak itself with one kill and one damage."""

import os
import random
import subprocess
import sys

import pytest

from benchmarks import soak


def test_it_sees_a_row_that_differs():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert soak.differences(rows, rows) == []
    (told,) = soak.differences([rows[0], {"step": 2, "loss": 1.0000001}], rows)
    assert told.startswith("2 rows, expected 2; row 1: ")
    assert soak.differences(rows[:1], rows)[0].startswith("1 rows, expected 2; row 1: []")


@pytest.mark.parametrize("kind", soak.DAMAGES)
def test_every_damage_is_one(tmp_path, kind):
    (tmp_path / "file").write_bytes(b"0123456789")
    before = soak.contents(tmp_path), sorted(tmp_path.iterdir())
    soak.DAMAGES[kind](tmp_path / "file", random.Random(0))
    assert (soak.contents(tmp_path), sorted(tmp_path.iterdir())) != before


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "damages"), [(1, 1), (2, 0)])
def test_one_kill_and_one_damage(tmp_path, processes, damages):
    command = [sys.executable, "-m", "benchmarks.soak", "--mixers=gla", "--kills=1", "--damages=1", "--no-record"]
    command += [f"--processes={processes}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0 and f"1 kills,   {damages} damages" in done.stdout, done.stdout + done.stderr
