"""The Hopper kernels of the delta rule: interpreted on a CPU, on a GPU, and compiled without one."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from kernels import delta_rule, dispatch
from kernels.delta_rule import specs
from tests.kernels import hopper, races
from tests.kernels.conformance import error_ratio, log_gate, normal, unit

H200 = dispatch.Device("gpu", "NVIDIA H200")
DECAYS = {"none": "", "scalar": "BTH", "vector": "BTHK"}
GATES = ("beta", "log_decay")


def make(decay, *, batch=1, time=150, groups=1, heads=1, key_dim=64, value_dim=64, keys=None):
    """Arguments by name, and cotangents of the output and of the final state."""
    rng = np.random.default_rng(0)
    arguments = {
        "q": unit(rng, batch, time, groups, key_dim),
        "k": unit(rng, batch, time, groups, key_dim) if keys is None else keys(rng, batch, time, groups, key_dim),
        "v": normal(rng, batch, time, heads, value_dim),
        "beta": 2 * jax.nn.sigmoid(normal(rng, batch, time, heads)),
        "initial_state": normal(rng, batch, heads, key_dim, value_dim),
    }
    if decay != "none":
        sizes = {"B": batch, "T": time, "H": heads, "K": key_dim}
        arguments["log_decay"] = log_gate(rng, *(sizes[axis] for axis in DECAYS[decay]))
    cotangents = normal(rng, *arguments["v"].shape), normal(rng, *arguments["initial_state"].shape)
    arguments |= {name: arguments[name].astype(jnp.bfloat16) for name in "qkv"}
    return arguments, (cotangents[0].astype(jnp.bfloat16), cotangents[1])


def near_parallel(rng, *shape):
    keys = unit(rng, *shape[:1], 1, *shape[2:]) + 0.1 * unit(rng, *shape)
    return keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)


def segments(batch, time):
    return jnp.asarray(np.cumsum(np.random.default_rng(1).random((batch, time)) < 0.05, axis=1), jnp.int32)


def value_and_gradients(implementation, arguments, cotangents, segment_ids=None):
    def call(arguments):
        return delta_rule(**arguments, segment_ids=segment_ids, implementation=implementation)

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
    bounds = {name: times * (2e-2 if name in GATES else 1e-2) for name in arguments}
    ratios = {name: error_ratio(actual[1][name], wanted[1][name]) for name in arguments}
    assert all(ratio < bounds[name] for name, ratio in ratios.items()), ratios
    for name, x in arguments.items():
        assert actual[1][name].dtype == x.dtype
        assert np.isfinite(np.asarray(actual[1][name], np.float32)).all()


# Interpreting one takes 10 to 30 seconds: in `make test` the form that most layers use.
@pytest.mark.parametrize("decay", [d if d == "scalar" else pytest.param(d, marks=pytest.mark.slow) for d in DECAYS])
def test_values_and_gradients_are_the_references(decay):
    assert_close(*make(decay, time=140, heads=2))  # a chunk more than are fetched at once


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_several_tiles_of_keys_and_values(decay, packed):
    arguments = make(decay, batch=2, groups=2, heads=4, key_dim=96, value_dim=192, time=100)
    assert_close(*arguments, segments(2, 100) if packed else None)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 64, 65])
def test_any_length(time):
    assert_close(*make("scalar", batch=2, heads=2, time=time))


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_no_races_and_no_uninitialised_memory(decay):
    checked = contextlib.nullcontext() if dispatch.device().is_hopper else races.checked_on_gpu()
    with checked:
        assert_close(*make(decay, time=300, key_dim=128))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_extreme_decays_in_packed_rows(decay):
    arguments, cotangents = make(decay, batch=2, time=100)
    log_decay = arguments["log_decay"]
    kind = np.random.default_rng(3).integers(0, 3, log_decay.shape)
    arguments["log_decay"] = jnp.select([kind == 0, kind == 1], [log_decay * 0 - 1e4, log_decay * 0], log_decay)
    assert_close(arguments, cotangents, segments(2, 100))


@pytest.mark.slow
@pytest.mark.parametrize("beta, times", [(1.0, 1), (2.0, 4)])
def test_near_parallel_keys(beta, times):
    """With beta at 2 corrections of alternating sign, and so their roundings, add up: four times the bounds. With an
    inverse of one bfloat16 it would be up to twenty-four times."""
    arguments, cotangents = make("none", time=200, key_dim=128, keys=near_parallel)
    arguments["beta"] = jnp.full_like(arguments["beta"], beta)
    assert_close(arguments, cotangents, times=times)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_no_gradient_comes_from_the_future(decay):
    arguments, (d_out, d_state) = make(decay)
    now = 70
    only_now = jnp.zeros_like(d_out).at[:, now].set(d_out[:, now])
    _, gradients = run("mosaic_gpu", arguments, (only_now, jnp.zeros_like(d_state)))
    for name in ("q", "k", "v", *GATES):
        assert not np.any(gradients[name][:, now + 1 :]), name
        assert np.any(gradients[name][:, : now + 1]), name


@pytest.mark.skipif(not dispatch.device().is_hopper, reason="needs a Hopper GPU")
@pytest.mark.parametrize("decay", DECAYS)
def test_two_runs_are_the_same_to_the_last_bit(decay):
    first, second = (run("mosaic_gpu", *make(decay)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"q": jnp.zeros((1, 150, 1, 64)), "k": jnp.zeros((1, 150, 1, 64))}, "expected bfloat16"),
        (make("none", key_dim=32)[0], "K 32, V 64"),
        (make("none", key_dim=192)[0], "K 192, V 64"),
    ],
)
def test_what_it_cannot_do_falls_to_the_next(change, reason):
    arguments = make("none")[0] | change
    with dispatch.use_device(H200):
        with pytest.raises(NotImplementedError, match=reason):
            delta_rule(**arguments, implementation="mosaic_gpu")
        either = functools.partial(delta_rule, implementation=("mosaic_gpu", "chunked"))
        out, _ = jax.eval_shape(lambda arguments: either(**arguments), arguments)
    assert out.shape == arguments["v"].shape


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB", "NVIDIA B200"])
def test_other_devices_are_refused(kind):
    with dispatch.use_device(dispatch.Device("gpu", kind)), pytest.raises(NotImplementedError, match="Hopper"):
        delta_rule(**make("none")[0], implementation="mosaic_gpu")


def test_not_a_default_before_it_ran_on_a_gpu():
    assert "mosaic_gpu" not in specs.order(H200)


COMPILED = {  # every width of K and of V, a whole number of chunks and not, shared heads
    "none-64-64": dict(decay="none", key_dim=64, value_dim=64, time=256),
    "scalar-64-128": dict(decay="scalar", key_dim=64, value_dim=128, heads=2),
    "scalar-128-128": dict(decay="scalar", key_dim=128, value_dim=128, time=2000),
    "scalar-128-256": dict(decay="scalar", key_dim=128, value_dim=256, groups=2, heads=4),
    "vector-64-64": dict(decay="vector", key_dim=64, value_dim=64, heads=2),
    "vector-128-128": dict(decay="vector", key_dim=128, value_dim=128, time=2000),
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
    per_key = COMPILED[name]["decay"] == "vector"
    expected = ["inverse", "scores", "corrections_mosaic", "corrections_reverse", "states", "out", "dq_dk"]
    expected += ["gated", "per_key_products", "correction_products", "per_key_dk"] if per_key else ["scalar_dk"]
    assert all(any(part in kernel for kernel in kernels) for part in expected), kernels
