"""What reshapes or approximates softmax, by its equations in float64: blocks, windows, and places in the depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.zoo.cases import D_MODEL, error_ratio
from zoo.checkpoints import named_leaves
from zoo.config import preset
from zoo.mixers import MIXERS, Sizes
from zoo.model import LanguageModel

BATCH, TIME = 2, 14
IDS = jnp.array([[3] * 9 + [1] * 5, [0] * 2 + [4] * 12])  # two documents a row
COUNT = np.stack([np.r_[:9, :5], np.r_[:2, :12]])  # of each token in its document


def build(family, **settings):
    config = dataclasses.replace(MIXERS[family].config_class(), **settings)
    assert MIXERS[family].check(config, D_MODEL) == []
    return MIXERS[family](config, Sizes(D_MODEL, num_layers=2, rope=False), layer_index=0, rngs=nnx.Rngs(0))


def inputs():
    return jax.random.normal(jax.random.key(0), (BATCH, TIME, D_MODEL))


def double(mixer, x):
    """(what a projection gives, per head; all parameters), in float64."""
    x = np.asarray(x, np.float64)
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(nnx.state(mixer)).items()}
    return lambda name: (x @ weights[f"{name}.kernel"]).reshape(*x.shape[:2], mixer.heads, -1), weights


def seen(visible):
    """Keys that each query sees, [B, 1, T, T], of those not after it in its document."""
    same = np.asarray(IDS)[:, :, None] == np.asarray(IDS)[:, None]
    return (same & np.tri(TIME, dtype=bool) & visible)[:, None]


def softmax(q, k, v, visible):
    logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(visible, logits, -np.inf))
    o = np.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), v)
    return o.reshape(BATCH, TIME, -1)


def whole_and_in_halves(mixer, x, **given):
    """What the mixer gives of packed rows in one call, and in two that a state joins."""
    graphdef, parameters = nnx.split(mixer)

    @jax.jit
    def call(parameters, x, ids, count, state=None):
        return nnx.merge(graphdef, parameters)(x, segment_ids=ids, positions=count, state=state, **given)

    state, halves = mixer.init_state(BATCH, TIME, jnp.float32), []
    for here in (slice(0, TIME // 2), slice(TIME // 2, TIME)):
        y, state = call(parameters, x[:, here], IDS[:, here], jnp.asarray(COUNT[:, here]), state)
        halves.append(y)
    return call(parameters, x, IDS, jnp.asarray(COUNT))[0], jnp.concatenate(halves, 1)


def test_attention_in_blocks_is_softmax_within_a_documents_blocks():
    mixer, x = build("transnormer", block=4), inputs()
    project, weights = double(mixer, x)
    block = COUNT // 4
    o = softmax(*map(project, "qkv"), seen(block[:, :, None] == block[:, None]))
    for found in whole_and_in_halves(mixer, x, depth=False):
        assert error_ratio(found, o @ weights["out.kernel"]) < 1e-6


def test_norm_attention_is_a_normed_sum_without_a_denominator():
    mixer, x = build("transnormer"), inputs()
    project, weights = double(mixer, x)
    q, k, v = map(project, "qkv")
    phi = lambda x: np.where(x > 0, x + 1, np.exp(x))  # noqa: E731
    scores = np.einsum("bthk,bshk->bhts", phi(q), phi(k)) * seen(True) / np.sqrt(q.shape[-1])
    o = np.einsum("bhts,bshv->bthv", scores, v).reshape(x.shape)
    o /= np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5)
    for found in whole_and_in_halves(mixer, x, depth=True):
        assert error_ratio(found, o @ weights["out.kernel"]) < 1e-6


def test_the_upper_half_of_transnormer_has_norm_attention():
    config = preset("tiny").model
    config.mixer, config.num_layers, config.d_model, config.vocab_size = "transnormer,mlp", 6, 16, 8
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    assert model._over_depth()[0].tolist() == [False, False, True]


def test_conv_linear_is_two_dilated_convolutions_before_linear_attention():
    mixer, x = build("conv_linear", conv_width=3, dilation=2), inputs()
    weights = double(mixer, x)[1]

    def conv(x, name):
        taps = np.split(weights[f"{name}.taps.kernel"], 3)
        y = np.broadcast_to(weights[f"{name}.taps.bias"], x.shape).copy()
        for j, tap in enumerate(taps):
            at = np.arange(TIME) - 2 * j
            y += np.where((COUNT >= 2 * j)[..., None], x[:, at], 0) @ tap
        return np.maximum(y, 0)

    u = np.asarray(x, np.float64)
    u = np.maximum(u + conv(conv(u, "first"), "second"), 0)
    q, k, v = ((u @ weights[f"attention.{name}.kernel"]).reshape(BATCH, TIME, mixer.heads, -1) for name in "qkv")
    phi = lambda x: np.where(x > 0, x + 1, np.exp(x))  # noqa: E731
    scores = np.einsum("bthk,bshk->bhts", phi(q), phi(k)) * seen(True)
    o = np.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
    for found in whole_and_in_halves(mixer, x):
        assert error_ratio(found, o @ weights["attention.out.kernel"]) < 1e-6
