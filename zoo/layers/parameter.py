"""Parameters with the logical names of their dimensions (`zoo.sharding.RULES`)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def parameter(value: jax.Array, axes: tuple[str, ...], *, decay: bool = True) -> nnx.Param:
    """`value` as a parameter. `decay`: whether weight decay holds for it, where it is a matrix."""
    return nnx.Param(value, **_metadata(axes, decay))


def with_axes(init: Callable, axes: tuple[str, ...], *, decay: bool = True) -> Callable:
    """An initializer for Flax's own layers whose parameters are declared as those of `parameter`."""
    return nnx.with_metadata(init, **_metadata(axes, decay))


def _metadata(axes: tuple[str, ...], decay: bool) -> dict[str, Any]:
    # Flax would place a value by its axes the moment it is made, and refuses where no mesh is set. A model without one
    # is an ordinary model; the trainer places what it makes by jit's out_shardings.
    return {"out_sharding": axes, "decay": decay, "eager_sharding": False}
