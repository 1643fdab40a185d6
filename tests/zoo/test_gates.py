"""Gates by their equations in float64, at their extremes, and over the depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.zoo.cases import D_MODEL, applied, apply, build, error_ratio
from zoo.checkpoints import named_leaves
from zoo.config import preset
from zoo.mixers import MIXERS
from zoo.mixers.linear.gateloop import cumulative_phase
from zoo.model import LanguageModel

BATCH, TIME = 2, 11


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, TIME, D_MODEL))


def output(mixer, x):
    parameters, call = apply(mixer)
    return call(parameters, x)[0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def double(mixer, x):
    """(what a projection of the mixer gives, per head; a parameter; heads), in float64."""
    x = np.asarray(x, np.float64)
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(nnx.state(mixer)).items()}
    split = lambda y: y.reshape(*y.shape[:2], mixer.heads, -1)  # noqa: E731
    return lambda name, bias=0.0: split(x @ weights[f"{name}.kernel"] + bias), weights


def normed(o, weights, epsilon=1e-5):
    o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + epsilon) * weights["norm.scale"]
    return o.reshape(*o.shape[:2], -1)


def test_gateloop_is_a_recurrence_with_a_complex_gate():
    mixer, x = build("gateloop"), inputs()
    project, weights = double(mixer, x)
    q, k, v, phase = map(project, ("q", "k", "v", "phase"))
    gate = sigmoid(project("magnitude", weights["magnitude_bias"])) * np.exp(1j * phase)
    state, o = np.zeros((BATCH, mixer.heads, q.shape[-1], v.shape[-1]), complex), np.zeros(v.shape)
    for t in range(TIME):
        state = gate[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state).real / np.sqrt(q.shape[-1])
    g = project("output_gate").reshape(BATCH, TIME, -1)
    expected = (normed(o, weights) * g * sigmoid(g)) @ weights["out.kernel"]
    assert error_ratio(output(mixer, x), expected) < 1e-5


def test_dfw_is_a_recurrence_with_an_outer_product_of_gates():
    mixer, x = build("dfw"), inputs()
    project, weights = double(mixer, x)
    q, k, v = map(project, "qkv")
    a, b = (sigmoid(project(f"{name}_gate", weights[f"{name}_bias"])) for name in ("key", "value"))
    state, o = np.zeros((BATCH, mixer.heads, q.shape[-1], v.shape[-1])), np.zeros(v.shape)
    for t in range(TIME):
        state = a[:, t, ..., None] * b[:, t, :, None] * state + k[:, t, ..., None] * v[:, t, :, None]
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state) / np.sqrt(q.shape[-1])
    assert error_ratio(output(mixer, x), normed(o, weights) @ weights["out.kernel"]) < 1e-5


@pytest.mark.parametrize("feature_map", ["exp", "relu", "taylor2"])
def test_feature_maps_of_linear_attention_are_their_kernels_in_float64(feature_map):
    """Attention weights phi(q).phi(k), normalised: of exp no reference model has a layer."""
    mixer, x = build("linear_attention"), inputs()
    mixer.feature_map = feature_map
    if feature_map == "taylor2":
        mixer = build("linear_attention-feature_map=taylor2-key_width=4")
    project, weights = double(mixer, x)
    q, k, v = map(project, "qkv")
    s = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    phi = {"exp": np.exp, "relu": lambda x: np.maximum(x, 0), "taylor2": lambda x: x}[feature_map]
    scores = 1 + s + s**2 / 2 if feature_map == "taylor2" else np.einsum("bthk,bshk->bhts", phi(q), phi(k))
    scores = np.tril(scores)
    o = np.einsum("bhts,bshv->bthv", scores, v) / (scores.sum(-1).swapaxes(1, 2)[..., None] + 1e-6)
    assert error_ratio(output(mixer, x), o.reshape(x.shape) @ weights["out.kernel"]) < 1e-5


def _gates_of_50():
    for write in (-50.0, 0.0, 50.0):
        for forget in (-50.0, 0.0, 50.0):
            quick = (write, forget) in ((-50.0, -50.0), (50.0, -50.0), (50.0, 50.0))
            yield pytest.param(write, forget, marks=[] if quick else [pytest.mark.slow])


WITHOUT_CAP = "mlstm-num_heads=2-gate_soft_cap=0.0-expand_k=1.0"


@functools.cache
def without_cap():
    """The call, and the gradient of its outputs' squares; gates are parameters: one program of each for all of them."""
    call = applied(WITHOUT_CAP)[2]
    return call, jax.jit(jax.grad(lambda parameters, x: jnp.sum(call(parameters, x)[0] ** 2)))


