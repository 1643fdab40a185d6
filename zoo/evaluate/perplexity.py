"""Perplexity, bits per byte, and loss by position in the context."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.data.rows import Batch
from zoo.model import LanguageModel


def perplexity(
    model: LanguageModel,
    batches: Iterable[Batch],
    labels: int | None = None,
    on_scores: Callable[[int, Batch, np.ndarray], None] | None = None,
) -> dict:
    """Score every token of `batches` once.

        loss = sum_i w_i nll_i / sum_i w_i                      (nats per token)
        perplexity = exp(loss)
        accuracy = sum_i w_i [target i is the likeliest token] / sum_i w_i
        bits per byte = sum_i w_i nll_i / (ln 2 * sum_i bytes_i)

    Separators count as tokens but stand for no bytes. Sums are float64, on the host.

    Args:
      batches: of `zoo.data.validation_batches`, all of one shape: tokens, targets, segment_ids int32 [b, T], weights
        and bytes float32 [b, T].
      labels: of a task, the most targets of a row that are asked for; None: text.
      on_scores: called with each batch's number, the batch, and weights * nats of its targets [b, T].

    Returns:
      loss (nats per token), perplexity, accuracy (None of text), bits_per_byte (None without bytes), tokens, bytes, and
      loss_by_position: for positions 1, 2, 3-4, 5-8, ... {"first", "last", "tokens", "loss", "accuracy"}. Position n
      has n tokens to predict from: it is counted from the document's start, or from the row's where the document began
      before.

    Raises:
      ValueError: no token to score.
    """
    graphdef, parameters = nnx.split(model)
    nats, counts, num_right = np.zeros((3, 64))  # by bin: positions 2^(i-1) + 1 to 2^i
    num_bytes = 0.0
    for i, (batch, (losses, right)) in enumerate(_one_late(graphdef, parameters, batches, labels)):
        bins = np.ceil(np.log2(_positions(batch["segment_ids"]))).astype(int)
        scored = batch["weights"] > 0
        nats += np.bincount(bins[scored], losses[scored], 64)
        counts += np.bincount(bins[scored], batch["weights"][scored], 64)
        num_bytes += batch["bytes"].sum(dtype=np.float64)
        if labels is not None:
            num_right += np.bincount(bins[scored], right[scored], 64)
        if on_scores is not None:
            on_scores(i, batch, losses)
    if not counts.any():
        raise ValueError("perplexity: the batches hold no token to score")
    loss = nats.sum() / counts.sum()
    by_position = [
        {
            "first": 2**i // 2 + 1,
            "last": 2**i,
            "tokens": int(counts[i]),
            "loss": float(nats[i] / counts[i]),
            "accuracy": None if labels is None else float(num_right[i] / counts[i]),
        }
        for i in np.flatnonzero(counts).tolist()
    ]
    return {
        "loss": float(loss),
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "accuracy": None if labels is None else float(num_right.sum() / counts.sum()),
        "bits_per_byte": float(nats.sum() / math.log(2) / num_bytes) if num_bytes else None,
        "tokens": int(counts.sum()),
        "bytes": int(num_bytes),
        "loss_by_position": by_position,
    }


def _one_late(
    graphdef: nnx.GraphDef, parameters: nnx.State, batches: Iterable[Batch], labels: int | None
) -> Iterator[tuple[Batch, tuple[np.ndarray, np.ndarray]]]:
    """Each batch with its scores, read while the device works on the next."""
    waiting = None
    for batch in batches:
        inputs = (batch[name] for name in ("tokens", "targets", "weights", "segment_ids"))
        scores = _scores(graphdef, parameters, *inputs, labels=labels)
        if waiting is not None:
            yield waiting[0], jax.device_get(waiting[1])
        waiting = batch, scores
    if waiting is not None:
        yield waiting[0], jax.device_get(waiting[1])


@functools.partial(jax.jit, static_argnames=("graphdef", "labels"))
def _scores(graphdef, parameters, tokens, targets, weights, segment_ids, labels):
    """Losses, and what is right where `labels` are asked for."""
    model = nnx.merge(graphdef, parameters)
    if labels is None:
        return model.token_losses(tokens, targets, weights, segment_ids=segment_ids), jnp.zeros(())
    return model.token_scores(tokens, targets, weights, segment_ids=segment_ids, labels=labels)


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """1, 2, ... in each segment of each row [b, T]."""
    steps = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = np.concatenate([np.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return steps - np.maximum.accumulate(np.where(starts, steps, 0), axis=1) + 1
