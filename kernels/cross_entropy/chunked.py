"""The loss chunk by chunk of tokens: the logits of one chunk at a time, forward and backward.

With z the logits of a token, p = softmax(z) and y its target's one-hot row, d nll / dz = p - y. Backward computes z
again: kept are the inputs and logsumexp(z), one number a token. Few logits in all fit one chunk; then the plain form
runs, whose backward pass keeps them instead of computing them twice.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch, precision
from kernels.array_typing import Array, Float, Int
from kernels.softcap import soft_cap, soft_cap_slope


def tokens_at_once(vocab: int) -> int:
    """Tokens of a chunk: logits of 16 MiB on a CPU, of 256 MiB on devices that need more work at a time."""
    logits = 1 << (22 if dispatch.device().platform == "cpu" else 26)
    return max(logits // vocab, 128)


def chunked(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D vocab"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    chunk_size: int | None,
    softcap: float | None,
) -> Float[Array, " N"]:
    """Losses [N]; see `cross_entropy`."""
    N, vocab = hidden.shape[0], head.shape[1]
    chunk_size = tokens_at_once(vocab) if chunk_size is None else chunk_size
    weights = weights.astype(jnp.float32)
    if N <= chunk_size:
        return _plain(hidden, head, targets, weights, softcap)
    n = math.ceil(N / chunk_size)
    chunk_size = math.ceil(N / n)

    def split(x):  # [N, ...] -> [n, chunk_size, ...]; padding has weight 0
        padding = ((0, n * chunk_size - N),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(n, chunk_size, *x.shape[1:])

    losses = _losses(split(hidden), head, split(targets), split(weights), softcap)
    return losses.reshape(-1)[:N]


def _plain(hidden, head, targets, weights, softcap):
    logits = _logits(hidden, head, softcap)[0]
    return weights * _nll(logits, jax.nn.logsumexp(logits, -1), targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _losses(hidden, head, targets, weights, softcap):
    return _forward(hidden, head, targets, weights, softcap)[0]


def _forward(hidden, head, targets, weights, softcap):
    def chunk(_, inputs):
        hidden, targets, weights = inputs
        logits = _logits(hidden, head, softcap)[0]
        logsumexp = jax.nn.logsumexp(logits, -1)
        return None, (_nll(logits, logsumexp, targets, weights), logsumexp)

    _, (nll, logsumexp) = lax.scan(chunk, None, (hidden, targets, weights))
    return weights * nll, (hidden, head, targets, weights, nll, logsumexp)


def _backward(softcap, residuals, dlosses):
    hidden, head, targets, weights, nll, logsumexp = residuals

    def chunk(dhead, inputs):
        hidden, targets, logsumexp, dnll = inputs
        logits, slope = _logits(hidden, head, softcap)
        dlogits = jnp.exp(logits - logsumexp[:, None]) - (targets[:, None] == jnp.arange(head.shape[1]))
        dlogits = (dnll[:, None] * slope * dlogits).astype(hidden.dtype)
        dhidden = _dot(dlogits, head.T).astype(hidden.dtype)
        return dhead + _dot(hidden.T, dlogits), dhidden

    inputs = (hidden, targets, logsumexp, dlosses * weights)
    dhead, dhidden = lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), inputs)
    return dhidden, dhead.astype(head.dtype), None, dlosses * nll


_losses.defvjp(_forward, _backward)


def _logits(hidden, head, softcap):
    """float32 logits, and their slope with respect to hidden @ head."""
    logits = _dot(hidden, head)
    if softcap is None:
        return logits, 1.0
    return soft_cap(logits, softcap), soft_cap_slope(logits, softcap)


def _dot(a, b):
    return jnp.dot(a, b, precision=precision.exact(a.dtype), preferred_element_type=jnp.float32)


def _nll(logits, logsumexp, targets, weights):
    vocab = logits.shape[-1]
    at_target = jnp.take_along_axis(logits, jnp.clip(targets, 0, vocab - 1)[:, None], axis=-1)[:, 0]
    valid = (targets >= 0) & (targets < vocab)
    return jnp.where(valid, logsumexp - at_target, jnp.where(weights == 0, 0, jnp.nan))
