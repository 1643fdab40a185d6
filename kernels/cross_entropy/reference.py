"""The definition, with all logits at once, in float32."""

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.softcap import soft_cap


def reference(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D vocab"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    chunk_size: int | None,
    softcap: float | None,
) -> Float[Array, " N"]:
    """Losses [N]; see `cross_entropy`. `chunk_size` has no meaning here."""
    del chunk_size
    logits = jnp.dot(hidden.astype(jnp.float32), head.astype(jnp.float32), precision="highest")
    if softcap is not None:
        logits = soft_cap(logits, softcap)
    vocab = head.shape[1]
    log_probability = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_probability, jnp.clip(targets, 0, vocab - 1)[:, None], axis=1)[:, 0]
    valid = (targets >= 0) & (targets < vocab)
    weights = weights.astype(jnp.float32)
    nll = jnp.where(valid, nll, jnp.where(weights == 0, 0, jnp.nan))
    return weights * nll
