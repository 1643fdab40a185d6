"""The GPU's table of benchmarks/kernels.py, on a CPU at a tiny call: all but the speed is what a GPU will print."""

import dataclasses
import functools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import kernels_gpu, measure, record
from benchmarks.kernels_calls import CALLS, QUICK_CALLS, Call
from kernels.linear_attention.specs import Shape

TIMES = measure.Timing(2.0, 2.0, 2.0, 1), measure.Timing(4.0, 4.0, 4.0, 1, host_share=0.99)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Have processes run other source: `stand_in(attribute with their module's name, source)`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{pathlib.Path().absolute()}")

    def replace(attribute, source):
        (tmp_path / f"stands_in_for_{attribute.lower()}.py").write_text(source)
        monkeypatch.setattr(kernels_gpu, attribute, f"stands_in_for_{attribute.lower()}")

    return replace


@pytest.fixture
def fla(stand_in, tmp_path):
    """Have flash-linear-attention give these results of quick_scalar."""

    def give(found):
        (tmp_path / "fla.py").touch()
        (tmp_path / "found").write_bytes(pickle.dumps(found))
        stand_in(
            "FLA_MODULE",
            f"import shutil, sys; shutil.copy({str(tmp_path / 'found')!r}, sys.argv[1] + '/quick_scalar.fla.pickle')",
        )

    return give


def test_the_table_has_times_shares_and_errors_of_each_implementation(monkeypatch, tmp_path, capsys, fla):
    name = "quick_scalar"
    call = QUICK_CALLS[name]
    fla({"results": {"fla": (TIMES, kernels_gpu.exact(call))}, "seconds": {"time": 3}, "reasons": {}})
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    record.RESULTS.parent.mkdir()

    results = kernels_gpu.run({name: call}, minutes=5, quick=True)
    rows = {row["implementation"]: row for row in results["rows"]}
    assert rows.keys() >= {"chunked", "fla"}
    for row in rows.values():
        assert 0 < row["forward_roofline"] and 0 < row["both_roofline"] and 0 < row["both_median_ms"]
        assert row["out_error"] < 5e-3
        assert row["gradient_errors"].keys() == {"q", "k", "v", "log_decay"}
        assert all(error < (2e-2 if key == "log_decay" else 1e-2) for key, error in row["gradient_errors"].items())
    assert rows["chunked"]["out_error"] > 1e-4  # bfloat16: the reference has seen other arithmetic

    fla_row, ceilings = rows["fla"], results["ceilings"]
    flops = 2 * 96 * 2 * (64 * 64 + 64 * 64 + 2 * 64 * 64)  # tokens, heads, chunk 64 of K = V = 64
    moved = 2 * 96 * (1 + 1 + 2 + 2) * 64 + 4 * 96 * 2  # q, k, v and out of bfloat16, decays of float32
    assert fla_row["out_error"] == 0
    assert fla_row["forward_tflops"] == pytest.approx(flops / 2e-3 / 1e12)
    assert fla_row["forward_gbytes_per_second"] == pytest.approx(moved / 2e-3 / 1e9)
    floor = max(flops / ceilings["tflops"] / 1e12, moved / ceilings["gbytes_per_second"] / 1e9)
    assert fla_row["forward_roofline"] == pytest.approx(floor / 2e-3)

    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("bf16 matmul") for line in lines)
    assert [line for line in lines if line.startswith(name) and " fla " in line][0].endswith(" host")
    own = rows["chunked"]["both_median_ms"]
    assert rows["chunked"]["default"] and not fla_row["default"]
    assert f"{name}: default (chunked) {own:.3f} ms f+b, fla 4.000 ({own / 4:.2f})" in lines

    kept = json.loads(record.write("kernels_gpu", results).read_text())
    assert kept["rows"] == results["rows"] and kept.keys() >= {"date", "device", "versions", "ceilings", "left_out"}


def test_operands_take_turns_in_a_queue_and_the_last_result_is_waited_for():
    called, waited = [], []
    thunks = [lambda i=i: called.append(i) or (i, len(called)) for i in range(3)]
    timing = measure.queued({"f": thunks}, waited.append, rounds=4, seconds_each=1e-5)["f"]
    queues = np.diff([0, *(calls for _, calls in waited)])
    assert sum(queues) == len(called) and list(queues[:2]) == [3, 3] and len(queues) == 2 + 4
    assert timing.runs == sum(queues[2:]) and 0 < timing.host_share <= 1
    assert all(called[i] != called[i + 1] for i in range(5))
    slow = measure.queued({"f": thunks}, waited.append, rounds=4, slow=0.0)["f"]
    assert slow.runs == 2


