"""The grid of devices: its axes, the settings that size it, and how it lies on a TPU's torus."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from zoo import lists
from zoo.errors import UsageError
from zoo.settings import divisors_near, one_of, problems, setting

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
REST = {-1: "what the others leave"}


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
