"""Tokens in pieces: the same values and gradients, and less kept for the backward pass on a CPU."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.zoo.cases import D_MODEL, build, error_ratio
from zoo.layers import in_pieces

pieces = importlib.import_module("zoo.layers.in_pieces")


def results_of_rwkv6():
    graphdef, parameters = nnx.split(build("rwkv6"))
    x = jax.random.normal(jax.random.key(0), (2, 13, D_MODEL))
    loss = lambda parameters, x: jnp.sum(nnx.merge(graphdef, parameters)(x)[0] ** 2)  # noqa: E731
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(parameters, x))


def test_pieces_change_neither_values_nor_gradients_of_rwkv6(monkeypatch):
    expected = results_of_rwkv6()
    monkeypatch.setattr(pieces, "PIECE", 4)
    for a, b in zip(results_of_rwkv6(), expected, strict=True):
        assert error_ratio(a, b) < 1e-5


def test_pieces_keep_less_for_the_backward_pass(monkeypatch):
    weight, x = jnp.ones((64, 64)) / 64, jnp.ones((1, 1024, 64))

    def deep(x):
        for _ in range(8):
            x = jnp.tanh(x @ weight)
        return x

    def temporary_bytes(piece):
        monkeypatch.setattr(pieces, "PIECE", piece)
        gradient = jax.jit(jax.grad(lambda x: in_pieces(deep, x).sum()))
        return gradient.lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(128) < 0.5 * temporary_bytes(1024)


@pytest.mark.parametrize("time", [13, 12, 4, 1])
def test_several_arrays_go_in_and_a_tree_comes_out(monkeypatch, time):
    monkeypatch.setattr(pieces, "PIECE", 4)
    x, y = jnp.arange(2.0 * time).reshape(2, time), jnp.ones((2, time, 3))
    found = in_pieces(lambda x, y: {"sum": x[..., None] + y, "x": x}, x, y)
    assert (found["sum"] == x[..., None] + y).all() and (found["x"] == x).all()
