"""The next steps of a series: all of the horizon at once, from the last patch of the input."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.array_typing import Array, Float
from zoo.config import ModelConfig
from zoo.heads.base import Batch, Declared, Head
from zoo.heads.patches import patches
from zoo.layers import linear


class Values(Head):
    """prediction_h = x_T + (hidden_T W + b)_h in float32, for each step h of the horizon and each channel; x_T is the
    last step of the input, so that the model adds to what the last value alone would say (as NLinear does,
    arXiv:2205.13504). The loss of a row is the mean of the squared errors over steps and channels.
    """

    name: ClassVar[str] = "values"
    unit: ClassVar[str] = "mean squared error"

    def __init__(self, model: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.patch, self.horizon, self.channels = model.patch, model.horizon, model.channels
        sizes = (model.d_model, model.horizon * model.channels)
        self.linear = linear(*sizes, ("embed", "patch"), bias=True, dtype=jnp.float32, rngs=rngs)

    @staticmethod
    def arrays(model, rows, length, *, evaluation=False):
        values = Declared((rows, length + model.horizon, model.channels), ("batch", None, None), jnp.float32)
        return {"values": values, "weights": Declared((rows,), ("batch",), jnp.float32)}

    def inputs(self, batch):
        return self.patches(batch["values"][:, : -self.horizon]), None

    def patches(self, values: Float[Array, "B steps C"]) -> Float[Array, "B T patch_C"]:
        """What the body reads of a series."""
        return patches(values, self.patch)

    def predict(self, hidden: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B horizon C"]:
        """In the units of the batch."""
        return self.after(hidden[:, -1], batch["values"][:, -self.horizon - 1])

    def after(self, hidden: Float[Array, "B D"], last: Float[Array, "B C"]) -> Float[Array, "B horizon C"]:
        """The horizon after a step, whose values are `last`, from what the body made of its patch."""
        change = self.linear(hidden.astype(jnp.float32))
        return last[:, None] + change.reshape(-1, self.horizon, self.channels)

    def losses(self, hidden, batch, *, embed=None, labels=None):
        return batch["weights"] * (self._errors(hidden, batch) ** 2).mean((1, 2))

    def scores(self, hidden, batch, *, embed=None, labels=None):
        errors, weights = self._errors(hidden, batch), batch["weights"]
        squared, absolute = (weights * x.mean((1, 2)) for x in (errors**2, jnp.abs(errors)))
        return {"rows": weights.sum(), "squared": squared.sum(), "absolute": absolute.sum()}

    def _errors(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        return self.predict(hidden, batch) - batch["values"][:, -self.horizon :]

    @staticmethod
    def figures(sums: Mapping[str, float]) -> dict[str, float]:
        """eval_loss, the mean squared error, and eval_mae, the mean absolute one, of standardised series."""
        rows = max(sums["rows"], 1.0)
        return {
            "eval_loss": sums["squared"] / rows, "eval_mae": sums["absolute"] / rows, "eval_rows": round(sums["rows"])
        }  # fmt: skip

    @staticmethod
    def num_parameters(model):
        return (model.d_model + 1) * model.horizon * model.channels

    @staticmethod
    def flops_per_row(model, length, labels=None):
        return 2 * model.d_model * model.horizon * model.channels
