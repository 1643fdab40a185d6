"""Matrices that stay as they are, but for an update of low rank (Hu et al. 2021, arXiv:2106.09685).

    W_t = W_0 + A_t B_t      W [in, out], A [in, rank] normal with variance 1 / in at first, B [rank, out] 0
    dL/dA = G B^T, dL/dB = A^T G, where G = dL/dW

A and B are what the optimizer keeps of W, with moments of their own. The model has the sum at every step, so that a run
is evaluated, saved, exported and started from as any other: there is nothing to merge. G is computed whole; what is
saved are W's moments.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from zoo.checkpoints import with_leaves
from zoo.layers.parameter import parameter
from zoo.sharding import logical_axes, parameters

DOWN, UP = ".down", ".up"  # behind the name of W: A and B


class LowRank(NamedTuple):
    """The optimizer's state. A and B lie over the mesh as the sides of W that they have."""

    factors: dict[str, nnx.Param]
    inner: optax.OptState


def low_rank(
    make: Callable[[Any], optax.GradientTransformation], rank: int, params: nnx.State, *, whole: set[str], low: set[str]
) -> optax.GradientTransformation:
    """An optimizer of `params`, which may be abstract.

    Args:
      make: the rule, of a tree of parameters.
      whole: names of those that it moves as they are; low: those that move by A B. What is in neither stays.
    """

    matrices = sorted(low)  # the same program in every process

    def init_factors(named: dict[str, nnx.Param]) -> dict[str, nnx.Param]:
        found = {}
        for name in matrices:
            *stacked, rows, columns = named[name].shape
            axes = logical_axes(named[name])
            key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
            down = jax.random.normal(key, (*stacked, rows, rank)) * rows**-0.5
            found[name + DOWN] = parameter(down, (*axes[:-1], "rank"))
            found[name + UP] = parameter(jnp.zeros((*stacked, rank, columns)), (*axes[:-2], "rank", axes[-1]))
        return found

    def of_whole(tree: nnx.State) -> dict[str, nnx.Param]:
        return {name: x for name, x in parameters(tree).items() if name in whole}

    inner = make(of_whole(params) | jax.eval_shape(init_factors, parameters(params)))

    def init(params: nnx.State) -> LowRank:
        factors = init_factors(parameters(params))
        return LowRank(factors, inner.init(of_whole(params) | factors))

    def update(gradient: nnx.State, state: LowRank, params: nnx.State) -> tuple[nnx.State, LowRank]:
        named, factors = parameters(gradient), state.factors
        of_factors = {}
        for name in matrices:
            G, A, B = (x[...] for x in (named[name], factors[name + DOWN], factors[name + UP]))
            of_factors[name + DOWN] = factors[name + DOWN].replace(_product(G, B.mT))
            of_factors[name + UP] = factors[name + UP].replace(_product(A.mT, G))
        own = of_whole(params) | factors
        updates, after = inner.update(of_whole(gradient) | of_factors, state.inner, own)
        moved = {name: optax.apply_updates(factors[name], updates[name]) for name in factors}
        found = {name: jnp.zeros_like(x[...]) for name, x in named.items()}
        found |= {name: updates[name][...] for name in whole}
        for name in matrices:
            # A' B' - A B, without the difference of two that are nearly the same.
            to_down, to_up = (updates[name + part][...] for part in (DOWN, UP))
            found[name] = _product(to_down, moved[name + UP][...]) + _product(factors[name + DOWN][...], to_up)
        return with_leaves(gradient, found), LowRank(moved, after)

    return optax.GradientTransformation(init, update)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
