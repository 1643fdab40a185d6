"""Rows of which few tokens have a target: the head, the widest product of a small model, reads those alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def at_labels(
    function: Callable, hidden: jax.Array, targets: jax.Array, weights: jax.Array, labels: int | None
) -> Any:
    """`function` of the tokens that have a weight, where they are at most half of all; else of all.

    Args:
      function: of hidden [B, L, D], targets [B, L] and weights [B, L]; its results are [B, L].
      labels: the most tokens of a row whose weight is not 0; None: any may have one.

    Returns:
      The results where the tokens stand, [B, T]; 0 at others. A row with more than `labels` weights is NaN.
    """
    if labels is None or 2 * labels > weights.shape[1]:
        return function(hidden, targets, weights)
    labelled = (weights != 0).astype(jnp.float32)
    places = jax.lax.top_k(labelled, labels)[1]
    taken = (jnp.take_along_axis(x, places, axis=1) for x in (targets, weights))
    found = function(jnp.take_along_axis(hidden, places[:, :, None], axis=1), *taken)
    rest = jnp.where(labelled.sum(1, keepdims=True) > labels, jnp.nan, jnp.zeros_like(labelled))
    rows = jnp.arange(len(weights))[:, None]
    return jax.tree.map(lambda x: rest.at[rows, places].add(x), found)
