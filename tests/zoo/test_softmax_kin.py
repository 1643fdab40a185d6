"""What reshapes or approximates softmax, by its equations in float64: blocks, windows, and places in the depth."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.zoo.cases import D_MODEL, error_ratio
from zoo.checkpoints import named_leaves
from zoo.config import preset, validate_model
from zoo.errors import UsageError
from zoo.layers import exp_features, random_features
from zoo.mixers import MIXERS, Sizes
from zoo.model import LanguageModel
from zoo.sharding import MeshConfig, make_mesh
from zoo.training.step import abstract_batch, abstract_model
from zoo.training.step import build as build_programs

BATCH, TIME = 2, 14
IDS = jnp.array([[3] * 9 + [1] * 5, [0] * 2 + [4] * 12])  # two documents a row
COUNT = np.stack([np.r_[:9, :5], np.r_[:2, :12]])  # of each token in its document


def build(family, direction="causal", **settings):
    config = dataclasses.replace(MIXERS[family].config_class(), **settings)
    assert MIXERS[family].check(config, D_MODEL) == []
    return MIXERS[family](
        config, Sizes(D_MODEL, num_layers=2, rope=False, direction=direction), layer_index=0, rngs=nnx.Rngs(0)
    )


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
    """What the mixer gives of packed rows in one call, and in calls that a state joins: two, and one a token.

    A token alone goes on with the document before it: its first ones are of a call of two.
    """
    graphdef, parameters = nnx.split(mixer)

    @jax.jit
    def call(parameters, x, ids, count, state=None):
        return nnx.merge(graphdef, parameters)(x, segment_ids=ids, positions=count, state=state, **given)

    def joined(cuts):
        state, pieces = mixer.init_state(BATCH, TIME, jnp.float32), []
        for here in itertools.starmap(slice, itertools.pairwise((0, *cuts, TIME))):
            y, state = call(parameters, x[:, here], IDS[:, here], jnp.asarray(COUNT[:, here]), state)
            pieces.append(y)
        return jnp.concatenate(pieces, 1)

    starts = {int(t) for t in np.nonzero((COUNT[:, 1:] == 0).any(0))[0] + 1}
    tokens = [t for t in range(1, TIME) if t not in starts]
    return call(parameters, x, IDS, jnp.asarray(COUNT))[0], joined([TIME // 2]), joined(tokens)


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
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    assert model.over_depth()[0].tolist() == [False, False, True]


def test_longformer_sees_a_window_with_gaps_of_its_document():
    mixer, x = build("longformer", window=3, dilation="1+2"), inputs()
    project, weights = double(mixer, x)
    q, k, v = map(project, "qkv")
    distance = np.arange(TIME)[:, None] - np.arange(TIME)
    halves = [
        softmax(q[:, :, here], k[:, :, here], v[:, :, here], seen((distance % d == 0) & (distance < 3 * d)))
        for here, d in ((slice(0, 2), 1), (slice(2, 4), 2))
    ]
    for found in whole_and_in_halves(mixer, x):
        assert error_ratio(found, np.concatenate(halves, -1) @ weights["out.kernel"]) < 1e-6


@pytest.mark.parametrize("global_tokens", [0, pytest.param(2, id="global")])
def test_longformer_sees_both_sides_and_global_tokens_see_all(global_tokens):
    settings = {"window": 3, "dilation": "1+2", "global_tokens": global_tokens}
    mixer, x = build("longformer", direction="bidirectional", **settings), inputs()
    project, weights = double(mixer, x)
    same = (np.asarray(IDS)[:, :, None] == np.asarray(IDS)[:, None])[:, None]
    distance = np.abs(np.arange(TIME)[:, None] - np.arange(TIME))
    is_global = COUNT < global_tokens
    q, k, v = map(project, "qkv")
    halves = []
    for here, d in ((slice(0, 2), 1), (slice(2, 4), 2)):
        visible = (distance % d == 0) & (distance < 3 * d) | is_global[:, None, None]
        halves.append(softmax(q[:, :, here], k[:, :, here], v[:, :, here], same & visible))
    o = np.concatenate(halves, -1)
    if global_tokens:
        o_global = softmax(*(project(f"global_{name}") for name in "qkv"), same)
        o = np.where(is_global[..., None], o_global, o)
    graphdef, parameters = nnx.split(mixer)

    @jax.jit
    def run(parameters):
        call = lambda p: nnx.merge(graphdef, p)(x, segment_ids=IDS, positions=jnp.asarray(COUNT))[0]  # noqa: E731
        y, pull = jax.vjp(call, parameters)
        return y, pull(y)[0]

    y, gradients = run(parameters)
    assert error_ratio(y, o @ weights["out.kernel"]) < 1e-6
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_global_tokens_of_causal_models_are_refused():
    config = preset("tiny").model
    config.mixer, config.longformer.global_tokens = "longformer", 1
    with pytest.raises(UsageError, match="model.longformer.global_tokens: 1 would see what follows; set it to 0, or"):
        validate_model(config)
    config.direction = "bidirectional"
    validate_model(config)


@pytest.mark.parametrize("settings", [{}, {"direction": "bidirectional", "global_tokens": 2}], ids=["causal", "global"])
def test_longformer_is_linear_in_time(settings):
    """No array of its program, forward and backward, has more entries a token at twice the length."""
    graphdef, parameters = nnx.split(build("longformer", window=300, dilation="1+3", **settings))

    def largest(time):
        x, ids = jnp.zeros((1, time, D_MODEL)), jnp.zeros((1, time), jnp.int32)
        run = lambda p, x: nnx.merge(graphdef, p)(x, segment_ids=ids)[0].sum()  # noqa: E731
        return max(entries(jax.make_jaxpr(jax.grad(run, (0, 1)))(parameters, x).jaxpr))

    def entries(jaxpr):
        yield from (variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars)
        for inner in inner_jaxprs(jaxpr):
            yield from entries(inner)

    assert largest(32768) <= min(2 * largest(16384), 4 * 32768 * D_MODEL)


def inner_jaxprs(jaxpr):
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield value


@pytest.mark.parametrize("kernel", ["exp", pytest.param("relu", marks=pytest.mark.slow)])
def test_performer_is_linear_attention_of_its_random_features(kernel):
    mixer, x = build("performer", kernel=kernel, features=20), inputs()
    project, weights = double(mixer, x)
    q, k, v = map(project, "qkv")
    w = np.asarray(random_features.draw(0, 0, jnp.arange(1), 20, q.shape[-1])[0], np.float64)

    def phi(x):
        x = x / x.shape[-1] ** 0.25
        if kernel == "relu":
            return np.maximum(x @ w.T, 0) + 1e-3
        return np.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2)

    scores = np.einsum("bthk,bshk->bhts", phi(q), phi(k)) * seen(True)
    o = np.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
    for found in whole_and_in_halves(mixer, x):
        assert error_ratio(found, o @ weights["out.kernel"]) < 2e-6


def test_random_features_are_orthogonal_and_known_from_seed_draw_and_layer():
    one = random_features.draw(3, 2, jnp.arange(2), 20, 8)
    assert one.shape == (2, 20, 8)
    gram = np.einsum("nik,njk->nij", one[:, :16], one[:, :16])
    for block in (gram[:, :8, :8], gram[:, 8:, 8:]):
        np.testing.assert_allclose(block * (1 - np.eye(8)), 0, atol=1e-5)
    lengths = np.linalg.norm(random_features.draw(0, 0, jnp.arange(64), 16, 8), axis=-1)
    assert np.mean(lengths**2) == pytest.approx(8, rel=0.05)  # of Gaussian vectors
    others = [random_features.draw(3, 2, jnp.arange(1, 2), 20, 8)[0], *random_features.draw(3, 1, jnp.arange(2), 20, 8)]
    np.testing.assert_array_equal(others[0], one[1])
    assert min(np.abs(a - b).max() for a in others[1:] for b in one) > 0.1


def test_the_error_of_random_features_falls_with_the_root_of_their_number():
    """Held to softmax attention, on Gaussian q, k and v. The error grows with exp(|q + k|^2 / sqrt(K)): at the length
    of unit Gaussians thousands of features are not many yet, and its slope is -0.18."""
    q, k, v = (np.asarray(x) for x in jax.random.normal(jax.random.key(0), (3, 64, 16)))
    q, k = q / 2, k / 2
    exact = np.exp(q @ k.T / 4)
    exact = exact / exact.sum(-1, keepdims=True) @ v
    of_queries, of_keys = (
        jnp.stack(
            [exp_features(x, w, of_queries=of_queries) for w in random_features.draw(0, 0, jnp.arange(3), 2048, 16)]
        )
        for x, of_queries in ((q, True), (k, False))
    )
    numbers, errors = [32, 128, 512, 2048], []
    for features in numbers:  # the first of a draw are a draw
        scores = np.einsum("nti,nsi->nts", of_queries[..., :features], of_keys[..., :features])
        found = scores @ v / scores.sum(-1, keepdims=True)
        errors.append(np.mean([error_ratio(x, exact) for x in found]))
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1), errors


def test_training_draws_features_anew_by_its_step_alone(monkeypatch):
    config = preset("tiny")
    config.optimizer.name, model = "adamw", config.model
    model.mixer, model.num_layers, model.d_model, model.vocab_size = "performer,performer@features=8", 4, 16, 64
    model.performer.redraw_every, model.performer.features = 10, 12
    made = abstract_model(config)
    drawn = lambda step: made.over_depth(None if step is None else jnp.asarray(step))  # noqa: E731
    first, other = drawn(None)
    assert first.shape == other.shape == (2, 12, 4) and not np.array_equal(first[0], first[1])
    assert not np.any(other[:, 8:]) and np.all(other[:, :8])  # of fewer features
    for step, same in ((0, True), (9, True), (10, False), (19, False)):
        assert np.allclose(drawn(step)[0], first, atol=1e-6) == same, step
    np.testing.assert_array_equal(drawn(10)[0], drawn(19)[0])

    steps, over_depth = [], MIXERS["performer"].over_depth
    watched = lambda *given: (steps.append(given[-1]), over_depth(*given))[1]  # noqa: E731
    monkeypatch.setattr(MIXERS["performer"], "over_depth", staticmethod(watched))
    programs = build_programs(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    jax.eval_shape(programs.train, programs.abstract_state, abstract_batch(config))
    assert steps and all(step is not None for step in steps)


@pytest.mark.parametrize("attention", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_conv_linear_is_two_dilated_convolutions_before_linear_attention(attention):
    mixer, x = build("conv_linear", conv_width=3, dilation=2, attention=attention), inputs()
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
    if not attention:
        for found in whole_and_in_halves(mixer, x):
            assert error_ratio(found, u @ weights["out.kernel"]) < 1e-6
        return
    q, k, v = ((u @ weights[f"attention.{name}.kernel"]).reshape(BATCH, TIME, mixer.heads, -1) for name in "qkv")
    phi = lambda x: np.where(x > 0, x + 1, np.exp(x))  # noqa: E731
    scores = np.einsum("bthk,bshk->bhts", phi(q), phi(k)) * seen(True)
    o = np.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
    for found in whole_and_in_halves(mixer, x):
        assert error_ratio(found, o @ weights["attention.out.kernel"]) < 1e-6
