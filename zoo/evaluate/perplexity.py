"""Perplexity, bits per byte, and loss by position in the context."""

import functools
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from flax import nnx

from zoo.data.pipeline import Batch
from zoo.model import LanguageModel


def perplexity(model: LanguageModel, batches: Iterable[Batch]) -> dict:
    """Score every token of `batches` once.

        loss = sum_i w_i nll_i / sum_i w_i                      (nats per token)
        perplexity = exp(loss)
        bits per byte = sum_i w_i nll_i / (ln 2 * sum_i bytes_i)

    Separators count as tokens but stand for no bytes. Sums are float64, on the host.

    Args:
      batches: of `zoo.data.validation_batches`, all of one shape: tokens, targets, segment_ids int32 [b, T], weights
        and bytes float32 [b, T].

    Returns:
      loss (nats per token), perplexity, bits_per_byte (None without bytes), tokens, bytes, and loss_by_position: for
      positions 1, 2, 3-4, 5-8, ... {"first", "last", "tokens", "loss"}. Position n has n tokens to predict from: it is
      counted from the document's start, or from the row's where the document began before.

    Raises:
      ValueError: no token to score.
    """
    graphdef, parameters = nnx.split(model)
    nats, counts, num_bytes = np.zeros(64), np.zeros(64), 0.0  # by bin: positions 2^(i-1) + 1 to 2^i
    for batch, losses in _one_late(graphdef, parameters, batches):
        bins = np.ceil(np.log2(_positions(batch["segment_ids"]))).astype(int)
        scored = batch["weights"] > 0
        nats += np.bincount(bins[scored], losses[scored], 64)
        counts += np.bincount(bins[scored], batch["weights"][scored], 64)
        num_bytes += batch["bytes"].sum(dtype=np.float64)
    if not counts.any():
        raise ValueError("perplexity: the batches hold no token to score")
    loss = nats.sum() / counts.sum()
    by_position = [
        {"first": 2**i // 2 + 1, "last": 2**i, "tokens": int(counts[i]), "loss": float(nats[i] / counts[i])}
        for i in np.flatnonzero(counts).tolist()
    ]
    return {
        "loss": float(loss),
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": float(nats.sum() / math.log(2) / num_bytes) if num_bytes else None,
        "tokens": int(counts.sum()),
        "bytes": int(num_bytes),
        "loss_by_position": by_position,
    }


def _one_late(
    graphdef: nnx.GraphDef, parameters: nnx.State, batches: Iterable[Batch]
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with its losses, read while the device works on the next."""
    waiting = None
    for batch in batches:
        inputs = (batch[name] for name in ("tokens", "targets", "weights", "segment_ids"))
        losses = _losses(graphdef, parameters, *inputs)
        if waiting is not None:
            yield waiting[0], np.asarray(waiting[1])
        waiting = batch, losses
    if waiting is not None:
        yield waiting[0], np.asarray(waiting[1])


@functools.partial(jax.jit, static_argnames="graphdef")
def _losses(graphdef, parameters, tokens, targets, weights, segment_ids):
    return nnx.merge(graphdef, parameters).token_losses(tokens, targets, weights, segment_ids=segment_ids)


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """1, 2, ... in each segment of each row [b, T]."""
    steps = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = np.concatenate([np.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return steps - np.maximum.accumulate(np.where(starts, steps, 0), axis=1) + 1
