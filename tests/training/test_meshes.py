"""A step on a mesh is the step on one device: losses and parameters after ten steps, for every family and mesh."""

import json
import os
import subprocess
import sys

import pytest

from tests.training.on_meshes import MESHES
from zoo.mixers import MIXERS

ALL = [(mixer, *MESHES) for mixer in (*MIXERS, "gla,attention")]
ALL += [(mixer, "sequence=8", MESHES[-1], "mosaic_tpu") for mixer in ("gla", "mamba")]  # kernels, interpreted


def hold(*arguments):
    command = [sys.executable, "-m", "tests.training.on_meshes", *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["mesh"] for row in rows] == [argument for argument in arguments if "=" in argument]
    for row in rows:
        assert row["loss"] < 1e-5 and row["parameter"] < 1e-5 and row["adamw"] < 1e-3, row
        assert row["moved"] > 1e-3, row  # a step that does nothing is the same anywhere


def test_training_a_hybrid_on_eight_devices_is_training_it_on_one():
    hold("mamba2,attention", MESHES[-1])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ALL, ids=[" ".join(x for x in a if x not in MESHES) for a in ALL])
def test_training_on_eight_devices_is_training_on_one(arguments):
    hold(*arguments)
