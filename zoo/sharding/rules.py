"""The rule table: which mesh axes an array's dimensions are spread over, by what the dimensions mean.

Parameters and activations name their dimensions ("embed", "heads", "batch"); the table says where each name goes,
unless `mesh.overrides` does for a parameter.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from zoo.errors import UsageError
from zoo.settings import nearest
from zoo.sharding.mesh import parse_overrides

# Logical name -> mesh axes. Every name that a parameter or an activation uses stands here.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),  # sequences of a batch
    ("time", "sequence"),  # tokens of a sequence
    ("layers", None),  # depth, where the repeating unit is stacked
    ("embed", "fsdp"),  # the model's width, in parameters
    ("heads", "tensor"),  # heads x head width, in projections
    ("mlp", "tensor"),  # the MLP's inner width
    ("vocab", "tensor"),  # entries of the vocabulary
    ("classes", None),  # labels of rows
    ("patch", None),  # numbers of a patch, or of a horizon
    ("norm", None),  # scales, biases and other vectors: small, on every device
    ("gates", None),  # one gate a head, and the few mixtures of a token shift
    ("width", None),  # the model's width, where both sides of a projection are that wide
    ("rank", None),  # the narrow side of low-rank projections
    ("state", None),  # entries of a channel's state, taps of its convolution
    ("positions", None),  # learned positions
)


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
        as the parameter does; what else it keeps, by its own axes.
    """

    def place(path, leaf):
        spec = PartitionSpec()
        if _is_variable(leaf):
            parts = dotted(path).split(".")
            names = (".".join(parts[i:]) for i in range(len(parts)))
            own = partition_spec(*logical_axes(leaf))
            spec = next((specs[name] for name in names if name in specs), own)
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