@pytest.mark.parametrize("write, forget", list(_gates_of_50()))
def test_mlstm_with_gates_of_50_is_the_recurrence_without_a_stabiliser(write, forget):
    """In float64 exp(50) needs none. The norm hides a common factor of the outputs: n is compared too."""
    mixer, x = build(WITHOUT_CAP), inputs()
    mixer.input_bias[...] = jnp.full(mixer.heads, write)
    mixer.forget_bias[...] = jnp.asarray([forget, 0.0])
    project, weights = double(mixer, x)
    q, k, v = map(project, "qkv")
    i = np.exp(project("input_gate", weights["input_bias"]))[..., 0]
    f = sigmoid(project("forget_gate", weights["forget_bias"]))[..., 0]
    o, state = np.zeros(v.shape), np.zeros((BATCH, mixer.heads, q.shape[-1], v.shape[-1] + 1))
    for t in range(TIME):
        value = np.concatenate([v[:, t], np.ones_like(v[:, t, :, :1])], -1)  # and the 1 that counts the keys: n
        state = f[:, t, :, None, None] * state + i[:, t, :, None, None] * k[:, t, ..., None] * value[:, :, None]
        read = np.einsum("bhk,bhkv->bhv", q[:, t], state) / np.sqrt(q.shape[-1])
        o[:, t] = read[..., :-1] / np.maximum(np.abs(read[..., -1:]), 1.0)
    o -= o.mean(-1, keepdims=True)
    o = (o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5)).reshape(BATCH, TIME, -1) * weights["norm.scale"]
    expected = (o * sigmoid(project("output_gate").reshape(BATCH, TIME, -1))) @ weights["out.kernel"]
    (call, gradient_of), parameters = without_cap(), nnx.split(mixer)[1]
    y, after = call(parameters, x, None, None, mixer.init_state(BATCH, TIME, jnp.float32))
    assert error_ratio(y, expected) < 1e-4 or np.abs(expected).max() < 1e-12
    scale = np.exp(np.asarray(after["m"], np.float64))[..., None]
    n = np.asarray(after["n"]).reshape(BATCH, mixer.heads, -1)
    np.testing.assert_allclose(n * scale, state[..., -1], rtol=1e-3, atol=1e-4 * np.abs(state[..., -1]).max())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient_of(parameters, x)))


SATURATED = {  # every family whose gates see the token; those of s4d and h3 are parameters, of the rest constants
    "forgetting_attention": ("forget.kernel",),
    "gated_retention": ("gate.kernel",),
    "mlstm": ("input_gate.kernel", "forget_gate.kernel"),
    "gla": ("gate_up.kernel",),
    "hgrn2": ("forget.kernel",),
    "rwkv6": ("decay_up.kernel", "decay_bias"),
    "gateloop": ("magnitude.kernel", "phase.kernel"),
    "dfw": ("key_gate.kernel", "value_gate.kernel"),
    "mamba": ("dt_up",),
    "mamba2": ("in_dt.kernel",),
    "delta_net": ("beta.kernel",),
    "gated_delta_net": ("beta.kernel", "decay.kernel"),
    "gated_delta_product": ("beta.kernel", "decay.kernel"),
    "kda": ("beta.kernel", "decay_up.kernel"),
    "rwkv7": ("decay_up.kernel", "decay_bias", "rate_up.kernel", "rate_bias", "value_up.kernel"),
}


