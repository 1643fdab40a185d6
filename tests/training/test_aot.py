"""--aot: the step compiled for chips that are not there, and what the report says of it."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import pytest

from tests.kernels.tpu import torus
from zoo import config as zoo_config
from zoo.errors import UsageError
from zoo.training import aot, command_line, topology


def small(**settings):
    """A layer in bfloat16."""
    made = zoo_config.preset("tiny")
    made.model.vocab_size, made.model.num_layers, made.model.d_model, made.model.dtype = 512, 1, 256, "bfloat16"
    made.optimizer.name, made.train.batch_size, made.mesh.fsdp, made.mesh.data = "adamw", 8, 4, 1
    made.model.mixer = "mlp"  # kernels take longer to compile than all else
    for name, value in settings.items():
        section, field = name.split("__")
        setattr(getattr(made, section), field, value)
    return made


@pytest.fixture(scope="module")
def compiled():
    torus("v5e:2x2")  # skips without libtpu
    made = small()
    return made, aot.compile_step(made, "v5e:2x2")


def test_a_step_for_four_chips_that_are_not_there(compiled):
    made, report = compiled
    d = made.model.d_model
    matrices = 12 * d**2 * made.model.num_layers  # and the rest is small
    assert report.devices == 4 and report.fits and not report.unknown
    assert report.parts["parameters"] == pytest.approx(matrices + 512 * d, rel=0.02)  # 4 bytes each, on 4 devices
    assert report.parts["optimizer"] == pytest.approx(2 * report.parts["parameters"], rel=0.01)
    assert report.needed > sum(report.parts.values()) * 0.99 and report.has == 15.75 * 2**30
    tokens = made.train.batch_size * made.train.context_length
    assert report.kernel_flops == 0
    products = 3 * 2 * (matrices + 512 * d) * tokens / 4
    assert report.program_flops == pytest.approx(products, rel=0.03)
    assert report.model_flops == pytest.approx(products, rel=0.03)
    gathered = 3 / 4 * 2 * matrices  # bfloat16, and each device sends its quarter to three
    assert gathered < report.collectives["all-gather"][1] < 4 * gathered
    estimate = report.estimate
    assert estimate.matmul == pytest.approx(report.program_flops / 197e12)
    assert estimate.kernels == 0 < estimate.operations < estimate.step
    assert report.mfu(estimate.step) == pytest.approx(report.model_flops / 197e12 / estimate.step)


def test_the_report_says_all_of_it(compiled):
    made, report = compiled
    text = aot.describe(made, report)
    assert re.search(r"^mesh        data=1, fsdp=4, tensor=1, sequence=1: 4 devices, v5e:2x2$", text, re.M)
    assert re.search(r"^  together +0\.\d+  of 15.75: fits, 15\.\d+ GiB free$", text, re.M)
    for row in ("parameters", "optimizer", "temporaries", "model", "program", "all-gather", "kernels", "interconnect"):
        assert re.search(rf"^  {row} +[\d.,]+", text, re.M), row
    assert re.search(r"^  step +\d+\.\d  operation by operation; [\d,]+ tokens/s, MFU \d+\.\d%; bound by ", text, re.M)
    assert re.search(r"^  by the compiler +\d+\.\d ", text, re.M)


def test_what_does_not_fit_says_by_how_much(compiled):
    _, report = compiled
    too_much = dataclasses.replace(report, has=report.needed - 2**29)
    assert aot.statement(too_much) == "does not fit, by 0.50 GiB" and not too_much.fits


@pytest.mark.parametrize(
    ("said", "temporaries", "has"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (29.64G) "
            "exceeds available HBM (15.75G).",
            29.64,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.35G.\n\nTotal hbm usage >= 20.60G:",
            20.10,
            15.75,
        ),
    ],
)
def test_the_compilers_own_refusal_becomes_the_report(compiled, said, temporaries, has):
    _, report = compiled
    parts = {"parameters": 0, "optimizer": 0}
    report = dataclasses.replace(report, parts=parts, needed=0, estimate=None)
    aot._did_not_fit(report, jax.errors.JaxRuntimeError(said))
    assert not report.fits and report.has == int(has * 2**30) and report.needed == int(temporaries * 2**30)
    assert aot.statement(report) == f"does not fit, by {temporaries - has:.2f} GiB"
    with pytest.raises(jax.errors.JaxRuntimeError):
        aot._did_not_fit(report, jax.errors.JaxRuntimeError("INTERNAL: a mistake of ours"))


def test_what_by_formula_cannot_fit_is_not_compiled(monkeypatch):
    torus("v5e:2x2")
    monkeypatch.setattr(topology, "compile_for", lambda *_: pytest.fail("it was compiled"))
    made = small(model__d_model=16384, model__num_layers=24, model__remat="full")
    report = aot.compile_step(made, "v5e:2x2")
    assert not report.fits and "nothing was compiled" in aot.describe(made, report)
    assert re.fullmatch(r"does not fit, by \d\d+\.\d\d GiB", aot.statement(report))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5z:4x4", r"'v5z:4x4': no such topology; known ones, and shapes of theirs: v5e:2x2, 4x4, .*; v5p:2x2x1, "),
        ("v5e", r"expected 2 sides, as v5e:4x4; known ones"),
        ("v5e:4x4x4", r"expected 2 sides, as v5e:4x4"),
        ("v5p:4x4", r"expected 3 sides, as v5p:2x2x2"),
        ("v5p:0x4x4", r"expected 3 sides"),
        (
            "v5p:3x3x3",
            r"libtpu knows no such topology \(a host has 2x2x1 chips, and the sides are no multiples of it\)",
        ),
        ("h200:many", r"expected a number of GPUs, as h200:8"),
        ("h100:8", r"no such topology; known ones"),
        ("v4:2x2x1", r"no such topology; known ones"),
    ],
)
def test_an_unknown_topology_is_refused_with_known_ones(name, message):
    torus("v5e:2x2")
    with pytest.raises(UsageError, match=message) as error:
        topology.devices(name)
    assert "\n" not in str(error.value) and "h200:1, 8" in str(error.value)


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--aot=v5e:2x2 needs libtpu, .*pip install 'jax\[tpu\]'"):
        topology.devices("v5e:2x2")
    with pytest.raises(UsageError, match=r"--aot=h200:8 needs jax's CUDA plugin and ptxas: .*PYTHONPATH"):
        topology.devices("h200:8")


def test_a_mesh_is_checked_as_a_run_checks_it():
    torus("v5e:2x2")
    with pytest.raises(UsageError, match="mesh: .* does not fit 4 devices; use mesh.fsdp=4"):
        aot.compile_step(small(mesh__fsdp=3), "v5e:2x2")
    with pytest.raises(UsageError, match="train.batch_size: 6 sequences do not spread over mesh.fsdp = 4; use 4 or 8"):
        aot.compile_step(small(train__batch_size=6), "v5e:2x2")
    with pytest.raises(UsageError, match="no multiple of the 2 layers"):
        command_line.ahead_of_time(small(model__mixer="gla,attention", model__num_layers=3), "", "v5e:2x2")


def run(*flags):
    command = [sys.executable, "train.py", *flags]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)


@pytest.mark.slow  # test_command_line.py has two such lines of the command, and above is what this one says
def test_the_command_refuses_in_a_line():
    done = run("--aot=v5z:4x4", "--config=gla:tiny")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --aot='v5z:4x4': no such topology; known ones")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--aot=v5e:2x2", "--dry_run"], "give one of them"),
        (["--aot=v5e:2x2", "--num_processes=1"], "--num_processes is for a run"),
        (["--dry_run", "--coordinator=a:1"], "--coordinator is for a run"),
        (["--dry_run", "--process_id=0"], "--process_id is for a run"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, said):
    done = run(*flags, "--config=gla:tiny")
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.slow
def test_the_command_ends_with_1_where_the_step_does_not_fit():
    """64 sequences of 2,048 tokens a chip are too many by formula."""
    torus("v5e:2x2")
    done = run("--aot=v5e:2x2", "--config=gla:1.3b", "--config.mesh.fsdp=4")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"of 15.75: does not fit, by \d+\.\d\d GiB$", done.stdout, re.M)
    assert re.search(r"^error: v5e:2x2: does not fit, by \d+\.\d\d GiB$", done.stderr, re.M)
