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
def test_one_kill_and_one_damage(tmp_path):
    command = [sys.executable, "-m", "benchmarks.soak", "--mixers=gla", "--kills=1", "--damages=1", "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0 and "1 kills,   1 damages" in done.stdout, done.stdout + done.stderr
