"""Scores by shared prefixes against the model's own logits, one query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.config import preset
from zoo.evaluate.harness import prefixes
from zoo.evaluate.harness.prefixes import BLOCK, Costs, Query, score
from zoo.mixers import CAUSAL_MIXERS
from zoo.model import LanguageModel

VOCAB = 40
QUICK = "gla,attention"


def build(mixer, **settings):
    config = preset("tiny").model
    config.mixer, config.num_layers, config.d_model, config.vocab_size, config.d_ff = mixer, 2, 16, VOCAB, 16
    config.mamba2.head_dim = 8
    for name, value in settings.items():
        setattr(config, name, value)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= 30.0  # far from uniform
    return model


def draw(length, seed):
    return np.random.default_rng(seed).integers(VOCAB, size=length).tolist()


def queries():
    """Questions of 50 and of 60 tokens, three behind examples that they share; of each the answers; and a text."""
    examples = draw(2 * BLOCK + 3, 0)
    contexts = [examples + draw(50 - len(examples), seed) for seed in (1, 2, 3)] + [draw(60, 4)]
    answers = [[5], [6], [7, 8, 9, 10], [7, 8, 9, 11]]
    return [Query(context, answer) for context in contexts for answer in answers] + [Query([3], draw(50, 5))]


def direct(model, query):
    graphdef, parameters = nnx.split(model)
    logits = _logits(graphdef, parameters, jnp.asarray([[*query.context, *query.continuation[:-1]]]))[0]
    logits = np.asarray(logits, np.float64)[-len(query.continuation) :]
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    places = np.arange(len(logits)), np.asarray(query.continuation)
    return log_p[places].sum(), bool((logits.argmax(-1) == places[1]).all())


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, parameters, tokens):
    return nnx.merge(graphdef, parameters)(tokens)[0]


@pytest.mark.parametrize("mixer", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL_MIXERS)])
def test_scores_are_those_of_each_query_alone(mixer):
    model = build(mixer)
    asked = queries()
    wanted = [direct(model, query) for query in asked]
    tolerance = 1e-5 * max(abs(nats) for nats, _ in wanted)
    ways = [(True, True), (False, True)] if mixer == QUICK else [(s, p) for s in (True, False) for p in (True, False)]
    for share, pack in ways:
        found = score(model, asked, share=share, pack=pack)
        np.testing.assert_allclose([s.log_likelihood for s in found], [nats for nats, _ in wanted], atol=tolerance)
        assert [s.is_greedy for s in found] == [greedy for _, greedy in wanted]


def test_the_likeliest_continuation_is_greedy():
    model = build(QUICK)
    context = draw(50, 1)
    graphdef, parameters = nnx.split(model)
    likeliest = int(_logits(graphdef, parameters, jnp.asarray([context]))[0, -1].argmax())
    found = score(model, [Query(context, [token]) for token in range(VOCAB)])
    assert [i for i, s in enumerate(found) if s.is_greedy] == [likeliest]
    assert np.exp([s.log_likelihood for s in found]).sum() == pytest.approx(1, abs=1e-5)


def test_what_is_shared_is_read_once():
    """32 of 35 tokens of examples; 16 of each question's 15 to 18 others, and of 60 tokens 48."""
    asked = queries()
    pieces, leaves = prefixes._tree(
        [[*q.context, *q.continuation[:-1]] for q in asked], [len(q.context) - 1 for q in asked], [*range(17)], 0, 4
    )
    assert sorted(len(piece.tokens) for piece in pieces) == [32, 48]
    assert [len(piece.tokens) for piece in pieces[0].pieces] == [16, 16, 16]
    # Of four answers two are one token, and two differ in the last: four queries, two readings.
    assert [[leaf.queries for leaf in piece.leaves] for piece in pieces[0].pieces][0] == [[0, 1], [2, 3]]
    assert [leaf.queries for leaf in leaves] == [[16]]
    costs = Costs()
    score(build(QUICK), asked, costs=costs)
    assert costs.tokens == 3 * (2 * 50 + 2 * 53) + 2 * 60 + 2 * 63 + 50
    assert costs.read == 32 + 3 * (16 + 2 + 5) + 48 + 12 + 15 + 50
    assert "(75.3% not read again" in str(costs) and costs.states == 3 + 8 and costs.state_bytes > 0


def test_many_alike_and_learned_positions():
    """More queries than rows of a call, and a table of positions that padding would run over."""
    model = build("attention", positions="learned", max_positions=41)
    asked = [Query(draw(20, 0) + draw(20, seed), [seed % VOCAB]) for seed in range(40)]
    found = score(model, asked)
    wanted = [direct(model, query)[0] for query in asked[::8]]
    np.testing.assert_allclose([s.log_likelihood for s in found][::8], wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.isfinite([s.log_likelihood for s in found]).all()


def test_nothing_to_read_or_to_score_is_an_error():
    for query in (Query([], [1]), Query([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            score(build("gla"), [query])
