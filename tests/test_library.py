"""The package in a plain Python session: nothing is set, no mesh, no context manager."""

import copy
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from zoo.config import ModelConfig
from zoo.errors import UsageError
from zoo.mixers import MIXERS, Sizes
from zoo.model import LanguageModel

TOKENS = jnp.arange(8).reshape(2, 4)


class Own(nnx.Module):
    """Somebody's own layer around a mixer."""

    def __init__(self, mixer: str, *, rngs: nnx.Rngs):
        family = MIXERS[mixer]
        sizes = Sizes(d_model=32, direction=family.directions[0])
        self.mix = family(family.config_class(), sizes, layer_index=0, rngs=rngs)
        self.out = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.mix(x)[0])


# Parameters made in each of the ways that there are; the other families are with the slow tests.
QUICK = ("attention", "gla", "mamba", "performer", "rwkv7")


@pytest.mark.parametrize("mixer", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MIXERS])
def test_a_mixer_is_a_layer_of_ones_own_module(mixer):
    assert nnx.using_eager_sharding()  # Flax's default, under which parameters with axes of their own need a mesh
    model = nnx.eval_shape(lambda: Own(mixer, rngs=nnx.Rngs(0)))
    optimizer = nnx.eval_shape(lambda model: nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param), model)

    def step(model, optimizer, x):
        loss, gradient = nnx.value_and_grad(lambda model: model(x).mean())(model)
        optimizer.update(model, gradient)
        return loss

    assert nnx.eval_shape(step, model, optimizer, jax.ShapeDtypeStruct((2, 5, 32), jnp.float32)).shape == ()


def test_a_model_is_made_trained_and_copied():
    config = ModelConfig(mixer="retnet", num_layers=1, d_model=16, vocab_size=64, mlp="none")
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    logits = nnx.jit(lambda model: model(TOKENS)[0])

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: m.token_losses(TOKENS, TOKENS, jnp.ones((2, 4))).mean())(model)
        optimizer.update(model, gradient)
        return loss

    before = logits(model)
    graphdef, state = nnx.split(model)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(state))
    assert step(model, optimizer) > step(model, optimizer)
    assert (logits(model) != before).any()
    for other in (*copies[:2], nnx.merge(graphdef, copies[2])):
        assert (logits(other) == before).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size: .* the number of token ids"),
        ({"mixer": "glaa"}, "model.mixer: unknown mixer 'glaa'; known, nearest first: gla"),
        ({"num_layers": 4, "mixer": "gla,gla,attention"}, "model.num_layers: 4 layers are no multiple of the 3"),
        ({"d_model": 30}, "model.gla.num_heads: 4 heads do not divide"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        LanguageModel(ModelConfig(**{"vocab_size": 64} | settings), rngs=nnx.Rngs(0))
