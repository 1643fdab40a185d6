"""The TPU kernels of the delta rule: tiles and shared heads, a TPU's rounding, races, and ahead-of-time compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

from kernels import delta_rule, dispatch, dplr_delta_rule
from kernels.delta_rule import mosaic_tpu, specs
from kernels.delta_rule.specs import Tiles
from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.linear_attention.specs import slots
from tests.kernels import races, tpu_rounding
from tests.kernels.conformance import error_ratio, log_gate, normal, unit
from tests.kernels.test_delta_rule import exact
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, devices

DECAYS = {"none": "", "scalar": "BTH", "vector": "BTHK"}


def make(decay, *, batch=1, time=300, heads=2, groups=2, key_dim=16, value_dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sizes = {"B": batch, "T": time, "H": heads, "K": key_dim}
    arrays = {
        "q": normal(rng, batch, time, groups, key_dim).astype(dtype),
        "k": unit(rng, batch, time, groups, key_dim).astype(dtype),
        "v": normal(rng, batch, time, heads, value_dim).astype(dtype),
        "beta": 2 * jax.nn.sigmoid(normal(rng, batch, time, heads)),
        "initial_state": normal(rng, batch, heads, key_dim, value_dim),
    }
    if DECAYS[decay]:
        arrays["log_decay"] = log_gate(rng, *(sizes[d] for d in DECAYS[decay]))
    return arrays


def segments(time):
    return jnp.asarray(np.cumsum(np.random.default_rng(1).random((1, time)) < 0.03, axis=1), jnp.int32)


def value_and_gradients(implementation, segment_ids=None):
    def run(inputs, cotangents):
        def call(inputs):
            op = dplr_delta_rule if "a" in inputs else delta_rule
            return op(**inputs, segment_ids=segment_ids, implementation=implementation)

        values, pull = jax.vjp(call, inputs)
        return values, pull(cotangents)[0]

    return run


def cotangents(inputs):
    rng = np.random.default_rng(2)
    v, state = inputs["v"], inputs["initial_state"]
    return normal(rng, *v.shape).astype(v.dtype), normal(rng, *state.shape)


def assert_the_reference(inputs, results, segment_ids=None):
    values, gradients = results
    expected, expected_gradients = jax.jit(value_and_gradients("reference", segment_ids))(inputs, cotangents(inputs))
    assert max(map(error_ratio, values, expected)) < 1e-6
    assert max(error_ratio(gradients[key], expected_gradients[key]) for key in expected_gradients) < 1e-5


CASES = {  # ways that heads share q and k, that tiles and chunks lie in a step; each but one is slow
    "scalar-shared-by-steps": (make("scalar", heads=4, groups=1, time=200), Tiles(64, 128, 2, 1, 1), True),
    "scalar-shared-in-a-step": (make("scalar", heads=4, groups=2), Tiles(128, 256, 4, 2, 2), True),
    "scalar-odd-heads": (make("scalar", heads=3, groups=3), Tiles(64, 256, 3, 1, 1), False),
    "none-wide": (make("none", key_dim=130, value_dim=200, heads=2, groups=1), None, False),
    "vector-two-tiles-at-once": (make("vector", key_dim=72), Tiles(64, 256, 2, 2, 2), True),
    "scalar-two-in-the-lanes": (make("scalar", heads=4, groups=4, key_dim=40), Tiles(64, 128, 1, 2, 1), True),
    "vector-four-in-the-lanes": (make("vector", heads=8, groups=8, value_dim=32), Tiles(32, 64, 2, 1, 2), True),
    "vector-shared": (make("vector", heads=4, groups=1), Tiles(128, 128, 2, 1, 1), False),
}


@pytest.mark.parametrize(
    "name", [name if name == "scalar-shared-by-steps" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_many_tiles_are_the_reference(name):
    inputs, tiles, packed = CASES[name]
    segment_ids = segments(inputs["v"].shape[1]) if packed else None
    with mosaic_tpu.use(tiles=tiles):
        results = jax.jit(value_and_gradients("mosaic_tpu", segment_ids))(inputs, cotangents(inputs))
    assert_the_reference(inputs, results, segment_ids)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_chunks_of_128_in_bfloat16(decay):
    inputs = make(decay, dtype=jnp.bfloat16, key_dim=72)
    with mosaic_tpu.use(tiles=Tiles(128, 384, 2, 3, 1)):
        values, gradients = jax.jit(value_and_gradients("mosaic_tpu"))(inputs, cotangents(inputs))
    expected, expected_gradients = jax.jit(value_and_gradients("reference"))(inputs, cotangents(inputs))
    assert max(map(error_ratio, values, expected)) < 5e-3
    assert max(error_ratio(gradients[key], expected_gradients[key]) for key in expected_gradients) < 2e-2


@pytest.mark.parametrize("kind, per_key, block, heads", [
    ("TPU v5 lite", False, 512, 8), ("TPU v5 lite", True, 256, 8), ("TPU v5", False, 1024, 4), ("TPU v5", True, 512, 4),
])  # fmt: skip
def test_a_step_has_work_enough_to_hide_what_waits(kind, per_key, block, heads):
    """The same number of tiles, of tokens of a head, where heads are left for a second core. No padded block more."""

    def tiles(time):
        heads = slots(8, 8, 128, 128, per_key=True)
        return specs.tiles(dispatch.Device("tpu", kind), time, heads, jnp.dtype("bfloat16"), per_key)

    assert tiles(4096) == Tiles(64, block, heads, block // 128, 1)
    assert tiles(block + 1).block == block // 2 + 128


def errors_on_a_tpu(monkeypatch, name, decays, dtype, passes, time=64, shared=True):
    """Of values and gradients in a TPU's rounding, `passes` of bfloat16 for a float32 product; not `shared`: every head
    has a copy of q and k, so that two of them share the lanes."""

    def dot(self, a, b, contracted):
        params = {
            "dimension_numbers": ((contracted[:1], contracted[1:]), ((), ())),
            "precision": (lax.Precision.HIGHEST,) * 2 if self.exact else None,
            "preferred_element_type": jnp.float32,
            "out_sharding": None,
        }
        return tpu_rounding.product(a.astype(self.dtype), b.astype(self.dtype), params, passes)

    monkeypatch.setattr(Dots, "_dot", dot)
    (inputs, d_results), (values, gradients) = exact(name, decays, time)
    narrow = {key: jnp.asarray(inputs[key]).astype(dtype) for key in ("q", "k", "v", "a", "b") if key in inputs}
    inputs = {key: jnp.asarray(x) for key, x in inputs.items()} | narrow
    if not shared:
        inputs |= {key: jnp.repeat(inputs[key], inputs["v"].shape[2], axis=2) for key in ("q", "k")}
    results = jax.jit(value_and_gradients("mosaic_tpu"))(inputs, (d_results[0].astype(dtype), d_results[1]))
    if not shared:
        results[1].update({key: results[1][key].sum(2, keepdims=True) for key in ("q", "k")})
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves((values, gradients)), strict=True)
    return [error_ratio(actual, wanted) for actual, wanted in pairs]


@pytest.mark.parametrize(
    "decays", ["scalar", pytest.param("none", marks=pytest.mark.slow), pytest.param("vector", marks=pytest.mark.slow)]
)
def test_near_parallel_keys_are_right_on_a_tpu_too(monkeypatch, decays):
    assert max(errors_on_a_tpu(monkeypatch, "near_parallel_keys_beta_2", decays, jnp.float32, passes=6)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("decays", ["scalar", "vector"])
def test_near_parallel_keys_of_two_heads_in_the_lanes(monkeypatch, decays):
    name = "near_parallel_keys_beta_2"
    assert max(errors_on_a_tpu(monkeypatch, name, decays, jnp.float32, passes=6, shared=False)) < 1e-4
    errors = errors_on_a_tpu(monkeypatch, name, decays, jnp.bfloat16, passes=6, time=150, shared=False)
    assert max(errors[:2]) < 3.5e-2


@pytest.mark.slow
@pytest.mark.parametrize("decays", ["none", "scalar", "vector"])
def test_near_parallel_keys_in_bfloat16_cost_what_rounding_them_costs(monkeypatch, decays):
    """Of out and the final state, with inputs that are rounded too: `benchmarks.near_parallel` has what rounding alone
    costs. Over two chunks and a half: a resolvent without its low part is five times as far off, and in one not."""
    errors = errors_on_a_tpu(monkeypatch, "near_parallel_keys_beta_2", decays, jnp.bfloat16, passes=6, time=150)
    assert max(errors[:2]) < 3.5e-2


@pytest.mark.slow
def test_near_parallel_keys_are_wrong_in_one_pass_of_bfloat16(monkeypatch):
    assert max(errors_on_a_tpu(monkeypatch, "near_parallel_keys_beta_2", "none", jnp.float32, passes=1)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_no_races_and_no_uninitialised_memory(decay):
    inputs = make(decay, time=200, heads=4, groups=2)
    with races.checked(), mosaic_tpu.use(tiles=Tiles(64, 128, 1, 1, 1)):
        results = jax.jit(value_and_gradients("mosaic_tpu", segments(200)))(inputs, cotangents(inputs))
    assert_the_reference(inputs, results, segments(200))


def test_what_it_does_not_do_is_said():
    inputs = make("scalar", time=4)
    with pytest.raises(NotImplementedError, match="mosaic_tpu: inputs are float16"):
        delta_rule(**{k: x.astype(jnp.float16) for k, x in inputs.items()}, implementation="mosaic_tpu")
    with dispatch.use_device(dispatch.Device("gpu", "NVIDIA H200")):
        with pytest.raises(NotImplementedError, match="a kernel for TPUs"):
            delta_rule(**inputs, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="more than 256 a side"):
        delta_rule(**make("none", time=4, key_dim=257), implementation="mosaic_tpu")


def _chips():
    for decay in DECAYS:
        for chip in TOPOLOGIES:
            for dtype in (jnp.bfloat16, jnp.float32):
                quick = chip == "v5e" and dtype == jnp.bfloat16 and decay != "none"
                yield pytest.param(chip, decay, 128, dtype, marks=[] if quick else [pytest.mark.slow])
                if decay != "none":
                    yield pytest.param(chip, decay, 64, dtype, marks=pytest.mark.slow)


@pytest.mark.parametrize("chip, decay, value_dim, dtype", list(_chips()))
def test_compiles_ahead_of_time(chip, decay, value_dim, dtype):
    """Forward and backward, at a length that is no multiple of anything."""
    device = devices(chip)[0]
    groups = 2 if decay == "vector" or value_dim == 64 else 1
    inputs = jax.eval_shape(
        lambda: make(decay, time=200, heads=2, groups=groups, key_dim=64, value_dim=value_dim, dtype=dtype)
    )
    sharding = SingleDeviceSharding(device)
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (inputs, jax.eval_shape(cotangents, inputs)),
    )
    segment_ids = jnp.ones((1, 200), jnp.int32) if decay == "vector" else None
    with dispatch.use_device(device):
        compiled = compile_for_tpu(jax.jit(value_and_gradients(None, segment_ids)).lower(*args))
    assert compiled.as_text().count("tpu_custom_call") >= 2
