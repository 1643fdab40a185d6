"""The mesh, the logical axes and the rule table: the only place that knows how arrays lie on devices.

Parameters and activations name their dimensions by what they mean ("embed", "heads", "batch"); the rule table
says which mesh axes each name is spread over. A mesh of one device is the same program with nothing to spread.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import spmd
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import dispatch
from zoo.errors import UsageError
from zoo.settings import problems, setting

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
REST = {-1: "what the others leave"}

# Logical name -> mesh axes. Every name that a parameter or an activation uses stands here.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),  # sequences of a batch
    ("time", "sequence"),  # tokens of a sequence
    ("layers", None),  # depth, where the repeating unit is stacked
    ("embed", "fsdp"),  # the model's width, in parameters
    ("heads", "tensor"),  # heads x head width, in projections
    ("mlp", "tensor"),  # the MLP's inner width
    ("vocab", "tensor"),  # entries of the vocabulary
    ("norm", None),  # scales, biases and other vectors: small, on every device
    ("gates", None),  # one gate a head, and the few mixtures of a token shift
    ("width", None),  # the model's width, where both sides of a projection are that wide
    ("rank", None),  # the narrow side of low-rank projections
    ("state", None),  # entries of a channel's state, taps of its convolution
    ("positions", None),  # learned positions
)


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; one axis at most takes what the others leave."""

    data: int = setting(-1, "copies of the model, each on its own sequences", unit="device", special=REST)
    fsdp: int = setting(1, "like data, with the parameters spread over it", unit="device", special=REST)
    tensor: int = setting(1, "heads, MLP width and vocabulary spread over it", unit="device", special=REST)
    sequence: int = setting(1, "tokens of a sequence spread over it", unit="device", special=REST)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all).

    Raises:
      UsageError: sizes that are none, or that do not multiply to the number of devices.
    """
    if found := problems(config, "mesh."):
        raise UsageError("; ".join(found))
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UsageError(f"mesh: got {asked}; at most one may be -1 (what the others leave)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UsageError(f"mesh: {asked} does not fit {len(devices)} devices; set mesh.* so that the product is that")
    # Auto, not jax's default Explicit: the compiler propagates shardings from the parameters and the batch.
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=np.asarray(devices))


def partition_spec(*logical_axes: str | None) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names (None: not spread)."""
    rules = dict(RULES)
    return PartitionSpec(*(None if name is None else rules[name] for name in logical_axes))


def named_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a state of NNX variables, by logical axes; what has none is everywhere."""
    with spmd.logical_axis_rules(RULES):
        return nnx.get_named_sharding(abstract_state, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a [batch, time] array."""
    return NamedSharding(mesh, partition_spec("batch", "time"))


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace and run on `mesh`: `constrain` applies to it, and ops choose their implementation for its devices."""
    token = _mesh.set(mesh)
    try:
        with dispatch.use_device(mesh.devices.flat[0]):
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
) -> Any:
    """`function` of each device's part of `arrays`, for kernels that the compiler cannot partition.

    Args:
      function: of the arrays by name; no communication inside.
      arrays: by name, each with the logical axes of its dimensions. A dimension that its devices do not divide is on
        all of them. None stays None.
      out_axes: logical axes of the results, in the results' structure.
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

    def spec(axes):
        return partition_spec(*(axis if axis in spread else None for axis in axes))

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=({name: spec(axes) for name, (_, axes) in given.items()},),
        out_specs=jax.tree.map(
            spec, out_axes, is_leaf=lambda x: all(axis is None or isinstance(axis, str) for axis in x)
        ),
        check_vma=False,  # what Pallas calls return carries no such types in all versions of jax
    )(values)
