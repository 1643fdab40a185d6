"""S4D and H3 against the recurrence of their papers in float64, and the shapes of the 8B hybrid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import mamba2_hybrid
from tests.zoo.cases import D_MODEL, error_ratio
from zoo import settings
from zoo.config import Config, pattern, validate
from zoo.flops import num_parameters
from zoo.layers import DiagonalSSM, DiagonalSSMConfig
from zoo.mixers import MIXERS, Sizes
from zoo.mixers.state_space.h3 import ShiftSSM
from zoo.model import LanguageModel
from zoo.training.optimizer import decays

TIME = 40


def weights(module):
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...], np.float64) for path, variable in flat}


def recurrence(w, x, prefix, discretization, init):
    """Continuous S4D, sampled: x, y [B, T, D]. Channel i has the A of number i modulo how many there are."""
    A = -np.exp(w[prefix + "log_rate"]) + (0j if init == "real" else 1j * w[prefix + "frequency"])
    A = A[np.arange(x.shape[-1]) % len(A)]
    c = w[prefix + "c_real"] + (0j if init == "real" else 1j * w[prefix + "c_imag"])
    z = np.exp(w[prefix + "log_dt"])[:, None] * A
    if discretization == "zoh":
        a, b = np.exp(z), (np.exp(z) - 1) / A
    else:
        a, b = (1 + z / 2) / (1 - z / 2), np.exp(w[prefix + "log_dt"])[:, None] / (1 - z / 2)
    B = w.get(prefix + "b_real", np.ones((1, 1))) + 1j * w.get(prefix + "b_imag", np.zeros((1, 1)))
    b = b * B[np.arange(x.shape[-1]) % len(B)]
    y, h = np.zeros(x.shape), np.zeros((len(x), *A.shape), complex)
    for t in range(x.shape[1]):
        h = a * h + b * x[:, t, :, None]
        y[:, t] = 2 * np.sum(c * h, -1).real + w[prefix + "D"] * x[:, t]
    return y


def build(name, **settings):
    config = MIXERS[name].config_class(**settings)
    mixer = MIXERS[name](config, Sizes(d_model=D_MODEL, num_layers=2), layer_index=0, rngs=nnx.Rngs(0))
    parameters = [mixer.ssm.log_rate, mixer.ssm.b_real, mixer.ssm.b_imag] + ([mixer.shift.b] if name == "h3" else [])
    for i, parameter in enumerate(parameters):  # each A and B another: they start equal
        if parameter is not None:
            parameter[...] += 0.3 * jax.random.normal(jax.random.key(2 + i), parameter.shape)
    x = jax.random.normal(jax.random.key(1), (2, TIME, D_MODEL))
    return weights(mixer), np.asarray(x, np.float64), mixer(x)[0]


@pytest.mark.parametrize("init", ["lin", "inv", "real"])
@pytest.mark.parametrize(
    ("discretization", "n_ssm", "train_b"),
    [("zoh", 0, False), ("bilinear", 0, False), ("zoh", 4, False), ("zoh", 4, True), ("bilinear", 0, True)],
)
def test_s4d_is_the_recurrence_in_float64(init, discretization, n_ssm, train_b):
    settings = {"init": init, "discretization": discretization, "state_dim": 16, "n_ssm": n_ssm, "train_b": train_b}
    w, x, y = build("s4d", **settings)
    assert len(w["ssm.log_rate"]) == (n_ssm or D_MODEL)
    config = MIXERS["s4d"].config_class(**settings)
    assert sum(array.size for array in w.values()) == MIXERS["s4d"].num_parameters(config, D_MODEL)
    inner = recurrence(w, x, "ssm.", discretization, init)
    gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    assert error_ratio(y, gelu @ w["out.kernel"]) < 1e-5


def test_initial_rates_are_the_papers():
    made = {
        init: weights(DiagonalSSM(3, DiagonalSSMConfig(state_dim=8, init=init, train_b=True), rngs=nnx.Rngs(0)))
        for init in ("lin", "inv", "real")
    }
    np.testing.assert_allclose(made["lin"]["frequency"][2], np.pi * np.arange(4), rtol=1e-6)
    np.testing.assert_allclose(made["inv"]["frequency"][2], 8 / np.pi * (8 / (2 * np.arange(4) + 1) - 1), rtol=1e-6)
    np.testing.assert_allclose(np.exp(made["lin"]["log_rate"]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.exp(made["real"]["log_rate"][1]), np.arange(1, 9), rtol=1e-6)
    for w in made.values():
        assert (w["log_dt"] >= np.log(1e-3)).all() and (w["log_dt"] <= np.log(1e-1)).all()
        assert (w["b_real"] == 1).all() and ("b_imag" not in w or (w["b_imag"] == 0).all())


def test_weight_decay_is_of_the_read_outs_alone():
    layer = DiagonalSSM(4, DiagonalSSMConfig(state_dim=8, n_ssm=1, train_b=True), rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    assert {path[-1] for path, variable in flat if decays(variable)} == {"c_real", "c_imag"}


@pytest.mark.parametrize("head_dim", [1, 4])
def test_h3_is_its_two_recurrences_in_float64(head_dim):
    w, x, y = build("h3", head_dim=head_dim, shift_width=5, state_dim=8)
    heads = D_MODEL // head_dim
    q, k, v = (x @ w[f"{name}.kernel"] for name in "qkv")
    shifted, h = np.zeros_like(k), np.zeros((len(k), D_MODEL, 5))
    for t in range(TIME):
        h = np.pad(h, ((0, 0), (0, 0), (1, 0)))[..., :5] + w["shift.b"] * k[:, t, :, None]
        shifted[:, t] = (w["shift.c"] * h).sum(-1) + w["shift.D"] * k[:, t]
    split = (2, TIME, heads, head_dim)
    q, shifted, v = q.reshape(split), shifted.reshape(split), v.reshape(split)
    out = np.zeros(split)
    for i in range(head_dim):
        for j in range(head_dim):
            kv = recurrence(w, shifted[..., i] * v[..., j], "ssm.", "zoh", "lin")
            out[..., j] += q[..., i] * kv
    assert error_ratio(y, out.reshape(x.shape) @ w["out.kernel"]) < 1e-5


def test_the_shift_of_h3_starts_as_its_read_out_and_a_normal_skip():
    shift = ShiftSSM(200, 16, rngs=nnx.Rngs(0))
    taps, w = np.asarray(shift.taps()), weights(shift)
    np.testing.assert_allclose(taps, w["c"] + w["D"][:, None] * np.eye(16)[0], atol=1e-6)
    assert np.abs(w["c"]).max() <= 0.25 and 0.13 < w["c"].std() < 0.16 and 0.8 < w["D"].std() < 1.2
    flat = nnx.to_flat_state(nnx.state(shift, nnx.Param))
    assert {path[-1] for path, variable in flat if decays(variable)} == {"c"}


def test_the_8b_hybrid_has_the_papers_layers():
    config = mamba2_hybrid.get_config("8b")
    validate(config)
    model, layers = config.model, pattern(config.model)
    assert (model.num_layers, model.d_model, model.positions) == (56, 4096, "none")
    share = model.num_layers // len(layers)
    assert {name: share * layers.count(name) for name in set(layers)} == {"mamba2": 24, "attention": 4, "mlp": 28}
    abstract = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
    parameters = nnx.state(abstract, nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert count == num_parameters(model) and 8.5e9 < count < 8.8e9
    blocks = abstract.units.blocks
    attention = blocks[layers.index("attention")].mixer
    assert (attention.q.kernel.shape, attention.k.kernel.shape) == ((4, 4096, 4096), (4, 4096, 1024))
    mamba2 = blocks[0].mixer
    assert mamba2.in_xBC.kernel.shape == (4, 4096, 8192 + 2 * 8 * 128) and mamba2.A_log.shape == (4, 128)
    tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    graphdef, state = nnx.split(abstract)
    hidden, _ = jax.eval_shape(lambda state, tokens: nnx.merge(graphdef, state).hidden(tokens), state, tokens)
    assert hidden.shape == (1, 8192, 4096)


def test_settings_that_cannot_be_are_named():
    h3 = MIXERS["h3"]

    def names(problems):
        return [problem.split(":")[0] for problem in problems]

    assert names(settings.problems(h3.config_class(init="sin", discretization="euler"))) == ["init", "discretization"]
    assert names(h3.check(h3.config_class(state_dim=3, dt_min=1.0, n_ssm=5), 32)) == ["dt_min", "n_ssm", "state_dim"]
    assert names(h3.check(h3.config_class(head_dim=5), 32)) == ["head_dim"]
    assert Config().model.s4d.init == "lin"
