"""A series rolled forward from a state is what the model predicts window by window, and what cannot be is refused."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from zoo import config as zoo_config
from zoo.errors import UsageError
from zoo.generate import forecast
from zoo.model import LanguageModel


def small(mixer="gla", **settings):
    size = {"mixer": mixer, "num_layers": 1, "d_model": 16, "d_ff": 8, "head": "values", "channels": 2}
    config = dataclasses.replace(zoo_config.ModelConfig(), **size | {"patch": 2, "horizon": 5} | settings)
    return LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mixer", ["gla", pytest.param("attention,mamba", marks=pytest.mark.slow)])
def test_a_series_rolled_forward_is_predicted_window_by_window(mixer):
    """Of each horizon of 5 two patches of 2 are read on: the last block alone is whole."""
    model = small(mixer, num_layers=len(mixer.split(",")))
    values = np.random.default_rng(0).normal(size=(2, 8, 2)).astype(np.float32)
    found = forecast(model, values, 11)
    assert found.shape == (2, 11, 2)
    predict = nnx.jit(lambda model, batch: model.predict(batch))
    for first, steps in ((0, 4), (4, 4), (8, 3)):
        window = np.concatenate([values, found[:, :first], np.zeros((2, 5, 2), np.float32)], axis=1)
        expected = np.asarray(predict(model, {"values": window}))[:, :steps]
        np.testing.assert_allclose(found[:, first : first + steps], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, given, message",
    [
        ({"direction": "bidirectional"}, (8, 5), "bidirectional: there is no state to go on from"),
        ({}, (7, 5), "input: 7 steps are no number of whole patches of 2"),
        ({"patch": 8}, (8, 6), "predicts 5 steps at once and reads patches of 8, .* use at most 5"),
        (
            {"positions": "learned", "max_positions": 6},
            (8, 10),
            "10 steps need 8 positions, and the model has learned 6; use at most 9",
        ),
        ({"head": "tokens", "channels": 0, "patch": 1, "vocab_size": 8}, (8, 5), "model.head=tokens: the model"),
    ],
)
def test_what_cannot_be_rolled_forward_is_refused(settings, given, message):
    length, steps = given
    model = nnx.eval_shape(lambda: small(**settings))
    with pytest.raises(UsageError, match=message):
        forecast(model, np.zeros((1, length, 2), np.float32), steps)
