"""What every family can be set to (biases, the norms' epsilon), and the forms of blocks and of rotary positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.zoo.cases import D_MODEL, error_ratio
from zoo.config import Config
from zoo.layers import RopeScaling, linear, rotary
from zoo.mixers import MIXERS, Sizes
from zoo.mixers.shared_settings import add_bias, projections
from zoo.model import LanguageModel


def build(family, sizes=None, **settings):
    config = dataclasses.replace(getattr(Config().model, family), **settings)
    assert MIXERS[family].check(config, D_MODEL) == []
    sizes = sizes or Sizes(d_model=D_MODEL, direction=MIXERS[family].directions[0])
    return config, MIXERS[family](config, sizes, layer_index=0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("family", MIXERS)
def test_every_projection_can_have_a_bias_which_counts(family):
    found = {}

    def make():
        names = list(projections(build(family)[1]))
        config, mixer = build(family, biases=",".join(names))
        found["count"] = MIXERS[family].num_parameters(config, D_MODEL)
        found["without"] = list(projections(mixer))
        return nnx.state(mixer, nnx.Param)

    counted = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make)))
    assert counted == found["count"] and found["without"] == []


def test_a_bias_is_added_where_it_is_named():
    _, mixer = build("attention", biases="q,out")
    assert sorted(projections(mixer)) == ["k", "v"]
    x = jax.random.normal(jax.random.key(0), (1, 5, D_MODEL))
    before, _ = mixer(x)
    bias = jnp.arange(D_MODEL, dtype=jnp.float32)
    mixer.out.bias[...] = bias
    np.testing.assert_allclose(mixer(x)[0], before + bias, rtol=1e-5, atol=1e-5)
    layer = linear(3, 2, ("embed", "heads"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    add_bias(layer)
    assert layer.bias.get_metadata("out_sharding") == ("heads",) and layer.bias.get_metadata("decay") is False


def test_a_mixers_epsilon_is_that_of_its_norms():
    x = jax.random.normal(jax.random.key(0), (1, 5, D_MODEL))
    model_wide = build("retnet", Sizes(d_model=D_MODEL, norm_epsilon=0.5))[1](x)[0]
    own = build("retnet", norm_epsilon=0.5)[1](x)[0]
    np.testing.assert_array_equal(own, model_wide)
    assert error_ratio(build("retnet")[1](x)[0], own) > 0.1


def model_of(**settings):
    config = Config().model
    for name, value in ({"num_layers": 1, "d_model": 16, "vocab_size": 32, "mixer": "gla"} | settings).items():
        setattr(config, name, value)
    return LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("position", ["after", "both"])
def test_norms_stand_where_norm_position_says(position):
    model = model_of(norm="layer_norm", norm_position=position, embedding_norm=True, mlp_bias=True, mlp="squared_relu")
    rng = np.random.default_rng(0)
    for parameter in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        parameter[...] = parameter[...] + jnp.asarray(rng.normal(size=parameter.shape) * 0.1, jnp.float32)
    graphdef, state = nnx.split(model.units)
    block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state)).blocks[0]
    tokens = jnp.arange(6)[None]

    def normed(norm, x):
        x = np.asarray(x, np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])

    def mlp(x):
        inner = np.maximum(x @ np.asarray(block.mlp.up.kernel[...]) + np.asarray(block.mlp.up.bias[...]), 0) ** 2
        return inner @ np.asarray(block.mlp.down.kernel[...]) + np.asarray(block.mlp.down.bias[...])

    x = normed(model.embed_norm, model.embed.embedding[...][tokens])
    before = position == "both"
    mix = jax.jit(lambda x: block.mixer(x)[0])
    mixed = mix(jnp.asarray(normed(block.mixer_norm, x) if before else x, jnp.float32))
    x = x + normed(block.mixer_post_norm, mixed)
    x = x + normed(block.mlp_post_norm, mlp(normed(block.mlp_norm, x) if before else x))
    assert error_ratio(jax.jit(lambda tokens: model.hidden(tokens)[0])(tokens), normed(model.norm, x)) < 1e-5


def test_a_part_of_a_head_turns():
    x, positions = jax.random.normal(jax.random.key(0), (1, 7, 2, 8)), jnp.arange(7)[None]
    turned = rotary(x, positions, width=4)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(turned[..., :4], rotary(x[..., :4], positions), rtol=1e-6)


# transformers 5.24, ROPE_INIT_FUNCTIONS of a Llama with heads of 16: settings, base, frequencies, factor.
SCALED = [
    (
        {"kind": "linear", "factor": 4.0},
        1e4,
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
    (
        {"kind": "llama3", "factor": 8.0, "original_context": 64},
        5e5,
        [1.0, 0.07940301, 0.004700754, 0.0009115831, 0.0001767767, 3.428102e-05, 6.64787e-06, 1.289173e-06],
        1.0,
    ),
    (
        {"kind": "yarn", "factor": 4.0, "original_context": 64},
        1e4,
        [1.0, 0.2371708, 0.05, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.138629436111989,
    ),
    (
        {
            "kind": "yarn",
            "factor": 16.0,
            "original_context": 32,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
            "truncate": False,
        },
        1e3,
        [1.0, 0.05648829, 0.01111425, 0.004686838, 0.001976424, 0.0008334509, 0.0003514633, 0.0001482109],
        1.5,
    ),
]


@pytest.mark.parametrize("settings, base, frequencies, factor", SCALED)
def test_scaled_frequencies_are_those_of_transformers(settings, base, frequencies, factor):
    scaling = RopeScaling(**settings)
    assert scaling.check() == []
    found, found_factor = scaling.frequencies(16, base)
    np.testing.assert_allclose(found, frequencies, rtol=2e-6)
    assert found_factor == pytest.approx(factor, rel=1e-12)
    x, positions = jax.random.normal(jax.random.key(0), (1, 3, 1, 16)), jnp.asarray([[0, 70, 5000]])
    angle = np.asarray(positions, np.float64)[0, :, None] * np.asarray(found, np.float64)
    turned = np.asarray(rotary(x, positions, base, scaling=scaling))[0, :, 0]
    pairs = np.asarray(x, np.float64)[0, :, 0]
    expected = pairs[:, :8] * np.cos(angle) - pairs[:, 8:] * np.sin(angle)
    np.testing.assert_allclose(turned[:, :8], factor * expected, atol=2e-3)
