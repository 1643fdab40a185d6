"""The state of a batch of sequences, as a model leaves it: its rows are independent of one another."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Int

# {"position": int32 [B], "layers": {"mixer": ..., "mlp": ...} for each layer of the unit, for each unit,
#  "input": by family, of those that read the model's input in each layer}. The first axis of each array is sequences.
State = Mapping[str, Any]


def take_rows(state: State, rows: Int[Array, "R"]) -> State:
    """The state of the sequences `rows` of a batch: in another order, some of them, or one several times.

    Raises:
      ValueError: a row that the state does not have, where its number is known.
    """
    rows = _known_rows(state, rows)
    return jax.tree.map(lambda leaf: leaf[rows], state)


def put_rows(state: State, rows: Int[Array, "R"], other: State) -> State:
    """`state` with the sequences of `other` [R] in the places `rows`, each of which goes on as it would have there.

    Raises:
      ValueError: a row that the state does not have, where its number is known; a state of another model, of another
        max_length, or of another number of sequences than `rows`.
    """
    rows = _known_rows(state, rows)
    expected = jax.eval_shape(take_rows, state, rows)
    if jax.tree.structure(other) != jax.tree.structure(expected):
        raise ValueError("put_rows: other has leaves of another kind than state; give a state of the same model")
    for (path, leaf), of_state in zip(jax.tree.leaves_with_path(other), jax.tree.leaves(expected), strict=True):
        if (leaf.shape, leaf.dtype) != (of_state.shape, of_state.dtype):
            raise ValueError(
                f"put_rows: other{jax.tree_util.keystr(path)} is {leaf.dtype} {leaf.shape}, expected {of_state.dtype} "
                f"{of_state.shape}: a state of the same model and max_length, with a sequence for each row"
            )
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), state, other)


def _known_rows(state: State, rows: Int[Array, "R"]) -> jax.Array:
    """`rows` as an array, ValueError for what the state does not have."""
    size = state["position"].shape[0]
    rows = rows if isinstance(rows, jax.Array) else jnp.asarray(rows, jnp.int32)
    if not isinstance(rows, jax.core.Tracer) and rows.size and not (0 <= rows.min() and rows.max() < size):
        raise ValueError(f"rows: got {rows.tolist()}, expected numbers from 0 to {size - 1}: the state's sequences")
    return rows
