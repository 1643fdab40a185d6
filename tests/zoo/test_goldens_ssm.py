"""Mamba and Mamba-2 against transformers' models: numbers made by tests/goldens/ssm/make.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.zoo.cases import error_ratio
from zoo.config import Config
from zoo.model import LanguageModel

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "ssm"
WIDTH, CHANNELS = 16, 32
SETTINGS = {
    "mamba": {"state_dim": 4, "dt_rank": 3},
    "mamba2": {"state_dim": 4, "head_dim": 8, "groups": 2},
}


def mamba_parameters(w):
    x, z = np.split(w("in_proj.weight").T, 2, axis=1)
    return {
        "in_x.kernel": x,
        "in_z.kernel": z,
        "select.kernel": w("x_proj.weight").T,
        "dt_up": w("dt_proj.weight").T,
        "dt_bias": w("dt_proj.bias"),
    }


def mamba2_parameters(w):
    z, xBC, dt = np.split(w("in_proj.weight").T, [CHANNELS, 2 * CHANNELS + 16], axis=1)
    return {
        "in_z.kernel": z,
        "in_xBC.kernel": xBC,
        "in_dt.kernel": dt,
        "dt_bias": w("dt_bias"),
        "norm.scale": w("norm.weight"),
    }


def parameters(name, w):
    """Of one layer's mixer, by our names; `w` gives the reference model's."""
    own = {"mamba": mamba_parameters, "mamba2": mamba2_parameters}[name](w)
    return own | {
        "conv.weight": w("conv1d.weight")[:, 0],
        "conv.bias": w("conv1d.bias"),
        "A_log": w("A_log"),
        "D": w("D"),
        "out.kernel": w("out_proj.weight").T,
    }


def load(name):
    """The golden file, and our model with its weights."""
    golden = dict(np.load(GOLDENS / f"{name}.npz"))
    config = Config().model
    config.mixer, config.mlp, config.num_layers, config.d_model = name, "none", 2, WIDTH
    config.vocab_size = len(golden["w.embeddings.weight"])
    for field, value in SETTINGS[name].items():
        setattr(getattr(config, name), field, value)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    wanted = {"embed.embedding": golden["w.embeddings.weight"], "norm.scale": golden["w.norm_f.weight"]}
    layers = [f"w.layers.{i}" for i in range(2)]
    wanted["units.blocks.0.mixer_norm.scale"] = np.stack([golden[f"{layer}.norm.weight"] for layer in layers])
    mixers = [parameters(name, lambda key, at=layer: golden[f"{at}.mixer.{key}"]) for layer in layers]
    wanted |= {f"units.blocks.0.mixer.{key}": np.stack([mixer[key] for mixer in mixers]) for key in mixers[0]}
    state = nnx.state(model, nnx.Param)
    ours = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    assert ours.keys() == wanted.keys()
    for key, variable in ours.items():
        assert variable.shape == wanted[key].shape, key
        variable[...] = jnp.asarray(wanted[key])
    nnx.update(model, state)
    return golden, model


@pytest.mark.parametrize("name", SETTINGS)
def test_hidden_states_and_gradients_are_the_reference_models(name):
    golden, model = load(name)
    graphdef, state = nnx.split(model)
    tokens, cotangent = jnp.asarray(golden["tokens"], jnp.int32), jnp.asarray(golden["cotangent"])
    hidden, pull = jax.vjp(lambda state: nnx.merge(graphdef, state).hidden(tokens)[0], state)
    assert error_ratio(hidden, golden["hidden"]) < 1e-5
    assert error_ratio(pull(cotangent)[0]["embed"]["embedding"][...], golden["embedding_gradient"]) < 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_and_decoding_end_in_the_reference_models_states(name):
    golden, model = load(name)
    tokens = jnp.asarray(golden["tokens"], jnp.int32)
    time = tokens.shape[1]
    prefill = time - golden["decoded"].shape[1]
    graphdef, variables = nnx.split(model)
    step = jax.jit(lambda tokens, state: nnx.merge(graphdef, variables).hidden(tokens, state=state))
    _, state = step(tokens[:, :prefill], model.init_state(len(tokens), time))
    decoded = []
    for t in range(prefill, time):
        hidden, state = step(tokens[:, t : t + 1], state)
        decoded.append(hidden)
    assert error_ratio(jnp.concatenate(decoded, 1), golden["decoded"]) < 1e-5
    for layer in range(2):
        ssm, conv = golden[f"ssm_state.{layer}"], golden[f"conv_state.{layer}"]
        ours = state["layers"][layer][0]["mixer"]
        assert error_ratio(ours["ssm"], ssm if name == "mamba" else ssm.swapaxes(-1, -2)) < 1e-5
        assert error_ratio(ours["conv"], conv[..., 1:].swapaxes(-1, -2)) < 1e-5
