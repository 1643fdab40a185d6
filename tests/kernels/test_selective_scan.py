"""`selective_scan` beyond the conformance suite: blocks, extreme steps, memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, selective_scan, selective_scan_step
from kernels.selective_scan import chunked as module
from tests.kernels import hopper
from tests.kernels.conformance import CASES, assert_close, cotangents, error_ratio, normal, random_segments, results
from tests.kernels.tpu import compile_for_tpu as compile_without_cache

NAME = "selective_scan-skip"


def assert_chunked_is_the_reference(inputs, segment_ids):
    @jax.jit
    def run(inputs, cotangents):
        values, pull = jax.vjp(lambda inputs: CASES[NAME].run(inputs, segment_ids, "chunked"), inputs)
        return values, pull(cotangents)[0]

    assert_close(run(inputs, cotangents(NAME, inputs)), results(NAME, "reference", inputs, segment_ids))


def test_blocks_of_channels_change_nothing(monkeypatch):
    monkeypatch.setattr(module, "CPU", dataclasses.replace(module.CPU, state_floats=6))  # 2 of the 6 channels
    assert_chunked_is_the_reference(CASES[NAME].make(), random_segments())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [2, 50])
def test_the_loops_of_a_gpu_are_the_reference(time, packed):
    segment_ids = random_segments(length=time) if packed else None
    with dispatch.use_device(dispatch.Device("gpu", "NVIDIA A100-SXM4-40GB")):
        assert_chunked_is_the_reference(CASES[NAME].make(length=time), segment_ids)


@pytest.mark.gpu_compile
def test_a_gpu_loops_over_chunks_alone():
    time, device = 128, hopper.h200()

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))

    def loss(x, dt, A, B, C):
        return selective_scan(x, dt, A, B, C, implementation="chunked")[0].sum()

    row, of_state = struct(4, time, 256), struct(4, time, 16)
    with dispatch.use_device(device):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).trace(row, row, struct(256, 16), of_state, of_state)
        text = compile_without_cache(traced.lower(lowering_platforms=("cuda",))).as_text()
    assert re.findall(r'known_trip_count":{"n":"(\d+)"', text) == [str(time // 16)] * 2  # no other loop
    for body in re.findall(r"body=%?([\w.]+)", text):
        computation = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.S | re.M)[0]
        assert 1 < len(re.findall(r" (fusion|copy|custom-call)\(", computation)) < 4 * 16  # a token once took 4 and 7


@pytest.mark.parametrize(("time", "size"), [(65, 22), (64, 32), (33, 17), (5, 5)])
def test_chunks_are_of_one_size(time, size):
    x, A, B = jnp.zeros((1, time, 4)), jnp.zeros((4, 3)), jnp.zeros((1, time, 3))
    jaxpr = jax.make_jaxpr(lambda x, A, B: selective_scan(x, x, A, B, B, implementation="chunked")[0])(x, A, B)
    reshapes = [equation for equation in jaxpr.eqns if equation.primitive.name == "reshape"]
    assert (1, -(-time // size), size, 4) in [equation.outvars[0].aval.shape for equation in reshapes]


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_steps_from_1e_6_to_1e3_are_finite(implementation):
    inputs = CASES[NAME].make()
    rng = np.random.default_rng(4)
    inputs["dt"] = jnp.asarray(10 ** rng.uniform(-6, 3, inputs["dt"].shape), jnp.float32)
    actual = results(NAME, implementation, inputs)
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), actual))
    assert_close(actual, results(NAME, "reference", inputs))


def test_no_state_of_a_token_is_kept_for_the_backward_pass():
    time, channels, state_size = 512, 64, 16
    rng = np.random.default_rng(0)
    x, dt = normal(rng, 1, time, channels), jnp.ones((1, time, channels))
    A, B, C = -jnp.ones((channels, state_size)), normal(rng, 1, time, state_size), normal(rng, 1, time, state_size)
    compiled = jax.jit(jax.grad(lambda x: selective_scan(x, dt, A, B, C)[0].sum())).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * time * channels * state_size / 2


def test_the_reference_is_the_equation_in_float64():
    inputs, segment_ids = CASES[NAME].make(), np.asarray(random_segments())
    y, final_state = selective_scan(**inputs, segment_ids=jnp.asarray(segment_ids), implementation="reference")
    v = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    expected, h = np.zeros(y.shape), v["initial_state"].copy()
    for b, t in np.ndindex(*y.shape[:2]):
        if t and segment_ids[b, t] != segment_ids[b, t - 1]:
            h[b] = 0
        x, dt = v["x"][b, t], v["dt"][b, t]
        h[b] = np.exp(dt[:, None] * v["A"]) * h[b] + np.outer(dt * x, v["B"][b, t])
        expected[b, t] = h[b] @ v["C"][b, t] + v["D"] * x
    assert error_ratio(y, expected) < 1e-6
    assert error_ratio(final_state, h) < 1e-6


BAD = {
    "dt": ("dt", (2, 36, 5), r"dt has shape \(2, 36, 5\).*x of shape \(2, 36, 6\)"),
    "A": ("A", (5, 3), r"A has shape \(5, 3\), expected \(6, 3\)"),
    "B": ("B", (2, 36, 4), r"B has shape \(2, 36, 4\), expected \(2, 36, 3\) beside A"),
    "D": ("D", (3,), r"D has shape \(3,\), expected \(6,\)"),
    "state": ("initial_state", (2, 3, 6), r"initial_state has shape \(2, 3, 6\), expected \(2, 6, 3\)"),
}


@pytest.mark.parametrize("name, shape, message", BAD.values(), ids=BAD)
def test_a_wrong_shape_is_named(name, shape, message):
    inputs = CASES[NAME].make() | {name: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        # beneath the annotations that tests check, as users meet it
        getattr(selective_scan, "__wrapped__", selective_scan)(**inputs)


def test_a_step_with_a_wrong_state_is_named():
    x, A, B = jnp.zeros((2, 6)), jnp.zeros((6, 3)), jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="selective_scan_step: state has shape"):
        getattr(selective_scan_step, "__wrapped__", selective_scan_step)(x, x, A, B, B, state=jnp.zeros((2, 3, 6)))
