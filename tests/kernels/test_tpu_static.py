"""The static cost of the TPU kernels is what is stored (`python -m benchmarks.tpu_static --check` does all shapes)."""

import copy
import json

import pytest

from benchmarks import tpu_static
from tests.kernels.tpu import devices


@pytest.mark.parametrize("shape", ["square", pytest.param("square_per_key", marks=pytest.mark.slow)])
def test_no_kernel_takes_a_tenth_more_cycles_than_stored(shape):
    devices("v5e")
    stored = json.loads(tpu_static.RESULTS.read_text())["results"]
    job = tpu_static.Job("v5e", shape)
    assert not tpu_static.check(stored, [job])


def test_the_check_tells_a_slower_kernel(monkeypatch):
    stored = json.loads(tpu_static.RESULTS.read_text())["results"]
    slower = copy.deepcopy(stored["square v5e"])
    slower["backward"]["cycles"] *= 1.2
    monkeypatch.setattr(tpu_static, "measure", lambda job: slower)
    (problem,) = tpu_static.check(stored, [tpu_static.Job("v5e", "square")])
    assert "backward" in problem and "1.20 of the stored" in problem
