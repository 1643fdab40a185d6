"""A step on a mesh is the step on one device: losses and parameters after ten steps, for every family and mesh."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import XLA_FLAGS
from tests.training.on_meshes import MESHES
from zoo.mixers import CAUSAL_MIXERS, MIXERS

ALL = [(mixer, *MESHES) for mixer in (*CAUSAL_MIXERS, "gla,gla,attention")]
BOTH_WAYS = ("attention,gla,mamba2", "linear_attention", "rwkv7", "hgrn2", *sorted({*MIXERS} - {*CAUSAL_MIXERS}))
ALL += [(f"{mixer}/bidirectional", *MESHES[-2:]) for mixer in BOTH_WAYS]
ALL += [(f"gla/{head}", *MESHES) for head in ("classes", "values")]
ALL += [(mixer, "sequence=8", MESHES[-1], "mosaic_tpu") for mixer in ("gla", "mamba")]  # kernels, interpreted


def hold(*arguments):
    command = [sys.executable, "-m", "tests.training.on_meshes", *arguments]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": XLA_FLAGS}  # it compiles more than it runs
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["mesh"] for row in rows] == [argument for argument in arguments if "=" in argument]
    for row in rows:
        assert row["loss"] < 1e-5 and row["parameter"] < 1e-5 and row["adamw"] < 1e-3, row
        assert row["moved"] > 1e-4, row  # a step that does nothing is the same anywhere


def test_training_a_hybrid_on_eight_devices_is_training_it_on_one():
    hold("gla,gla,attention", MESHES[-1], "descent")


MEMORY = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from zoo import sharding
    from zoo.config import preset
    from zoo.training import step

    for devices in (1, 8):
        c = preset("tiny")
        c.model.mixer, c.model.vocab_size, c.model.num_layers, c.model.d_model = sys.argv[1], 256, 4, 64
        c.train.batch_size, c.train.context_length, c.mesh.data, c.mesh.sequence = 1, 131_072, 1, devices
        programs = step.build(c, sharding.make_mesh(c.mesh, jax.devices()[:devices]))
        compiled = programs.train.lower(programs.abstract_state, step.abstract_batch(c)).compile()
        memory = compiled.memory_analysis()
        print(memory.temp_size_in_bytes + memory.argument_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gla", "mamba", "mamba2"])
def test_memory_of_a_long_context_falls_with_the_sequence_axis(mixer):
    """Of four layers at 131,072 tokens, what the compiled step holds on a device: one, and eight."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), mixer]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight = map(int, done.stdout.split())
    assert one > 6 * eight, (one, eight)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ALL, ids=[" ".join(x for x in a if x not in MESHES) for a in ALL])
def test_training_on_eight_devices_is_training_on_one(arguments):
    hold(*arguments)
