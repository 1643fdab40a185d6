"""The Hopper kernels of the general delta rule: interpreted on a CPU, on a GPU, and compiled without one."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from kernels import dispatch, dplr_delta_rule
from kernels.dplr_delta_rule import specs
from tests.kernels import hopper, races
from tests.kernels.conformance import error_ratio, log_gate, normal, unit
from tests.kernels.test_delta_rule_gpu import H200, near_parallel, segments


def make(*, batch=1, time=150, heads=1, key_dim=64, value_dim=64, keys=unit, rate=None):
    """Arguments by name, and cotangents of the output and of the final state."""
    rng, shape = np.random.default_rng(0), (batch, time, heads, key_dim)
    kappa = keys(rng, *shape)
    arguments = {
        "q": normal(rng, *shape),
        "k": normal(rng, *shape),
        "v": normal(rng, batch, time, heads, value_dim),
        "a": -kappa,
        "b": kappa * (jax.nn.sigmoid(normal(rng, *shape)) if rate is None else rate),
        "log_decay": log_gate(rng, *shape),
        "initial_state": normal(rng, batch, heads, key_dim, value_dim),
    }
    cotangents = normal(rng, *arguments["v"].shape), normal(rng, *arguments["initial_state"].shape)
    arguments |= {name: arguments[name].astype(jnp.bfloat16) for name in "qkvab"}
    return arguments, (cotangents[0].astype(jnp.bfloat16), cotangents[1])


def value_and_gradients(implementation, arguments, cotangents, segment_ids=None):
    def call(arguments):
        return dplr_delta_rule(**arguments, segment_ids=segment_ids, implementation=implementation)

    values, pull = jax.vjp(call, arguments)
    return values, pull(cotangents)[0]


run = jax.jit(value_and_gradients, static_argnums=0)


def assert_close(arguments, cotangents, segment_ids=None, times=1):
    """As close to the reference in float32 as the contract of all ops wants it of bfloat16, or `times` that."""
    actual = run("mosaic_gpu", arguments, cotangents, segment_ids)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, cotangents))
    wanted = run("reference", *exact, segment_ids)
    ratios = {"out": error_ratio(actual[0][0], wanted[0][0]), "state": error_ratio(actual[0][1], wanted[0][1])}
    assert all(ratio < times * 5e-3 for ratio in ratios.values()), ratios
    bounds = {name: times * (2e-2 if name == "log_decay" else 1e-2) for name in arguments}
    ratios = {name: error_ratio(actual[1][name], wanted[1][name]) for name in arguments}
    assert all(ratio < bounds[name] for name, ratio in ratios.items()), ratios
    for name, x in arguments.items():
        assert actual[1][name].dtype == x.dtype
        assert np.isfinite(np.asarray(actual[1][name], np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 64, 140])
def test_values_and_gradients_are_the_references(time):
    assert_close(*make(time=time, batch=2, heads=2))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_several_tiles_of_keys_and_values(packed):
    assert_close(*make(batch=2, heads=2, key_dim=96, value_dim=192, time=100), segments(2, 100) if packed else None)


@pytest.mark.slow
@pytest.mark.parametrize("key_dim", [64, 128])
def test_no_races_and_no_uninitialised_memory(key_dim):
    checked = contextlib.nullcontext() if dispatch.device().is_hopper else races.checked_on_gpu()
    with checked:
        assert_close(*make(time=300, key_dim=key_dim))


@pytest.mark.slow
def test_extreme_decays_in_packed_rows():
    arguments, cotangents = make(batch=2, time=100)
    log_decay = arguments["log_decay"]
    kind = np.random.default_rng(3).integers(0, 3, log_decay.shape)
    arguments["log_decay"] = jnp.select([kind == 0, kind == 1], [log_decay * 0 - 1e4, log_decay * 0], log_decay)
    assert_close(arguments, cotangents, segments(2, 100))


@pytest.mark.slow
@pytest.mark.parametrize("rate, times", [(1.0, 1), (2.0, 4)])
def test_near_parallel_keys(rate, times):
    """As of the delta rule without decays: with a rate of 2 corrections, and so their roundings, add up."""
    arguments, cotangents = make(time=200, key_dim=128, keys=near_parallel, rate=rate)
    arguments["log_decay"] = jnp.zeros_like(arguments["log_decay"])
    assert_close(arguments, cotangents, times=times)


@pytest.mark.slow
def test_no_gradient_comes_from_the_future():
    arguments, (d_out, d_state) = make()
    now = 70
    only_now = jnp.zeros_like(d_out).at[:, now].set(d_out[:, now])
    _, gradients = run("mosaic_gpu", arguments, (only_now, jnp.zeros_like(d_state)))
    for name in ("q", "k", "v", "a", "b", "log_decay"):
        assert not np.any(gradients[name][:, now + 1 :]), name
        assert np.any(gradients[name][:, : now + 1]), name


@pytest.mark.skipif(not dispatch.device().is_hopper, reason="needs a Hopper GPU")
def test_two_runs_are_the_same_to_the_last_bit():
    first, second = (run("mosaic_gpu", *make()) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"a": jnp.zeros((1, 150, 1, 64))}, "expected bfloat16"),
        (make(key_dim=32)[0], "K 32, V 64"),
        (make(value_dim=320)[0], "K 64, V 320"),
    ],
)
def test_what_it_cannot_do_falls_to_the_next(change, reason):
    arguments = make()[0] | change
    with dispatch.use_device(H200):
        with pytest.raises(NotImplementedError, match=reason):
            dplr_delta_rule(**arguments, implementation="mosaic_gpu")
        either = functools.partial(dplr_delta_rule, implementation=("mosaic_gpu", "chunked"))
        out, _ = jax.eval_shape(lambda arguments: either(**arguments), arguments)
    assert out.shape == arguments["v"].shape


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB", "NVIDIA B200"])
def test_other_devices_are_refused(kind):
    with dispatch.use_device(dispatch.Device("gpu", kind)), pytest.raises(NotImplementedError, match="Hopper"):
        dplr_delta_rule(**make()[0], implementation="mosaic_gpu")


def test_not_a_default_before_it_ran_on_a_gpu():
    assert "mosaic_gpu" not in specs.order(H200)


COMPILED = {  # every width of K and of V, a whole number of chunks and not
    "64-64": dict(key_dim=64, value_dim=64, heads=2),
    "128-128": dict(key_dim=128, value_dim=128, time=2000),
    "64-256": dict(key_dim=64, value_dim=256, time=256),
}


@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_gpu(name, monkeypatch, capfd):
    device = hopper.h200()
    sharding = SingleDeviceSharding(device)
    arguments, cotangents = make(**COMPILED[name])
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (arguments, cotangents, segments(*arguments["v"].shape[:2])),
    )
    with dispatch.use_device(device):
        traced = run.trace("mosaic_gpu", *inputs)
    kernels = hopper.compiled_kernels(traced, monkeypatch, capfd)
    expected = ["gated", "scores", "system", "corrections_mosaic", "corrections_reverse", "pair_products"]
    expected += ["state_products", "dq_da", "db_dk"]
    assert all(any(part in kernel for kernel in kernels) for part in expected), kernels
