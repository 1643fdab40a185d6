"""The mesh, the logical axes and the rule table: the only place that knows how arrays lie on devices.

Parameters and activations name their dimensions by what they mean ("embed", "heads", "batch"); the rule table
says which mesh axes each name is spread over, unless `mesh.overrides` does for a parameter. A mesh of one device is
the same program with nothing to spread.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import dispatch
from zoo import lists
from zoo.errors import UsageError
from zoo.settings import divisors_near, nearest, one_of, problems, setting

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


def parse_overrides(text: str) -> list[tuple[str, tuple[tuple[str, ...], ...]]]:
    """(regex, the mesh axes of each dimension) from the text of `mesh.overrides`."""
    return lists.mesh_overrides(text, MESH_AXES)


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; one axis at most takes what the others leave."""

    data: int = setting(-1, "copies of the model, each on its own sequences", unit="device", special=REST)
    fsdp: int = setting(1, "like data, with the parameters spread over it", unit="device", special=REST)
    tensor: int = setting(1, "heads, MLP width and vocabulary spread over it", unit="device", special=REST)
    sequence: int = setting(1, "tokens of a sequence spread over it", unit="device", special=REST)
    overrides: str = setting(
        "",
        '"regex=AXES,..." over parameter paths: the axes of each dimension, as embedding=none|data+fsdp; '
        "--dry_run shows them",
        parse=parse_overrides,
    )


def axis_sizes(config: MeshConfig, devices: int) -> tuple[dict[str, int], list[str]]:
    """Devices along each axis, and what is wrong with them; where that is their product, an open axis (-1) has 1."""
    if found := problems(config, "mesh."):
        return dict.fromkeys(MESH_AXES, 1), found
    asked = {axis: getattr(config, axis) for axis in MESH_AXES}
    open_axes = [axis for axis, size in asked.items() if size == -1]
    sizes = {axis: 1 if size == -1 else size for axis, size in asked.items()}
    product = math.prod(sizes.values())
    if len(open_axes) > 1:
        return sizes, [f"mesh: got {_named(asked)}; at most one may be -1 (what the others leave)"]
    if devices % product or not (open_axes or product == devices):
        fit = []
        for axis, size in sizes.items():
            left, rest = divmod(devices * size, product)  # devices that the other axes leave to this one
            if not rest and axis not in open_axes:
                fit += [f"mesh.{axis}={n}" for n in (divisors_near(left, size, 2) if open_axes else [left])]
        sides = ", ".join(map(str, divisors_near(devices, product, 8)))
        advice = f"use {one_of(fit)}" if fit else f"sizes that fit divide it: {sides}"
        return sizes, [f"mesh: {_named(asked)} does not fit {devices} devices; {advice}"]
    return sizes | {axis: devices // product for axis in open_axes}, []


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all).

    Raises:
      UsageError: sizes that are none, that do not multiply to the number of devices, or that their network cannot hold.
    """
    devices = jax.devices() if devices is None else devices
    sizes, found = axis_sizes(config, len(devices))
    if found:
        raise UsageError("; ".join(found))
    mesh = _lay(sizes, devices)
    if mesh is None:
        torus = " x ".join(str(max(axis) + 1) for axis in zip(*(device.coords for device in devices), strict=True))
        raise UsageError(
            f"mesh: {_named(sizes)} cannot be laid on a torus of {torus} chips; the nearest that can: "
            f"{_named(_nearest_laid(sizes, devices))}"
        )
    return mesh


def _lay(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh | None:
    """Neighbours on an axis of the mesh are neighbours in the network; None where the network has no such shape."""
    # Auto, not jax's default Explicit: the compiler propagates shardings from the parameters and the batch.
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=np.asarray(devices))
    except NotImplementedError:  # no side of the torus, nor several together, has such a size: a part of one may
        pass
    try:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):
        return None
    return Mesh(laid, MESH_AXES, axis_types=types)


def _nearest_laid(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> dict[str, int]:
    """The sizes that the network can hold and that differ least, as factors; the devices along one axis always do."""

    def splits(count: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (count,)
            return
        for n in divisors_near(count, count, count):
            yield from ((n, *others) for others in splits(count // n, axes - 1))

    def distance(shape: tuple[int, ...]) -> float:
        return sum(abs(math.log(n / size)) for n, size in zip(shape, sizes.values(), strict=True))

    shapes = sorted(splits(len(devices), len(sizes)), key=distance)
    return next(found for shape in shapes if _lay(found := dict(zip(sizes, shape, strict=True)), devices))


def _named(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there: shapes, shardings and bytes, but nothing runs on it."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def partition_spec(*logical_axes: str | None) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names (None: not spread)."""
    rules = dict(RULES)
    return PartitionSpec(*(None if name is None else rules[name] for name in logical_axes))


