"""The Hopper kernels of linear attention: interpreted on a CPU, on a GPU, and compiled without one."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels import dispatch, linear_attention, mosaic_gpu
from kernels.linear_attention import specs
from tests.kernels import hopper, races
from tests.kernels.conformance import error_ratio, log_gate, normal
from tests.kernels.tpu import compile_for_tpu as compile_without_cache
from zoo import ops, sharding

H200 = dispatch.Device("gpu", "NVIDIA H200")
DECAYS = {"none": "", "fixed": "H", "scalar": "BTH", "vector": "BTHK"}


def shapes(decay, *, batch=1, time=150, groups=1, heads=2, key_dim=64, value_dim=64):
    """Of the arguments and of the cotangents."""
    sizes = {"B": batch, "T": time, "H": heads, "K": key_dim}
    half, full = jnp.bfloat16, jnp.float32
    arguments = {
        "q": ((batch, time, groups, key_dim), half),
        "k": ((batch, time, groups, key_dim), half),
        "v": ((batch, time, heads, value_dim), half),
        "initial_state": ((batch, heads, key_dim, value_dim), full),
    }
    if DECAYS[decay]:
        arguments["log_decay"] = tuple(sizes[d] for d in DECAYS[decay]), full
    return arguments, (((batch, time, heads, value_dim), half), arguments["initial_state"])


def make(decay, heads=1, **sizes):
    rng = np.random.default_rng(0)
    arguments, cotangents = shapes(decay, heads=heads, **sizes)
    draw = {name: log_gate if name == "log_decay" else normal for name in arguments}
    arguments = {name: draw[name](rng, *shape).astype(dtype) for name, (shape, dtype) in arguments.items()}
    return arguments, tuple(normal(rng, *shape).astype(dtype) for shape, dtype in cotangents)


def segments(batch, time):
    return jnp.asarray(np.cumsum(np.random.default_rng(1).random((batch, time)) < 0.05, axis=1), jnp.int32)


def value_and_gradients(implementation, arguments, cotangents, segment_ids=None):
    def call(arguments):
        return linear_attention(**arguments, segment_ids=segment_ids, implementation=implementation)

    values, pull = jax.vjp(call, arguments)
    return values, pull(cotangents)[0]


def assert_close(arguments, cotangents, segment_ids=None):
    """As close to the reference in float32 as the contract of all ops wants it of bfloat16."""
    actual = jax.jit(value_and_gradients, static_argnums=0)("mosaic_gpu", arguments, cotangents, segment_ids)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, cotangents))
    wanted = jax.jit(value_and_gradients, static_argnums=0)("reference", *exact, segment_ids)
    ratios = {"out": error_ratio(actual[0][0], wanted[0][0]), "state": error_ratio(actual[0][1], wanted[0][1])}
    assert all(ratio < 5e-3 for ratio in ratios.values()), ratios
    bounds = {name: 2e-2 if name == "log_decay" else 1e-2 for name in arguments}
    ratios = {name: error_ratio(actual[1][name], wanted[1][name]) for name in arguments}
    assert all(ratio < bounds[name] for name, ratio in ratios.items()), ratios
    for name, x in arguments.items():
        assert actual[1][name].dtype == x.dtype
        assert np.isfinite(np.asarray(actual[1][name], np.float32)).all()


@pytest.mark.parametrize("decay", [pytest.param(d, marks=[pytest.mark.slow] * (d == "fixed")) for d in DECAYS])
def test_values_and_gradients_are_the_references(decay):
    assert_close(*make(decay, time=270))  # more chunks than are fetched at once


@pytest.mark.parametrize(
    "decay, key_dim, value_dim", [pytest.param("scalar", 128, 256, marks=pytest.mark.slow), ("vector", 96, 192)]
)
def test_several_tiles_of_keys_and_values(decay, key_dim, value_dim):
    assert_close(*make(decay, key_dim=key_dim, value_dim=value_dim, time=65))


def test_one_token():
    assert_close(*make("vector", time=1))


@pytest.mark.parametrize("decay", [pytest.param("scalar", marks=pytest.mark.slow), "vector"])
def test_parts_of_the_time_are_one_sequence(decay, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "time_parts", lambda blocks, chunks: 3)  # of 2, 2 and 1 chunks
    assert_close(*make(decay, time=300))


@pytest.mark.parametrize("decay", ["scalar", pytest.param("vector", marks=pytest.mark.slow)])
def test_heads_that_share_queries_and_keys(decay):
    assert_close(*make(decay, heads=4, groups=2, time=65))


NO_FAMILY = pytest.mark.slow  # a bonus beside decays of a head


@pytest.mark.parametrize(
    "decay, packed",
    [pytest.param("fixed", True, marks=NO_FAMILY), pytest.param("scalar", False, marks=NO_FAMILY), ("vector", True)],
)
def test_a_bonus_reads_the_state_before_the_decay(decay, packed):
    arguments, cotangents = make(decay, time=70)
    arguments["bonus"] = normal(np.random.default_rng(5), 1, 64)
    assert_close(arguments, cotangents, segments(1, 70) if packed else None)


@pytest.mark.parametrize("decay", [pytest.param("scalar", marks=pytest.mark.slow), "vector"])  # which has all kernels
def test_no_races_and_no_uninitialised_memory(decay):
    checked = contextlib.nullcontext() if dispatch.device().is_hopper else races.checked_on_gpu()
    with checked:
        assert_close(*make(decay, time=300))


@pytest.mark.parametrize(
    "decay, bonus",
    [
        pytest.param("scalar", True, marks=NO_FAMILY),
        ("vector", False),
        pytest.param("vector", True, marks=pytest.mark.slow),
    ],
)
def test_extreme_decays_in_packed_rows(decay, bonus):
    arguments, cotangents = make(decay, batch=2, time=100)
    if bonus:
        arguments["bonus"] = normal(np.random.default_rng(5), 1, 64)
    log_decay = arguments["log_decay"]
    kind = np.random.default_rng(3).integers(0, 3, log_decay.shape)
    arguments["log_decay"] = jnp.select([kind == 0, kind == 1], [log_decay * 0 - 1e4, log_decay * 0], log_decay)
    assert_close(arguments, cotangents, segments(2, 100))


def test_no_gradient_comes_from_the_future():
    arguments, (d_out, d_state) = make("vector")
    now = 70
    only_now = jnp.zeros_like(d_out).at[:, now].set(d_out[:, now])
    run = jax.jit(value_and_gradients, static_argnums=0)
    _, gradients = run("mosaic_gpu", arguments, (only_now, jnp.zeros_like(d_state)))
    for name in ("q", "k", "v", "log_decay"):
        assert np.any(gradients[name][:, now]) and not np.any(gradients[name][:, now + 1 :]), name


@pytest.mark.skipif(not dispatch.device().is_hopper, reason="needs a Hopper GPU")
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_two_runs_are_the_same_to_the_last_bit(decay):
    run = jax.jit(value_and_gradients, static_argnums=0)
    first, second = (run("mosaic_gpu", *make(decay)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"q": jnp.zeros((1, 150, 1, 64)), "k": jnp.zeros((1, 150, 1, 64))}, "expected bfloat16"),
        (make("none", key_dim=32)[0], "K 32, V 64"),
        (make("none", value_dim=576)[0], "K 64, V 576"),
    ],
)
def test_what_it_cannot_do_falls_to_the_next(change, reason):
    arguments = make("none")[0] | change
    with dispatch.use_device(H200):
        with pytest.raises(NotImplementedError, match=reason):
            linear_attention(**arguments, implementation="mosaic_gpu")
        out, _ = linear_attention(**arguments, implementation=("mosaic_gpu", "chunked"))
    assert out.shape == arguments["v"].shape


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB", "NVIDIA B200"])
def test_other_devices_are_refused(kind):
    with dispatch.use_device(dispatch.Device("gpu", kind)), pytest.raises(NotImplementedError, match="Hopper"):
        linear_attention(**make("none")[0], implementation="mosaic_gpu")


@pytest.mark.parametrize("kind, first", [("NVIDIA H200", "mosaic_gpu"), ("NVIDIA A100-SXM4-40GB", "chunked")])
def test_default_on_hopper_gpus_alone(kind, first):
    arguments = make("scalar")[0]
    device = dispatch.Device("gpu", kind)
    assert specs.order(device, arguments["q"], arguments["v"], arguments["log_decay"])[0] == first


@pytest.mark.gpu_compile
@pytest.mark.parametrize("axis", ["data", "sequence"])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "dplr_delta_rule", "selective_scan"])
def test_blocks_on_a_mesh_know_their_sequence(op, axis, monkeypatch, capfd):
    """The index of a grid axis that a mesh around names too would be the device's: each block the first sequence."""
    devices = hopper.h200s(2)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, axis: 2}), devices)
    split = sharding.batch_sharding(mesh)

    def struct(*shape, dtype=jnp.bfloat16, sharding=split):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if op == "dplr_delta_rule":
        args = {name: struct(4, 100, 2, 64) for name in "qkvab"}
        args["log_decay"] = struct(4, 100, 2, 64, dtype=jnp.float32)
    elif op != "selective_scan":
        args = {name: struct(4, 100, 2, 64) for name in "qkv"} | {"log_decay": struct(4, 100, 2, dtype=jnp.float32)}
        args |= {"beta": args["log_decay"]} if op == "delta_rule" else {}
    else:
        args = {name: struct(4, 100, 128) for name in ("x", "dt")} | {name: struct(4, 100, 16) for name in "BC"}
        args["A"] = struct(128, 16, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(args):
        return getattr(ops, op)(**args, implementation="mosaic_gpu")[0].astype(jnp.float32).sum()

    with sharding.use_mesh(mesh):
        compile_without_cache(jax.jit(jax.grad(loss)).trace(args).lower(lowering_platforms=("cuda",)))
    entries = "".join(capfd.readouterr()).split(".entry ")[1:]
    assert len(entries) >= 2 and all("%ctaid.z" in entry for entry in entries)


COMPILED = {  # every width of K and of V, one and several blocks of threads a chunk, parts of the time, packed rows
    "scalar-64-128": dict(decay="scalar", key_dim=64, value_dim=128, groups=2),
    "scalar-128-64": dict(decay="scalar", key_dim=128, value_dim=64, time=2000),
    "vector-64-64": dict(decay="vector", key_dim=64, value_dim=64, groups=2),
    "vector-128-128": dict(decay="vector", key_dim=128, value_dim=128, time=2000),
    "scalar-256-512": dict(decay="scalar", key_dim=256, value_dim=512),
    "vector-96-192": dict(decay="vector", key_dim=96, value_dim=192),
    "vector-256-512": dict(decay="vector", key_dim=256, value_dim=512),
}


@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_gpu(name, monkeypatch, capfd):
    device = hopper.h200()
    sharding = SingleDeviceSharding(device)
    arguments, cotangents = shapes(**COMPILED[name])
    batch, time = arguments["v"][0][:2]

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = (
        {key: struct(*value) for key, value in arguments.items()},
        tuple(struct(*value) for value in cotangents),
        struct((batch, time), jnp.int32),
    )
    with dispatch.use_device(device):
        traced = jax.jit(value_and_gradients, static_argnums=0).trace("mosaic_gpu", *inputs)
    kernels = hopper.compiled_kernels(traced, monkeypatch, capfd)
    expected = ["states_mosaic", "states_reverse", "out", "dv", "dq_dk"]
    expected += ["scores", "products"] if COMPILED[name]["decay"] == "vector" else []
    assert all(any(part in kernel for kernel in kernels) for part in expected)
