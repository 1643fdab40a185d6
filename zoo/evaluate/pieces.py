"""Rows of any length, read a piece at a time with the state carried: one program for all lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.model import LanguageModel


class Reader:
    """Scores rows of several pieces of `piece` tokens each, `rows` at a time.

    Attributes:
      rows: that are read at once.
      piece: tokens of a piece.
    """

    def __init__(self, model: LanguageModel, rows: int, piece: int, longest: int, *, answers: bool):
        """`longest`: tokens of a row at most. `answers`: say what is right, too; logits of a piece exist then."""
        self.rows, self.piece, self._longest, self._answers = rows, piece, longest, answers
        self._graphdef, self._parameters = nnx.split(model)
        self._model = model

    def __call__(
        self, tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Each row as one document from its first token.

        Args:
          tokens, targets: int [n, L]; L is a multiple of `piece`.
          weights: [n, L].

        Returns:
          Losses, weights * nats [n, L], and weights * (whether the target is the likeliest token), or None.
        """
        found = [self._read(*(x[i : i + self.rows] for x in (tokens, targets, weights)))
                 for i in range(0, len(tokens), self.rows)]  # fmt: skip
        losses, right = (np.concatenate(part)[: len(tokens)] for part in zip(*found, strict=True))
        return losses, right if self._answers else None

    def _read(self, tokens, targets, weights):
        missing = ((0, self.rows - len(tokens)), (0, 0))
        arrays = [np.pad(array, missing) for array in (tokens, targets, weights.astype(np.float32))]
        state, found = _first_state(self._graphdef, self._parameters, self.rows, self._longest), []
        for start in range(0, tokens.shape[1], self.piece):
            piece = [np.ascontiguousarray(array[:, start : start + self.piece]) for array in arrays]
            scores, state = _score(self._graphdef, self._parameters, state, *piece, answers=self._answers)
            found.append(scores)
        return [np.concatenate(part, axis=1) for part in zip(*jax.device_get(found), strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _first_state(graphdef, parameters, rows, longest):
    return nnx.merge(graphdef, parameters).init_state(rows, longest)


@functools.partial(jax.jit, static_argnames=("graphdef", "answers"), donate_argnames="state")
def _score(graphdef, parameters, state, tokens, targets, weights, *, answers):
    """Losses and what is right of a piece, and the state behind it."""
    model = nnx.merge(graphdef, parameters)
    hidden, state = model.hidden(tokens, state=state)
    losses = model.losses(hidden, targets, weights)
    right = (model.logits(hidden).argmax(-1) == targets) * weights if answers else jnp.zeros_like(losses)
    return (losses, right), state
