"""`cross_entropy`: a language model's head and its loss in one op."""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.checks import check_count, check_dtype, check_number, check_rank, check_shape
from kernels.cross_entropy.chunked import chunked
from kernels.cross_entropy.reference import reference

IMPLEMENTATIONS = {"reference": reference, "chunked": chunked}
OP = "cross_entropy"


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D vocab"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    chunk_size: int | None = None,
    softcap: float | None = None,
    implementation: dispatch.Implementation = None,
) -> Float[Array, " N"]:
    """Weighted negative log-likelihood of each token, in nats.

        losses_n = weights_n (logsumexp(z_n) - z_n[targets_n]),   z_n = hidden_n head,   or softcap tanh(z_n / softcap)

    Logits of `chunk_size` tokens exist at a time (all of them only where they are few), forward and backward.
    Products are of the inputs' dtype, sums and losses float32. Gradients flow to `hidden`, `head` and `weights`.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      hidden: the model's last hidden states, one row a token.
      head: the output projection.
      targets: ids in [0, vocab). An id outside makes its token's loss NaN, unless its weight is 0: such a token is
        ignored, with loss 0 and gradient 0, whatever its target.
      weights: weight of each token's loss.
      chunk_size: tokens whose logits are held at once; None chooses by the vocabulary.
      softcap: bound of the logits' magnitude.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, a chunk below 1, a softcap that is not above 0, or
        an unknown implementation.
    """
    check_rank(OP, "hidden", hidden, "N D")
    check_rank(OP, "head", head, "D vocab")
    N, D = hidden.shape
    check_shape(OP, "head", head, (D, head.shape[1]), like="hidden", shape=hidden.shape)
    check_shape(OP, "targets", targets, (N,), like="hidden", shape=hidden.shape)
    check_shape(OP, "weights", weights, (N,), like="hidden", shape=hidden.shape)
    check_dtype(OP, jnp.floating, hidden=hidden, head=head, weights=weights)
    check_dtype(OP, jnp.integer, targets=targets)
    check_count(OP, "chunk_size", chunk_size, "token")
    check_number(OP, "softcap", softcap, positive=True)
    return dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        ["chunked"],
        hidden,
        head,
        targets,
        weights,
        chunk_size=chunk_size,
        softcap=softcap,
    )
