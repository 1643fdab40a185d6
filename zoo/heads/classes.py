"""The label of a row: a softmax over classes, of what the mean or the last of its positions says."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kernels.array_typing import Array, Float
from zoo.config import ModelConfig
from zoo.heads.base import Batch, Declared, Head
from zoo.heads.patches import patches
from zoo.layers import linear


class Classes(Head):
    """logits = (sum_t p_t hidden_t) W + b in float32, p_t = 1 / n at each of a row's n positions, or 1 at the last and
    0 at others (`model.head_pool`). The loss of a row is -log softmax(logits)[label], in nats.

    A row is padded on the right to the context. Padding is a segment of its own, which no position of the row sees.
    """

    name: ClassVar[str] = "classes"
    unit: ClassVar[str] = "nats per row"

    def __init__(self, model: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.pool, self.patch, self.of_numbers = model.head_pool, model.patch, model.channels > 0
        axes = ("embed", "classes")
        self.linear = linear(model.d_model, model.classes, axes, bias=True, dtype=jnp.float32, rngs=rngs)

    @staticmethod
    def arrays(model, rows, length, *, evaluation=False):
        each, tokens = Declared((rows,), ("batch",)), Declared((rows, length), ("batch", "time"))
        values = Declared((rows, length, model.channels), ("batch", None, None), jnp.float32)
        read = {"values": values} if model.channels else {"tokens": tokens}
        return read | {"lengths": each, "label": each, "weights": each._replace(dtype=jnp.float32)}

    def inputs(self, batch):
        read = patches(batch["values"], self.patch) if self.of_numbers else batch["tokens"]
        steps = jnp.arange(read.shape[1])
        return read, (steps < self._positions(batch)[:, None]).astype(jnp.int32)

    def _positions(self, batch: Batch) -> jax.Array:
        """Of each row, [B]."""
        return -(-batch["lengths"] // self.patch)

    def predict(self, hidden: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B classes"]:
        steps, positions = jnp.arange(hidden.shape[1]), self._positions(batch)[:, None]
        read = steps < positions if self.pool == "mean" else steps == positions - 1
        # Sums, not a gather: what is spread over the sequence axis is added up where it lies.
        total = jnp.einsum("btd,bt->bd", hidden, read.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return self.linear(total / jnp.maximum(read.sum(1, keepdims=True), 1))

    def losses(self, hidden, batch, *, embed=None, labels=None):
        return self._nats(self.predict(hidden, batch), batch)

    def scores(self, hidden, batch, *, embed=None, labels=None):
        logits, weights = self.predict(hidden, batch), batch["weights"]
        right = (logits.argmax(-1) == batch["label"]) * weights
        return {"rows": weights.sum(), "nats": self._nats(logits, batch).sum(), "right": right.sum()}

    @staticmethod
    def _nats(logits: jax.Array, batch: Batch) -> jax.Array:
        return batch["weights"] * optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    @staticmethod
    def figures(sums: Mapping[str, float]) -> dict[str, float]:
        """eval_loss in nats a row, eval_accuracy."""
        rows = max(sums["rows"], 1.0)
        return {
            "eval_loss": sums["nats"] / rows, "eval_accuracy": sums["right"] / rows, "eval_rows": round(sums["rows"])
        }  # fmt: skip

    @staticmethod
    def num_parameters(model):
        return (model.d_model + 1) * model.classes

    @staticmethod
    def flops_per_row(model, length, labels=None):
        return 2 * model.d_model * model.classes