def test_a_failure_loses_one_row_and_is_told(monkeypatch):
    def broken(arrays):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    call = dataclasses.replace(QUICK_CALLS["quick_attention"], time=8)
    good = functools.partial(kernels_gpu.implementation, call, "chunked")
    functions = {"cudnn": broken, "chunked": good}
    monkeypatch.setattr(kernels_gpu, "supported", lambda call, arrays: (functions, {"splash": "no TPU"}))
    found = kernels_gpu.time_call(call, *kernels_gpu.build_call(call))
    assert found["results"].keys() == {"chunked"} and found["default"] == "chunked"
    assert found["reasons"] == {"splash": "no TPU", "cudnn": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}


def test_a_process_that_fails_loses_its_rows_and_is_told(stand_in, fla, capsys):
    stand_in("MODULE", "import sys; sys.exit('no device')")
    fla({"results": {"fla": (TIMES, {})}, "seconds": {}, "reasons": {}})
    results = kernels_gpu.run({"quick_scalar": QUICK_CALLS["quick_scalar"]}, minutes=5, quick=True)
    assert results["rows"] == []
    reasons = {"row": "exit status 1: no device", "fla": "there is no reference to compare it with"}
    assert results["left_out"] == {"quick_scalar": reasons}
    assert "no row in quick_scalar: exit status 1: no device" in capsys.readouterr().out


def test_a_process_is_stopped_when_its_seconds_are_over():
    start = time.monotonic()
    assert (
        kernels_gpu.execute([sys.executable, "-c", "import time; time.sleep(60)"], {}, 0.2) == "stopped after 0 seconds"
    )
    assert time.monotonic() - start < 30


def test_one_process_has_the_device_and_not_for_long(tmp_path):
    source = """
import sys, time
from benchmarks import measure
with measure.alone(sys.argv[1], seconds=1):
    print(time.monotonic(), flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", source, str(tmp_path / "lock")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    began = sorted(float(process.communicate()[0]) for process in both)
    assert began[1] - began[0] > 0.9 and all(process.returncode for process in both)


def test_no_call_is_begun_when_the_minutes_are_over(monkeypatch):
    monkeypatch.setattr(kernels_gpu, "execute", lambda *args: pytest.fail("begun"))
    results = kernels_gpu.run(QUICK_CALLS, minutes=0, quick=True)
    assert results["rows"] == [] and results["left_out"].keys() >= QUICK_CALLS.keys()


def test_checked_calls_keep_what_decides_about_kernels():
    for call in CALLS.values():
        small = call.checked()
        assert small.op == call.op and small.batch * small.time < 300
        if isinstance(call.shape, Shape):
            same = {"key_dim", "value_dim", "decay", "bonus"}
            assert all(getattr(small.shape, name) == getattr(call.shape, name) for name in same)
            assert (small.shape.heads > small.shape.groups) == (call.shape.heads > call.shape.groups)


def test_keys_that_a_delta_rule_corrects_by_do_not_grow_a_state():
    drawn = QUICK_CALLS["quick_delta"].draw_checked()
    np.testing.assert_allclose(np.sum(drawn["k"] ** 2, axis=-1), 1, rtol=1e-5)
    assert 0 < np.min(drawn["beta"]) < 1 < np.max(drawn["beta"]) < 2


def test_attention_and_delta_rules_and_scans_are_counted():
    attention = Call("attention", 2, 10, (3, 4))
    assert attention.flops()[0] == 2 * (2 * 3) * (10 * 10 / 2) * 2 * 4  # multiply and add; pairs; two products
    delta = Call("delta_rule", 2, 10, Shape(1, 3, 128, 64, "none"))
    products = 2 * 64 * 128 + 2 * 64 * 64 + 3 * 128 * 64 + 64 * 64 // 3  # scores; with v; of states; the inverse
    assert delta.flops()[0] == 2 * (2 * 10 * 3) * products
    assert delta.bytes()[0] == 2 * (2 * 10 * (2 * 128 + 2 * 3 * 64)) + 4 * 2 * 10 * 3  # q, k; v, out; beta
    dplr = Call("dplr_delta_rule", 2, 10, Shape(3, 3, 128, 64, "vector"))
    assert dplr.flops()[0] == 2 * (2 * 10 * 3) * (4 * 64 * 128 + 4 * 64 * 64 + 4 * 128 * 64 + 64 * 64 // 3)
    assert dplr.bytes()[0] == 2 * (2 * 10 * 3) * (4 * 128 + 2 * 64) + 4 * 2 * 10 * 3 * 128  # q, k, a, b; v, out; decay
    scan = Call("selective_scan", 2, 10, (5, 3))
    rows, states = 2 * 10 * 5, 2 * 10 * 3
    assert scan.bytes()[0] == 2 * rows + 4 * rows + 2 * 2 * states + 4 * (15 + 5) + 2 * rows  # x, dt; B, C; A, D; y
