"""Tokens are drawn by the law, and by a row's own key, logits and settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.generate import Sampling, sample
from zoo.generate.sampling import draw, penalise, plan, rows


def law(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities that the settings mean, token by token (no ties in `logits`)."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    weights = {i: np.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = sum(weights.values())
    kept, held = {}, 0.0
    for i in order:
        if kept and held >= top_p:
            break
        kept[i] = weights[i]
        held += weights[i] / total
    kept = {i: weight for i, weight in kept.items() if weight >= min_p}  # the likeliest's weight is 1
    return np.array([kept.get(i, 0.0) for i in range(len(logits))]) / sum(kept.values())


def draws(logits, count, **settings):
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(jax.jit(functools.partial(sample, sampling=Sampling(**settings)))(rows, keys))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_k": 5, "min_p": 0.5},
    ],
    ids=str,
)
def test_tokens_are_drawn_by_the_law(settings):
    logits, count = np.array([0.3, 2.0, -1.0, 1.2, 0.9, -3.0, 1.9]), 20_000
    expected = law(logits, **settings)
    frequency = np.bincount(draws(logits, count, **settings), minlength=len(logits)) / count
    assert (frequency[expected == 0] == 0).all()
    assert (abs(frequency - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()


# Denormal as float64 and as float32, and either side of what counts as 0.
SHARPEST = [{"temperature": t} for t in (0, 1e-320, 1e-45, 1e-38, 1e-30, 9.9e-7, 1e-6, 1e-4)]
SHARPEST += [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}]


@pytest.mark.parametrize("settings", SHARPEST)
def test_the_sharpest_settings_take_the_likeliest(settings):
    rows = jnp.asarray([[0.3, 2.0, -jnp.inf, 1.9], [0.3e38, 2.0e38, -jnp.inf, 1.9e38]] * 50)
    keys = jax.random.split(jax.random.key(0), len(rows))
    assert (jax.jit(functools.partial(sample, sampling=Sampling(**settings)))(rows, keys) == 1).all()


def test_among_equals_a_temperature_of_0_takes_the_first_and_none_above_it_prefers_one():
    for temperature in (0, 1e-30):
        assert (draws([-1.0, 3.0, 3.0, 3.0], 100, temperature=temperature) == 1).all()
    assert set(draws([-1.0, 3.0, 3.0, 3.0], 500, temperature=1e-5)) == {1, 2, 3}


def test_the_highest_temperature_draws_all_alike_and_nothing_impossible():
    for temperature in (1e25, 3e38):
        counts = np.bincount(draws([1e3, -1e3, 0.0, -np.inf], 3000, temperature=temperature), minlength=4)
        assert counts[3] == 0 and (abs(counts[:3] - 1000) < 120).all()


def test_the_nucleus_holds_just_enough():
    """Probabilities 1/2, 1/4, 1/8, 1/8: each top_p keeps the fewest that reach it."""
    logits = np.log([0.125, 0.5, 0.125, 0.25])
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.74, {1, 3})):
        assert set(draws(logits, 500, top_p=top_p)) == kept
    assert len(set(draws(logits, 500, top_p=0.8))) == 3
    assert set(draws(logits, 500, top_p=0.9)) == {0, 1, 2, 3}


def test_among_equals_top_k_keeps_just_k():
    assert len(set(draws([1.0, 1.0, 1.0, 1.0], 500, top_k=2))) == 2


def test_impossible_tokens_stay_impossible():
    assert set(draws([1.0, -np.inf, 1.0, -np.inf], 500, top_k=4, top_p=0.999)) == {0, 2}


def test_a_row_draws_the_same_whatever_the_settings_of_the_others_are():
    settings = [Sampling(), Sampling(0.0), Sampling(0.7, top_k=3), Sampling(1.3, top_p=0.5), Sampling(2.0, min_p=0.2)]
    many, size, drawn = settings * 20, 50, jax.jit(draw, static_argnames="plan")
    logits = np.random.default_rng(1).normal(0, 2, (len(many), size)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), len(many))
    together = drawn(logits, keys, rows(many, size), plan(settings, size))
    for i, own in enumerate(settings):
        alone = drawn(logits[i::5], keys[i::5], rows([own] * 20, size), plan([own], size))
        np.testing.assert_array_equal(alone, together[i::5])


def test_a_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0, 0.0]] * 2), jnp.array([[True, True, False, False, True]] * 2)
    expected = [[1.0, -4.0, 2.0, -2.0, 0.0], [4.0, -1.0, 2.0, -2.0, 0.0]]
    np.testing.assert_array_equal(penalise(logits, seen, jnp.array([2.0, 0.5])), expected)
