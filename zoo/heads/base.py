"""What a head is: what it reads of a batch, its parameters, its loss, and the figures of an evaluation."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.config import ModelConfig

Batch = Mapping[str, jax.Array]


class Declared(NamedTuple):
    """An array of a batch."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names of its dimensions
    dtype: jnp.dtype = jnp.int32


class Head(nnx.Module):
    """A batch is a dict of arrays whose first axis is rows. `weights` is among them: what each loss counts, and 0 of
    what only fills a batch up. A step's loss is the sum of `losses` over the sum of weights.

    Attributes:
      name: as in model.head.
      unit: of the loss.
    """

    name: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, model: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        raise NotImplementedError

    @staticmethod
    def arrays(model: ModelConfig, rows: int, length: int, *, evaluation: bool = False) -> dict[str, Declared]:
        """A batch of so many rows, whose inputs have `length` tokens or steps."""
        raise NotImplementedError

    def inputs(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """What the body reads: tokens [B, T] or patches of numbers [B, T, patch * channels], and segment ids."""
        raise NotImplementedError

    def losses(self, hidden: jax.Array, batch: Batch, *, embed: nnx.Module, labels: int | None = None) -> jax.Array:
        """weights * loss, in the shape of weights.

        Args:
          hidden: what `LanguageModel.hidden` returns of `inputs`, [B, T, D].
          embed: the model's embedding, which a head may share.
          labels: as in `LanguageModel.token_losses`.
        """
        raise NotImplementedError

    def scores(
        self, hidden: jax.Array, batch: Batch, *, embed: nnx.Module, labels: int | None = None
    ) -> dict[str, jax.Array]:
        """Sums over a batch of an evaluation, of which `figures` makes means. Arguments as in `losses`."""
        raise NotImplementedError

    def predict(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """Of each row of a batch, whose weights and answers are not read."""
        raise NotImplementedError

    @staticmethod
    def figures(sums: Mapping[str, float]) -> dict[str, float]:
        """eval_loss, by which checkpoints are ranked, and what stands beside it, from the sums of all batches."""
        raise NotImplementedError

    @staticmethod
    def num_parameters(model: ModelConfig) -> int:
        raise NotImplementedError

    @staticmethod
    def flops_per_row(model: ModelConfig, length: int, labels: int | None = None) -> float:
        """Of the head's forward pass."""
        raise NotImplementedError