@pytest.mark.parametrize("family, gates", SATURATED.items(), ids=SATURATED)
def test_gates_saturated_both_ways_are_finite_in_value_and_gradient(family, gates):
    parameters, call = apply(build(family))
    names = list(named_leaves(parameters))
    assert set(gates) <= set(names)
    leaves = [
        1e4 * leaf if name in gates else leaf for name, leaf in zip(names, jax.tree.leaves(parameters), strict=True)
    ]
    assert_finite(call, jax.tree.unflatten(jax.tree.structure(parameters), leaves))


def assert_finite(call, parameters):
    value, gradient = jax.jit(jax.value_and_grad(lambda p: jnp.sum(call(p, inputs())[0] ** 2)))(parameters)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("family", ["s4d", "h3"])
def test_fixed_decays_of_0_and_minus_1e4_are_finite_in_value_and_gradient(family, discretization):
    mixer = build(family)
    mixer.ssm.discretization = discretization
    rates = jnp.where(
        jnp.arange(mixer.ssm.size) % 2, jnp.log(1e4), -1e4
    )  # a state that decays at once by one that never
    mixer.ssm.log_rate[...] = jnp.broadcast_to(rates, mixer.ssm.log_rate[...].shape)
    mixer.ssm.log_dt[...] = jnp.zeros_like(mixer.ssm.log_dt[...])
    parameters, call = apply(mixer)
    assert_finite(call, parameters)


def test_the_phase_of_gateloop_is_exact_after_many_tokens():
    phase = np.random.default_rng(0).normal(0.3, 0.2, (1, 100_000, 1)).astype(np.float32)
    expected = np.cumsum(phase.astype(np.float64), axis=1)
    error = np.asarray(jax.jit(cumulative_phase)(jnp.asarray(phase), None), np.float64) - expected
    assert np.abs(np.exp(2j * np.pi * error) - 1).max() < 1e-4  # a sum that grows is off by 0.05


def model_of(mixer, num_layers):
    config = preset("tiny").model
    config.mixer, config.num_layers, config.d_model, config.vocab_size = mixer, num_layers, 16, 8
    return LanguageModel(config, rngs=nnx.Rngs(0))


def test_lower_bounds_of_hgrn2_grow_over_its_own_layers():
    model = model_of("hgrn2,gla,hgrn2", 6)
    for i, block in enumerate((model.units.blocks[0], model.units.blocks[2])):
        rows = jax.random.normal(jax.random.key(i), block.mixer.bound[...].shape)
        block.mixer.bound[...] = rows
    first, other, third = model.over_depth()
    assert other is None
    rows = [b[...][u] for u in range(2) for b in (model.units.blocks[0].mixer.bound, model.units.blocks[2].mixer.bound)]
    shares = np.asarray(jax.nn.softmax(jnp.stack(rows), axis=0))
    expected = np.cumsum(shares, axis=0) - shares[0]
    bounds = np.stack([first[0], third[0], first[1], third[1]])  # in the order of the layers
    np.testing.assert_allclose(bounds, expected, atol=1e-6)
    assert (bounds[0] == 0).all() and (np.diff(bounds, axis=0) > 0).all() and (bounds < 1).all()


def test_lightning_forgets_less_in_upper_layers():
    lower, upper = model_of("lightning,mlp", 4).over_depth()[0]
    assert (float(lower), float(upper)) == (1.0, pytest.approx(1 / 3))
    assert model_of("lightning", 1).over_depth()[0].tolist() == [1.0]


def test_families_without_a_place_in_the_depth_get_none():
    assert nnx.eval_shape(lambda: model_of("gla,attention", 2)).over_depth() == [None, None]
    assert {name for name, mixer in MIXERS.items() if "over_depth" in vars(mixer)} == {
        "hgrn2", "lightning", "performer", "transnormer"
    }  # fmt: skip
