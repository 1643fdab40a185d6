import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from zoo.checkpoints import named_leaves
from zoo.config import ModelConfig, OptimizerConfig
from zoo.errors import UsageError
from zoo.layers import parameter
from zoo.model import LanguageModel
from zoo.training.optimizer import decays, is_matrix, make_optimizer


@pytest.fixture(scope="module")
def params():
    config = ModelConfig(mixer="gla,attention", num_layers=4, d_model=16, vocab_size=64)
    config.gla.num_heads = config.attention.num_heads = 2
    return nnx.state(jax.jit(lambda: nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))[1])(), nnx.Param)


def variables(params):
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}


def updates(params, gradient, **settings):
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0, **settings)
    optimizer = make_optimizer(config, 10, params)
    return named_leaves(jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[0])(gradient))


def random_like(params, seed=0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_decay_spares_norms_biases_and_gates(params):
    spared = {name for name, p in variables(params).items() if not decays(p)}
    assert all(("norm" in name or "bias" in name or "gate_" in name) for name in spared), spared
    assert {"norm.scale", "units.blocks.0.mixer_norm.scale", "units.blocks.0.mixer.gate_up.bias"} <= spared
    assert {"units.blocks.0.mixer.gate_down.kernel", "units.blocks.0.mixer.gate_up.kernel"} <= spared
    assert not {"embed.embedding", "units.blocks.0.mixer.q.kernel", "units.blocks.1.mlp.down.kernel"} & spared


def test_decay_is_what_moves_parameters_without_gradient(params):
    moved = updates(params, jax.tree.map(jnp.zeros_like, params), weight_decay=0.25)
    for name, p in variables(params).items():
        np.testing.assert_allclose(moved[name], -0.25 * p[...] if decays(p) else 0 * p[...], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rate_factors_scale_what_they_match_and_the_first_match_counts(params, name):
    gradient = random_like(params)
    plain = updates(params, gradient, name=name)
    scaled = updates(params, gradient, name=name, learning_rate_factors=r"mixer\.q=0,mixer=0.5,embed=2")
    for path, update in plain.items():
        factor = 0.0 if "mixer.q." in path else 0.5 if "mixer" in path else 2.0 if "embed" in path else 1.0
        np.testing.assert_allclose(scaled[path], factor * np.asarray(update), rtol=1e-6)


def test_a_factor_that_matches_nothing_names_the_parameters(params):
    with pytest.raises(UsageError, match=r"'embde' matches no parameter of .*embed\.embedding"):
        make_optimizer(OptimizerConfig(learning_rate_factors="embde=0.1"), 10, params)


def test_muon_on_the_stacked_depth_is_muon_on_each_layer(params):
    gradient = random_like(params)
    stacked = updates(params, gradient, name="muon", weight_decay=0.0, momentum=0.9)
    gradients = named_leaves(gradient)
    single = optax.contrib.scale_by_muon(beta=0.9, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(0, 1))
    matrices = [name for name, p in variables(params).items() if is_matrix(p)]
    assert {"units.blocks.0.mixer.q.kernel", "units.blocks.1.mlp.up.kernel"} <= set(matrices)
    for name in ("units.blocks.0.mixer.q.kernel", "units.blocks.1.mlp.up.kernel"):
        for layer, g in enumerate(gradients[name]):
            expected, _ = single.update(g, single.init(g))
            scale = 0.2 * max(g.shape) ** 0.5
            np.testing.assert_allclose(stacked[name][layer], -scale * expected, rtol=1e-4, atol=1e-5)


def test_muon_moves_matrices_as_far_as_adamw_does(params):
    """Root-mean-square of an update: 0.2 of the learning rate where singular values come out as 1."""
    moved = updates(params, random_like(params), name="muon", weight_decay=0.0)
    for name, p in variables(params).items():
        if is_matrix(p):
            assert 0.1 < float(jnp.sqrt(jnp.mean(moved[name] ** 2))) < 0.3, name


def test_muon_leaves_tables_norms_biases_and_gates_to_adamw(params):
    gradient = random_like(params)
    muon, adam = updates(params, gradient, name="muon"), updates(params, gradient, name="adamw")
    others = [name for name, p in variables(params).items() if not is_matrix(p)]
    assert "embed.embedding" in others and "norm.scale" in others and "units.blocks.0.mixer.gate_up.kernel" in others
    for name in others:
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-6)


def test_filters_of_a_convolution_are_no_matrices():
    make = lambda axes: parameter(jnp.ones((8, 4)), axes)  # noqa: E731
    assert is_matrix(make(("embed", "mlp")))
    assert not is_matrix(make(("mlp", None)))
    assert not is_matrix(make(("heads", "state")))
