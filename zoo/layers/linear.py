"""Projections and embeddings, with the logical axes of their parameters."""

import jax
import jax.numpy as jnp
from flax import nnx


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
) -> nnx.Linear:
    """y = x W (+ b), W [d_in, d_out] in float32, computed in `dtype`.

    Args:
      axes: logical names of W's dimensions (`zoo.sharding.RULES`).
      init_scale: W is drawn from a truncated normal of standard deviation init_scale / sqrt(d_in).
      decay: False keeps weight decay off W (gate parameters); biases never decay.
    """
    init = jax.nn.initializers.variance_scaling(init_scale**2, "fan_in", "truncated_normal")
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nnx.with_partitioning(init, axes, decay=decay),
        bias_init=nnx.with_partitioning(jax.nn.initializers.zeros, (axes[1],), decay=False),
        rngs=rngs,
    )


def embedding(entries: int, width: int, axes: tuple[str, str], *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Embed:
    """A table [entries, width], drawn from a normal of standard deviation 0.02 (GPT-2's)."""
    init = jax.nn.initializers.normal(0.02)
    return nnx.Embed(entries, width, dtype=dtype, embedding_init=nnx.with_partitioning(init, axes), rngs=rngs)
