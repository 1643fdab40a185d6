"""The next token, or a masked one: a softmax over the vocabulary, at every token of a row."""

import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.array_typing import Array, Float, Int
from zoo import ops, sharding
from zoo.config import ModelConfig
from zoo.heads.base import Declared, Head
from zoo.labelled import at_labels
from zoo.layers import linear, soft_cap


class Tokens(Head):
    """logits = hidden W in float32, W [D, vocab] a parameter or, tied, the embedding transposed; with a soft cap c,
    c tanh(logits / c). The loss of a token is -log softmax(logits)[target], in nats.
    """

    name: ClassVar[str] = "tokens"
    unit: ClassVar[str] = "nats per token"

    def __init__(self, model: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype, self.softcap, self.tied = dtype, model.logit_softcap, model.tie_embeddings
        if not self.tied:
            self.kernel = linear(model.d_model, model.vocab_size, ("embed", "vocab"), dtype=dtype, rngs=rngs).kernel

    @staticmethod
    def arrays(model, rows, length, *, evaluation=False):
        each = Declared((rows, length), ("batch", "time"))
        number = each._replace(dtype=jnp.float32)
        found = {"tokens": each, "targets": each, "segment_ids": each, "weights": number}
        return found | ({"bytes": number} if evaluation else {})

    def inputs(self, batch):
        return batch["tokens"], batch["segment_ids"]

    def losses(self, hidden, batch, *, embed, labels=None):
        def nats(hidden, targets, weights):
            return self.nats(hidden, targets, weights, embed)

        return at_labels(nats, hidden, batch["targets"], batch["weights"], labels)

    def scores(self, hidden, batch, *, embed, labels=None):
        sums = {"tokens": batch["weights"].sum(), "bytes": batch["bytes"].sum()}
        if labels is None:
            return sums | {"nats": self.losses(hidden, batch, embed=embed).sum()}
        losses, right = self.at_tokens(hidden, batch["targets"], batch["weights"], embed, labels)
        return sums | {"nats": losses.sum(), "right": right.sum()}

    @staticmethod
    def figures(sums: Mapping[str, float]) -> dict[str, float]:
        """eval_loss in nats a token; eval_bits_per_byte where targets stand for text; eval_accuracy of labels."""
        tokens = max(sums["tokens"], 1.0)
        found = {"eval_loss": sums["nats"] / tokens, "eval_tokens": round(sums["tokens"])}
        if sums["bytes"]:  # a synthetic task has none, and masked tokens count none
            found["eval_bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
        if "right" in sums:  # of a synthetic task, and of masked tokens
            found["eval_accuracy"] = sums["right"] / tokens
        return found

    @staticmethod
    def num_parameters(model):
        return 0 if model.tie_embeddings else model.d_model * model.vocab_size

    @staticmethod
    def flops_per_row(model, length, labels=None):
        return 2 * model.d_model * model.vocab_size * (length if labels is None else labels)

    def weight(self, embed: nnx.Module) -> Float[Array, "D vocab"]:
        return (embed.embedding[...].T if self.tied else self.kernel[...]).astype(self.dtype)

    def logits(self, hidden: Float[Array, "B T D"], embed: nnx.Module) -> Float[Array, "B T vocab"]:
        logits = jnp.einsum("btd,dv->btv", hidden, self.weight(embed), preferred_element_type=jnp.float32)
        if self.softcap:
            logits = soft_cap(logits, self.softcap)
        return sharding.constrain(logits, "batch", "time", "vocab")

    def nats(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], weights: Float[Array, "B T"], embed: nnx.Module
    ) -> Float[Array, "B T"]:
        """weights * (negative log-likelihood of the targets)."""
        return ops.cross_entropy(hidden, self.weight(embed), targets, weights, softcap=self.softcap or None)

    def at_tokens(
        self,
        hidden: Float[Array, "B T D"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        embed: nnx.Module,
        labels: int | None,
    ) -> tuple[jax.Array, jax.Array]:
        """`nats`, and weights * (whether the target is the likeliest token). The logits of `labels` exist."""

        def scores(hidden, targets, weights):
            right = (self.logits(hidden, embed).argmax(-1) == targets) * weights
            return self.nats(hidden, targets, weights, embed), right

        return at_labels(scores, hidden, targets, weights, labels)
