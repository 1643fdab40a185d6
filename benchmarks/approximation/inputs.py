"""q, k, v: Gaussian, or read from a trained model."""

import copy
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from zoo import checkpoints, data, ops
from zoo.config import Config
from zoo.errors import UsageError
from zoo.mixers import CAUSAL, MIXERS


class Inputs(NamedTuple):
    """Of one sequence, float32."""

    q: np.ndarray  # [T, H, K]
    k: np.ndarray
    v: np.ndarray  # [T, H, V]
    x: np.ndarray  # [T, D], what they were projected from

    def first(self, length: int) -> "Inputs":
        return Inputs(*(array[:length] for array in self))

    def exponent(self) -> float:
        """|q + k|^2 / sqrt(K), the median over queries and keys: of exp of it features, an estimate of a key's weight
        has an error as large as the weight (its variance is (exp(|q + k|^2 / sqrt(K)) - 1) weight^2 / features)."""
        q, k = self.q.astype(np.float64), self.k.astype(np.float64)
        lengths = (q**2).sum(-1)[:, None] + (k**2).sum(-1)[None] + 2 * np.einsum("thk,shk->tsh", q, k)
        return float(np.median(lengths / q.shape[-1] ** 0.5))


def gaussian(length: int, heads: int, width: int, scale: float, seed: int) -> Inputs:
    """Entries of q and k with the standard deviation `scale`, of v and x with 1."""
    q, k, v, x = np.random.default_rng(seed).standard_normal((4, length, heads, width)).astype(np.float32)
    return Inputs(scale * q, scale * k, v, x.reshape(length, -1))


def trained(workdir: str, layer: int, sequences: int) -> tuple[list[Inputs], str]:
    """What layer number `layer` (from 0) of a run's model reads of validation rows of one document, and what it is.

    Raises:
      UsageError: that layer is no causal softmax attention over the whole context, or there are too few such rows.
    """
    config = checkpoints.read_config(workdir)
    run = checkpoints.load_run(workdir)
    pattern = run.model.pattern
    family = pattern[layer % len(pattern)].split("@")[0]
    is_causal = config.model.direction == CAUSAL and config.model.head == "tokens"
    if layer >= config.model.num_layers or family != "attention" or not is_causal:
        model = config.model
        has = f"{model.num_layers} layers of {model.mixer}, {model.direction}, for {model.head}"
        raise UsageError(f"--layer={layer}: expected one of softmax attention in a causal model; {workdir} has {has}")
    attention, read, given = MIXERS["attention"], [], []
    whole, called = ops.attention, attention.__call__

    def spied(q, k, v, **options):
        given.append((q, k, v, options.get("window")))
        return whole(q, k, v, **options)

    def of_layer(self, x, **options):
        given.clear()
        y = called(self, x, **options)
        read.append((x, *given[-1]))
        return y

    found, below = [], [pattern[i % len(pattern)].split("@")[0] for i in range(layer)]
    for tokens in _rows(config, workdir, sequences):
        read.clear()
        # Without jit the scan over the depth is a loop: its arrays are values.
        with (
            jax.disable_jit(),
            mock.patch.object(ops, "attention", spied),
            mock.patch.object(attention, "__call__", of_layer),
        ):
            run.model.hidden(jnp.asarray(tokens)[None])
        x, q, k, v, window = read[below.count("attention")]
        if window:
            raise UsageError(f"--layer={layer}: it sees a window of {window} tokens; expected attention to all")
        q, k, v = (np.asarray(array[0], np.float32) for array in (q, k, v))
        k, v = (np.repeat(array, q.shape[1] // array.shape[1], axis=1) for array in (k, v))
        found.append(Inputs(q, k, v, np.asarray(x[0], np.float32)))
    return found, f"layer {layer} of {config.model.num_layers}, {config.model.mixer}, step {run.step}"


def _rows(config: Config, workdir: str, number: int) -> list[np.ndarray]:
    """Rows of the validation text that lie in one document, from places spread over it."""
    config = copy.deepcopy(config)
    config.data.cache_dir = ""
    config.data.tokenizer = data.tokenizer.spec_for_run(workdir, config)
    found = []
    for batch in data.validation_batches(config, max_batches=4 * number):
        one = (batch["segment_ids"] == batch["segment_ids"][:, :1]).all(1) & (batch["weights"] > 0).all(1)
        found += list(batch["tokens"][one][:1])
        if len(found) == number:
            return found
    raise UsageError(f"--workdir={workdir}: {len(found)} rows of one document, expected {number}")
