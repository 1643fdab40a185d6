"""How a run lies on its mesh: what does not fit is refused before anything is compiled, and --dry_run shows what does.

All of it is shapes: no array is made, and the devices need not be there.
"""

import copy
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from zoo import config as zoo_config
from zoo import flops, linearize, memory, sharding
from zoo.config import Config, ModelConfig
from zoo.errors import UsageError
from zoo.model import LanguageModel
from zoo.settings import divisors_near, one_of
from zoo.training import step

Spread = tuple[tuple[str, ...], int]  # mesh axes, and devices along them all


def check(config: Config, devices: int) -> dict[str, int]:
    """Devices along each mesh axis, of a config with its vocabulary settled.

    Raises:
      UsageError: with every problem found, one a line: sizes that do not multiply to the devices; sequences, tokens,
        heads or dimensions of parameters that do not spread evenly; overrides that fit no parameter.
    """
    as_it_is = devices == 1 and not config.mesh.overrides
    return _checked(config, devices, None if as_it_is else step.abstract_model(config))


def check_other(where: str, config: Config, model: ModelConfig, devices: int) -> None:
    """UsageError if the parameters of another run's model do not spread over the mesh of `config`."""
    config = copy.deepcopy(config)
    config.model, config.mesh.overrides = model, ""
    try:
        check(config, devices)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _checked(config: Config, devices: int, model: LanguageModel | None) -> dict[str, int]:
    """`check`; `model` is None where one device holds it as it is."""
    sizes, found = sharding.axis_sizes(config.mesh, devices)
    found += _batch_problems(config, sizes)
    if model is not None:
        found += _head_problems(config, model, sizes) + _parameter_problems(config, model, sizes)
    zoo_config.refuse(found)
    return sizes


def _batch_problems(config: Config, sizes: Mapping[str, int]) -> list[str]:
    train, found = config.train, []
    rows, tokens = (_spread(sharding.partition_spec(name), sizes) for name in ("batch", "time"))
    if train.batch_size // train.accumulate_steps % rows[1]:
        what = f"train.batch_size: {train.batch_size} sequences"
        what += f" in {train.accumulate_steps} microbatches" if train.accumulate_steps > 1 else ""
        found.append(_uneven(what, train.batch_size, rows, train.accumulate_steps))
    if config.eval.batch_size % rows[1]:
        found.append(_uneven(f"eval.batch_size: {config.eval.batch_size} sequences", config.eval.batch_size, rows))
    length = zoo_config.positions(config.model, train.context_length)
    if length % tokens[1]:
        what = "tokens" if config.model.patch == 1 else f"steps in patches of {config.model.patch}"
        what = f"train.context_length: {train.context_length} {what}"
        found.append(_uneven(what, train.context_length, tokens, config.model.patch))
    return found


def _head_problems(config: Config, model: LanguageModel, sizes: Mapping[str, int]) -> list[str]:
    spread, found = _spread(sharding.partition_spec("heads"), sizes), {}
    for family, block in zip(zoo_config.pattern(config.model), model.units.blocks, strict=True):
        for setting, heads in block.mixer.spread_over_tensor().items() if block.has_mixer else ():
            if heads % spread[1]:
                what = "heads" if setting != "groups" else "groups of heads"
                found[family, setting] = _uneven(f"model.{family}.{setting}: {heads} {what}", heads, spread)
    return list(found.values())


def _parameter_problems(config: Config, model: LanguageModel, sizes: Mapping[str, int]) -> list[str]:
    params = nnx.state(model, nnx.Param)
    try:
        specs = sharding.parameter_specs(params, config.mesh.overrides)
    except UsageError as error:
        return [str(error)]
    where: dict[tuple[str, int, Spread], list[str]] = {}
    for name, parameter in sharding.parameters(params).items():
        axes, spreads = sharding.logical_axes(parameter), sharding.devices_of(specs[name], sizes)
        for axis, size, spread in zip(axes, parameter.shape, spreads, strict=True):
            if size % spread[1]:
                where.setdefault((str(axis), size, spread), []).append(name)
    return [_uneven(f"{_first(names)}: {axis} = {size}", size, spread) for (axis, size, spread), names in where.items()]


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _spread(spec: jax.sharding.PartitionSpec, sizes: Mapping[str, int]) -> Spread:
    return sharding.devices_of(spec, sizes)[0]


