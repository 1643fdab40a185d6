"""Sequences spread over devices: every op is that of one device, and what devices exchange does not grow with them."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import XLA_FLAGS
from zoo.mixers import CAUSAL_MIXERS

# Of each way that something travels one case: a state by its decays of each kind, a halo, keys.
QUICK = (
    r"^(linear_attention key packed|linear_scan complex packed|selective_scan packed|diagonal_ssm packed|"
    r"short_conv 5 state packed|previous packed|associative_scan packed|attention None packed|attention 3 packed|"
    r"attention both ways 3 packed|full_linear_attention packed|delta_rule key packed|cross_entropy( half)?)$"
)


def results(module, *arguments):
    """What a program of this folder prints, one JSON value a line."""
    command = [sys.executable, "-m", f"tests.zoo.{module}", *arguments]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": XLA_FLAGS}  # they compile more than they run
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_op_on_parts_of_the_time_is_the_op():
    errors = dict(results("ops_over_time", QUICK, "4"))  # and its heads in two
    assert errors.pop("cross_entropy half") < 1e-2  # sums over devices of bfloat16
    assert len(errors) == 14 and all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.slow
def test_every_op_on_parts_of_the_time_is_the_op():
    """Packed and not, from given states, with the kernels of TPUs interpreted."""
    errors = {name: error for name, error in results("ops_over_time") if " half" not in name}
    assert len(errors) > 60 and all(error < 1e-5 for error in errors.values()), errors


OTHERS = sorted({*CAUSAL_MIXERS} - {"gla", "mamba"})


@pytest.mark.parametrize("families", ["gla,mamba", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_what_devices_exchange_does_not_grow_with_the_sequence(families):
    """Bytes that a device sends for a mixer, forward and backward, on packed rows of 4,096 and of 32,768 tokens."""
    found = results("exchanged", families, "4096", "32768")
    for short, long in zip(found[::2], found[1::2], strict=True):
        hold(short["family"], short, long)


def hold(family, short, long):
    if family not in ("attention", "forgetting_attention"):
        assert short["bytes"] == pytest.approx(long["bytes"], rel=0.01), (short, long)
    else:  # keys and values, their sums of decays, and half of the queries
        assert 7.5 < long["bytes"] / short["bytes"] < 8, (short, long)
