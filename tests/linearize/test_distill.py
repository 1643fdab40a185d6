"""What a model learns from a teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.linearize.test_transfer import model_config
from zoo.errors import UsageError
from zoo.linearize.distill import divergence, mixer_errors, trainable_names
from zoo.linearize.transfer import walk
from zoo.model import LanguageModel


def test_the_divergence_is_kullback_and_leibler_s():
    rng = np.random.default_rng(0)
    own, theirs = rng.normal(size=(2, 1, 3, 5)).astype(np.float32)
    p, q = (np.exp(z / 2) / np.exp(z / 2).sum(-1, keepdims=True) for z in (theirs, own))
    np.testing.assert_allclose(divergence(own, theirs, 2.0), (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(divergence(own, own, 2.0), 0)


def test_mixers_are_held_against_the_teacher_s_on_its_own_inputs():
    """A window as long as the row changes nothing, so that the error is that of what is changed in one layer."""
    of_teacher, of_model = model_config("attention"), model_config("attention@window=99,attention,attention")
    teacher, model = (LanguageModel(config, rngs=nnx.Rngs(0)) for config in (of_teacher, of_model))
    for place, block in enumerate(model.units.blocks):  # layers of place p are p and p + 3
        theirs = nnx.state(teacher.units.blocks[0], nnx.Param)
        nnx.update(block, jax.tree.map(lambda x, place=place: x[place::3], theirs))
    replaced = [layers for layers in walk(1, 3) if layers.place == 0]
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    segment_ids = jnp.asarray([[1] * 5 + [2] * 7])
    out = model.units.blocks[0].mixer.out.kernel
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def errors(params):
        student = nnx.merge(graphdef, params)
        return mixer_errors(student, teacher, replaced, tokens, segment_ids=segment_ids)

    np.testing.assert_allclose(errors(params), 0, atol=1e-9)
    # Twice the output of layer 3, one of two that are replaced; then of layer 0, from which nothing passes on to 3.
    for scale in ([1.0, 2.0], [2.0, 1.0]):
        with_scale = jnp.asarray(scale)[:, None, None] * out[...]
        changed = nnx.state(nnx.merge(graphdef, params), nnx.Param)
        changed["units"]["blocks"][0]["mixer"]["out"]["kernel"] = out.replace(with_scale)
        np.testing.assert_allclose(errors(changed), 0.5, rtol=1e-3)


def test_parameters_that_train_are_found_by_a_regex():
    model = nnx.eval_shape(lambda: LanguageModel(model_config("gla,attention"), rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    found = trainable_names(r"blocks\.0\.mixer", params)
    assert "units.blocks.0.mixer.q.kernel" in found and all(".0.mixer" in name for name in found)
    with pytest.raises(UsageError, match="optimizer.trainable: 'nothing' matches no parameter of embed.embedding"):
        trainable_names("nothing", params)
