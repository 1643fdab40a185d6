"""What sees both ways by itself is its equation, in float64, of two documents a row; what runs twice is two mixers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.zoo.cases import D_MODEL, error_ratio
from zoo.checkpoints import named_leaves
from zoo.config import Config, validate
from zoo.errors import UsageError
from zoo.layers import rotary
from zoo.mixers import BIDIRECTIONAL, MIXERS, Sizes, make_mixer

BATCH, TIME = 2, 14
IDS = np.array([[3] * 9 + [1] * 5, [0] * 2 + [4] * 12])
COUNT = np.stack([np.r_[:9, :5], np.r_[:2, :12]])  # of each token in its document
DOCUMENTS = [(row, np.flatnonzero(ids == i)) for row, ids in enumerate(IDS) for i in np.unique(ids)]


def made(family, **settings):
    """(output, each document's input in float64, weights in float64) of a mixer."""
    config = MIXERS[family].config_class(**settings)
    assert MIXERS[family].check(config, D_MODEL) == []
    sizes = Sizes(D_MODEL, rope=family == "rala", direction=BIDIRECTIONAL)
    mixer = make_mixer(MIXERS[family], config, sizes, layer_index=0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (BATCH, TIME, D_MODEL))
    y, _ = jax.jit(lambda x: mixer(x, segment_ids=jnp.asarray(IDS), positions=jnp.asarray(COUNT)))(x)
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(nnx.state(mixer)).items()}
    return np.asarray(y), np.asarray(x, np.float64), weights


def phi(z):
    return np.where(z > 0, z + 1, np.exp(np.minimum(z, 0)))


def softmax(z):
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("family", ["attention", "linear_attention"])
def test_no_mask_and_whole_sums(family):
    y, x, w = made(family, **({"window": 3} if family == "attention" else {}))
    expected = np.zeros_like(x)
    for row, here in DOCUMENTS:
        q, k, v = ((x[row, here] @ w[f"{name}.kernel"]).reshape(len(here), 4, -1) for name in "qkv")
        if family == "attention":
            logits = np.einsum("thk,shk->hts", q, k) / np.sqrt(D_MODEL // 4)
            p = softmax(np.where(np.abs(here[:, None] - here) < 3, logits, -np.inf))
        else:
            p = np.einsum("thk,shk->hts", phi(q), phi(k))
            p /= p.sum(-1, keepdims=True)
        expected[row, here] = np.einsum("hts,shv->thv", p, v).reshape(len(here), -1) @ w["out.kernel"]
    assert error_ratio(y, expected) < 1e-5


@pytest.mark.slow
def test_a_mixer_run_twice_is_two_mixers_one_in_reversed_time():
    gla, x = MIXERS["gla"], jax.random.normal(jax.random.key(0), (BATCH, TIME, D_MODEL))
    sizes = Sizes(D_MODEL, direction=BIDIRECTIONAL)
    mixer = make_mixer(gla, gla.config_class(), sizes, layer_index=0, rngs=nnx.Rngs(0))
    ids = jnp.asarray(IDS)
    backward = mixer.backward(x[:, ::-1], segment_ids=ids[:, ::-1])[0][:, ::-1]
    assert error_ratio(mixer(x, segment_ids=ids)[0], mixer.forward(x, segment_ids=ids)[0] + backward) < 1e-6


@pytest.mark.parametrize("sharing", ["heads", pytest.param("none", marks=slow), pytest.param("key_value", marks=slow)])
def test_linformer_is_its_equation(sharing):
    y, x, w = made("linformer", length=12, mixtures=5, sharing=sharing)
    expected = np.zeros_like(x)
    for row, here in DOCUMENTS:
        q, k, v = ((x[row, here] @ w[f"{name}.kernel"]).reshape(len(here), 4, -1) for name in "qkv")
        E = np.broadcast_to(w["of_keys"][: len(here)], (len(here), 4, 5))  # the first rows, however short it is
        F = E if sharing == "key_value" else np.broadcast_to(w["of_values"][: len(here)], (len(here), 4, 5))
        keys, values = np.einsum("shj,shk->jhk", E, k), np.einsum("shj,shv->jhv", F, v)
        p = softmax(np.einsum("thk,jhk->thj", q, keys) / np.sqrt(D_MODEL // 4))
        expected[row, here] = np.einsum("thj,jhv->thv", p, values).reshape(len(here), -1) @ w["out.kernel"]
    assert error_ratio(y, expected) < 1e-5


def test_rala_is_its_equation():
    y, x, w = made("rala", num_heads=4)
    expected = np.zeros_like(x)

    def turn(z):
        return np.asarray(rotary(jnp.asarray(z)[None], jnp.arange(len(z))[None])[0])

    for row, here in DOCUMENTS:
        n, of_x = len(here), x[row, here]
        q, k, v = ((of_x @ w[f"{name}.kernel"]).reshape(n, 4, -1) for name in "qkv")
        q, k = phi(q), phi(k)
        a = n * softmax(np.einsum("hk,shk->hs", q.mean(0), k) / np.sqrt(D_MODEL // 4)).T
        k = a[..., None] * k
        read = np.einsum("thk,shk,shv->thv", turn(q), turn(k), v) / n
        read /= np.einsum("thk,hk->th", q, k.mean(0))[..., None] + 1e-6
        padded = np.pad(v.reshape(n, -1), ((2, 2), (0, 0)))
        near = sum(padded[i : i + n] * w["conv"][:, i] for i in range(5)) + w["conv_bias"]
        expected[row, here] = ((read.reshape(n, -1) + near) * (of_x @ w["gate.kernel"])) @ w["out.kernel"]
    assert error_ratio(y, expected) < 1e-5


@pytest.mark.slow
def test_a_document_beyond_linformers_table_is_not_a_number():
    y, _, _ = made("linformer", length=8, mixtures=4)  # of documents of 9, 5, 2 and 12 tokens
    assert all(np.isnan(y[row, here]).all() for row, here in DOCUMENTS if len(here) > 8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"direction": "causal"}, "linformer is bidirectional by its nature, and model.direction is causal"),
        ({"length": 100}, "model.linformer.length: 100 is shorter than train.context_length = 256; make it at least"),
    ],
)
def test_linformer_of_another_kind_is_refused(settings, message):
    config = Config()
    config.model.mixer, config.model.direction, config.train.objective = "linformer", "bidirectional", "masked_tokens"
    config.model.direction = settings.get("direction", config.model.direction)
    config.model.linformer.length = settings.get("length", 2048)
    with pytest.raises(UsageError, match=message):
        validate(config)
