"""Random features of the softmax kernel (Choromanski et al. 2020, arXiv:2009.14794).

    exp(q . k / sqrt(K)) = E phi(q) . phi(k),   phi(x) = m^(-1/2) exp(W x' - |x'|^2 / 2),   x' = x / K^(1/4)

W [m, K]: rows of blocks of K that are orthogonal to one another, each as long as a Gaussian vector. It is a function of
seed, draw and layer, so that a run that goes on draws what it would have drawn.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Float, Int

HIGHEST = 60.0  # of an exponent: sums of a million of e^60 are finite


@functools.partial(jax.jit, static_argnums=(3, 4))
def draw(seed: Int[Array, ""], index: Int[Array, ""], layers: Int[Array, "N"], features: int, width: int):
    """W of each of `layers` in the draw `index`: float32 [N, features, width]."""
    key = jax.random.fold_in(jax.random.key(seed), index)

    def of_layer(layer):
        blocks = -(-features // width)
        rows = jax.random.normal(jax.random.fold_in(key, layer), (blocks * width + features, width), jnp.float32)
        directions, lengths = rows[: blocks * width], jnp.linalg.norm(rows[blocks * width :], axis=-1)
        q, r = jnp.linalg.qr(directions.reshape(blocks, width, width))
        q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]  # uniform over all rotations
        return q.swapaxes(1, 2).reshape(-1, width)[:features] * lengths[:, None]

    return jax.vmap(of_layer)(layers)


def exp_features(x: Float[Array, "... K"], w: Float[Array, "m K"], *, of_queries: bool) -> Float[Array, "... m"]:
    """sqrt(m) phi(x); of a query divided by its largest entry, a factor that a normalised read cancels.

    Of keys no maximum is taken: one over time would see the future. Exponents stop at HIGHEST, which |W x'| reaches
    where keys are several times as long as Gaussian ones.
    """
    x = x / x.shape[-1] ** 0.25
    exponent = jnp.einsum("...k,mk->...m", x, w, precision="highest") - jnp.sum(x**2, -1, keepdims=True) / 2
    if of_queries:
        return jnp.exp(exponent - lax.stop_gradient(exponent.max(-1, keepdims=True)))
    return jnp.exp(jnp.minimum(exponent, HIGHEST))


def relu_features(x: Float[Array, "... K"], w: Float[Array, "m K"], *, of_queries: bool) -> Float[Array, "... m"]:
    """relu(W x') + 0.001, another kernel than softmax's."""
    del of_queries
    return jax.nn.relu(jnp.einsum("...k,mk->...m", x / x.shape[-1] ** 0.25, w, precision="highest")) + 1e-3
