"""The mesh in use, and functions that run on each device's part of their arrays: all that knows `shard_map`."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kernels import dispatch
from zoo.sharding.rules import RULES, partition_spec

_mesh: contextvars.ContextVar[Mesh | AbstractMesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Trace and run on `mesh`: `constrain` applies to it, ops choose implementations for its devices, if it has any."""
    token = _mesh.set(mesh)
    try:
        with contextlib.nullcontext() if isinstance(mesh, AbstractMesh) else dispatch.use_device(mesh.devices.flat[0]):
            yield
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x`, told to the compiler to be spread by these logical axes over the mesh in use (nothing on one device)."""
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(*logical_axes)))


def axis_size(logical_axis: str) -> int:
    """Devices that a dimension of this name is spread over, on the mesh in use."""
    mesh, axes = _mesh.get(), dict(RULES)[logical_axis]
    if mesh is None or axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def on_each_device(
    function: Callable[[dict[str, jax.Array]], Any],
    arrays: Mapping[str, tuple[jax.Array | None, tuple[str | None, ...]]],
    out_axes: Any,
    *,
    over_time: Callable[[Callable], Callable] | None = None,
    whole: tuple[str, ...] = (),
) -> Any:
    """`function` of each device's part of `arrays`, for kernels that the compiler cannot partition.

    Args:
      function: of the arrays by name; no communication inside.
      arrays: by name, each with the logical axes of its dimensions. A dimension that its devices do not divide is on
        all of them. None stays None.
      out_axes: logical axes of the results, in the results' structure.
      over_time: makes of `function` one of shards of the sequences, which communicates (`zoo.sharding.sequence`).
        None: sequences are whole on each device.
      whole: mesh axes that are left to the compiler: it spreads over them what is inside.
    """
    mesh, given = _mesh.get(), {name: pair for name, pair in arrays.items() if pair[0] is not None}
    values = {name: array for name, (array, _) in given.items()}
    if mesh is None or mesh.size == 1:
        return function(values)
    sizes: dict[str | None, set[int]] = {}
    for array, axes in given.values():
        for size, axis in zip(array.shape, axes, strict=True):
            sizes.setdefault(axis, set()).add(size)
    spread = {axis for axis in sizes if axis and all(size % axis_size(axis) == 0 for size in sizes[axis])}
    if over_time is None:
        spread.discard("time")
    elif "time" in spread and axis_size("time") > 1:
        function = over_time(function)

    if whole and dispatch.device().platform == "cpu":
        # XLA ends a CPU's process on a sum of bfloat16 over some of the mesh's axes, such as a shared array's gradient.
        on_parts, dtypes = function, {name: array.dtype for name, array in values.items()}
        values = {name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for name, x in values.items()}
        function = lambda arrays: on_parts({name: x.astype(dtypes[name]) for name, x in arrays.items()})  # noqa: E731

    def spec(axes):
        return partition_spec(*(axis if axis in spread else None for axis in axes))

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=({name: spec(axes) for name, (_, axes) in given.items()},),
        out_specs=jax.tree.map(
            spec, out_axes, is_leaf=lambda x: all(axis is None or isinstance(axis, str) for axis in x)
        ),
        axis_names=set(mesh.axis_names) - set(whole),
        check_vma=False,  # what Pallas calls return carries no such types in all versions of jax
    )(values)
