"""The labelled tokens of a row, taken and put back."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.labelled import at_labels


def test_results_and_gradients_are_those_of_all_tokens():
    hidden = jax.random.normal(jax.random.key(0), (2, 7, 3))
    targets = jnp.arange(14).reshape(2, 7)
    weights = jnp.zeros((2, 7)).at[0, jnp.array([2, 6])].set(2.0).at[1, 4].set(-1.0)
    shapes = set()

    def losses(hidden, labels):
        def of(hidden, targets, weights):
            shapes.add((labels, hidden.shape))
            return weights * (hidden**2).sum(-1) * targets

        return at_labels(of, hidden, targets, weights, labels)

    expected, pull = jax.vjp(lambda h: losses(h, None), hidden)
    found, pull_few = jax.vjp(lambda h: losses(h, 3), hidden)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(pull_few(jnp.ones((2, 7)))[0], pull(jnp.ones((2, 7)))[0])
    losses(hidden, 4)  # more than half: all are read
    assert shapes == {(None, (2, 7, 3)), (3, (2, 3, 3)), (4, (2, 7, 3))}
    # A label is never left out unseen.
    assert jnp.isnan(losses(hidden, 1)).tolist() == [[True] * 7, [False] * 7]