def logical_axes(parameter: nnx.Variable) -> tuple[str | None, ...]:
    """The names of a parameter's dimensions."""
    return parameter.get_metadata().get("out_sharding") or (None,) * parameter.ndim


def parameters(params: nnx.State) -> dict[str, nnx.Variable]:
    """Parameters by dotted path: "units.blocks.0.mixer.q.kernel"."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable)}


def parameter_specs(params: nnx.State, overrides: str = "") -> dict[str, PartitionSpec]:
    """Mesh axes by dotted path: of the first of `overrides` whose regex is found in it, else of the rule table.

    Raises:
      UsageError: an override that matches no parameter, or that has not an entry for each dimension.
    """
    named, rules, found = parameters(params), parse_overrides(overrides), []
    for regex, _ in rules:
        if not any(re.search(regex, name) for name in named):
            near = nearest(regex, named, 4)
            found.append(f"mesh.overrides: {regex!r} matches no parameter; nearest: {near} (--dry_run shows all)")
    specs, wrong = {}, set()
    for name, parameter in named.items():
        regex, axes = next(((regex, axes) for regex, axes in rules if re.search(regex, name)), ("", None))
        if axes is None:
            specs[name] = partition_spec(*logical_axes(parameter))
            continue
        specs[name] = PartitionSpec(*(dimension or None for dimension in axes))
        if len(axes) != parameter.ndim and regex not in wrong:
            wrong.add(regex)
            found.append(
                f"mesh.overrides: {regex!r} has {len(axes)} dimension(s), and {name} has {parameter.ndim}: "
                f"{'|'.join(map(str, logical_axes(parameter)))}; write none for one that stays whole"
            )
    if found:
        raise UsageError("\n       ".join(found))
    return specs


def named_shardings(abstract_state: Any, mesh: Mesh | AbstractMesh, specs: Mapping[str, PartitionSpec]) -> Any:
    """A NamedSharding for each leaf of a state of NNX variables; what is no variable is everywhere.

    Args:
      specs: of `parameter_specs`. What an optimizer keeps of a parameter, at a path that ends in the parameter's, lies
        as the parameter does.
    """

    def place(path, leaf):
        spec = PartitionSpec()
        if _is_variable(leaf):
            parts = dotted(path).split(".")
            spec = next(specs[name] for i in range(len(parts)) if (name := ".".join(parts[i:])) in specs)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree_util.tree_map_with_path(place, abstract_state, is_leaf=_is_variable)


def devices_of(spec: PartitionSpec, sizes: Mapping[str, int]) -> list[tuple[tuple[str, ...], int]]:
    """Of each dimension, the axes of more than one device that it is spread over, and their devices."""
    dimensions = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    return [
        (tuple(axis for axis in axes if sizes[axis] > 1), math.prod(sizes[axis] for axis in axes))
        for axes in dimensions
    ]


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def dotted(path: Sequence[Any]) -> str:
    """A path in a tree as settings and checkpoints write it: "units.blocks.0.mixer.q.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of a [batch, time] array."""
    return NamedSharding(mesh, partition_spec("batch", "time"))


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
