"""Projections and embeddings, with the logical axes of their parameters."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kernels import dispatch
from zoo.layers.parameter import with_axes


def linear(
    d_in: int,
    d_out: int,
    axes: tuple[str, str],
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    bias: bool = False,
    init_scale: float = 1.0,
    decay: bool = True,
    out_dtype: jnp.dtype | None = None,
) -> nnx.Linear:
    """y = x W (+ b), W [d_in, d_out] in float32, computed in `dtype`.

    Args:
      axes: logical names of W's dimensions (`zoo.sharding.RULES`).
      init_scale: W is drawn from a truncated normal of standard deviation init_scale / sqrt(d_in).
      decay: False keeps weight decay off W (gate parameters); biases never decay.
      out_dtype: of y; None is `dtype`. float32 keeps the digits that a product of bfloat16 has: gates, which are
        summed over time and exponentiated, need them.
    """
    init = jax.nn.initializers.variance_scaling(init_scale**2, "fan_in", "truncated_normal")
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        dtype=dtype,
        kernel_init=with_axes(init, axes, decay=decay),
        bias_init=with_axes(jax.nn.initializers.zeros, (axes[1],), decay=False),
        preferred_element_type=out_dtype and jnp.promote_types(dtype, out_dtype),
        dot_general=_project,
        rngs=rngs,
    )


def _project(x, kernel, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None):
    del dimension_numbers, out_sharding  # nnx.Linear contracts x's last axis with the kernel's first; meshes are Auto
    return dispatch.call("linear", IMPLEMENTATIONS, None, ["transposed"], x, kernel, precision, preferred_element_type)


def _reference(x, kernel, precision, out_dtype):
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, contracted, precision, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, kernel, precision, out_dtype):
    """x W, whose gradient of W is x^T dy.

    jax's own rule computes (dy^T x)^T. On a CPU that transposes dy, at the end of whatever elementwise operations
    made it and once for each projection, where the projections of a block share one transpose of x: a fifth of the
    step of `tiny`.
    """
    return _reference(x, kernel, precision, out_dtype)


def _matmul_forward(x, kernel, precision, out_dtype):
    return _matmul(x, kernel, precision, out_dtype), (x, kernel)


def _matmul_backward(precision, out_dtype, residuals, dy):
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    dx = jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())), precision)
    tokens = tuple(range(x.ndim - 1))
    return dx, jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision)


_matmul.defvjp(_matmul_forward, _matmul_backward)
IMPLEMENTATIONS = {"reference": _reference, "transposed": _matmul}  # the first differentiates in every mode


class Embedding(nnx.Embed):
    """Rows of a table by id; an id outside it gives NaN (`nnx.Embed` takes -1 for the last)."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"embedding: ids are {ids.dtype}, expected integers")
        table = self.embedding[...].astype(self.dtype)
        ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))  # an int8 has no room for len(table)
        return jnp.take(table, jnp.where(ids < 0, len(table), ids), axis=0, mode="fill", fill_value=jnp.nan)


def embedding(entries: int, width: int, axes: tuple[str, str], *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Embedding:
    """A table [entries, width], drawn from a normal of standard deviation 0.02 (GPT-2's)."""
    init = jax.nn.initializers.normal(0.02)
    return Embedding(entries, width, dtype=dtype, embedding_init=with_axes(init, axes), rngs=rngs)