def _uneven(what: str, size: int, spread: Spread, pieces: int = 1) -> str:
    """`what` does not spread, with the nearest sizes and numbers of devices that would; each of `pieces` has to."""
    axes, devices = " * ".join(f"mesh.{axis}" for axis in spread[0]), spread[1]
    multiple = devices * pieces
    fitting = sorted({max(multiple, size // multiple * multiple), -(-size // multiple) * multiple})
    other = one_of(n for n in divisors_near(size // pieces, devices) if n != devices)
    verb = "do" if what[-1] == "s" else "does"
    return f"{what} {verb} not spread over {axes} = {devices}; use {one_of(fitting)}, or {axes} = {other}"


def dry_run(config: Config, devices: int = 0) -> str:
    """Every parameter of a run: shape, logical and mesh axes, bytes in all and on a device; the batch, and totals.

    Args:
      config: with its vocabulary settled.
      devices: 0: as many as the mesh's sizes need, or this machine's where those divide them.

    Raises:
      UsageError: as `check`.
    """
    abstract = step.abstract_model(config)
    sizes = _checked(config, devices or _devices(config), abstract)
    mesh = sharding.abstract_mesh(sizes)
    state = step.abstract_state(config, mesh, nnx.state(abstract, nnx.Param))
    batch = step.batch_arrays(config)
    shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    model, rows = config.model, sharding.devices_of(sharding.partition_spec("batch"), sizes)[0][1]
    lines = [
        f"mesh        {shape}: {mesh.size:,} device{'s' if mesh.size > 1 else ''}",
        f"model       {model.num_layers} layers of width {model.d_model}, vocabulary {model.vocab_size}, "
        f"{flops.num_parameters(model):,} parameters",
        *textwrap.wrap(
            ", ".join(zoo_config.pattern(model)), 100, initial_indent="mixer       ", subsequent_indent=" " * 12
        ),
        f"optimizer   {config.optimizer.name}; what it keeps of a parameter lies as the parameter does",
        "",
        "Of each dimension: its name, its size and, after a slash, the mesh axes that it is spread over",
        "",
    ]
    named = sharding.parameters(state.params)
    placed = {name: (jax.tree.leaves(p)[0], sharding.logical_axes(p)) for name, p in named.items()}
    lines += _table("parameter", placed, sizes)
    arrays = {
        name: (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_placed(mesh, x.axes)), x.axes)
        for name, x in batch.items()
    }
    lines += ["", *_table("batch", arrays, sizes)]
    pieces, evaluated = config.train.accumulate_steps, config.eval.batch_size or config.train.batch_size
    a_device = config.train.batch_size // pieces // rows
    lines += [
        "",
        f"a step      {pieces} x {config.train.batch_size // pieces} sequences, on a device {pieces} x {a_device} of "
        f"{config.train.context_length // sizes['sequence']} tokens",
        f"evaluation  {evaluated} sequences at once, on a device {evaluated // rows}",
        "",
        f"{'':12}{'all':>10}{'a device':>12}",
    ]
    totals = {"parameters": state.params, "gradients": state.params, "optimizer": state.opt}
    if config.train.distill.teacher:
        totals["teacher"] = linearize.Distillation(config, mesh).abstract
    of_all = [bytes_of(jax.tree.leaves(tree)) for tree in totals.values()] + [bytes_of(x for x, _ in arrays.values())]
    for name, (everywhere, each) in zip([*totals, "batch"], of_all, strict=True):
        lines.append(f"{name:12}{memory.amount(everywhere):>10}{memory.amount(each):>12}")
    each = sum(each for _, each in of_all)
    lines += [
        f"{'together':12}{memory.amount(sum(n for n, _ in of_all)):>10}{memory.amount(each):>12}",
        "",
        "Activations come on top. Nothing was compiled, allocated or written.",
    ]
    return "\n".join(lines)


def _placed(mesh: AbstractMesh, axes: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(mesh, sharding.partition_spec(*axes))


def _devices(config: Config) -> int:
    """The devices of a mesh without their number: what the sizes need, or this machine's where an axis is open."""
    sizes = [getattr(config.mesh, axis) for axis in sharding.MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and jax.device_count() % fixed == 0:
        return jax.device_count()
    return fixed


def bytes_of(leaves: Iterable[jax.ShapeDtypeStruct]) -> tuple[int, int]:
    """In all, and on a device."""
    leaves = list(leaves)
    each = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return sum(x.size * x.dtype.itemsize for x in leaves), each


def _table(head: str, arrays: Mapping[str, tuple[Any, tuple[str | None, ...]]], sizes: Mapping[str, int]) -> list[str]:
    rows = [(head, "dimensions", "dtype", "all", "a device")]
    for name, (x, axes) in arrays.items():
        everywhere, each = map(_short, bytes_of([x]))
        rows.append((name, _dimensions(x, axes, x.sharding, sizes), x.dtype.name, everywhere, each))
    if len(dtypes := {row[2] for row in rows[1:]}) == 1:  # said once, which leaves room
        rows = [(name, shape, "", *of_bytes) for name, shape, _, *of_bytes in rows]
        rows[0] = (head, f"dimensions, {dtypes.pop()}", "", *rows[0][3:])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        " ".join(f"{cell:{'<<<>>'[i]}{widths[i]}}" for i, cell in enumerate(row) if widths[i]).rstrip() for row in rows
    ]


def _dimensions(x: Any, axes: tuple[str | None, ...], placed: NamedSharding, sizes: Mapping[str, int]) -> str:
    """ "layers=24 embed=2048/fsdp heads=1024/tensor"."""
    spreads = sharding.devices_of(placed.spec, sizes)
    return " ".join(
        f"{axis or '-'}={size}" + (f"/{'+'.join(mesh_axes)}" if mesh_axes else "")
        for axis, size, (mesh_axes, _) in zip(axes, x.shape, spreads, strict=True)
    )


def _short(size: int) -> str:
    """ "50.3M", of bytes."""
    for unit, scale in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g}{unit}"
    return str(size)
