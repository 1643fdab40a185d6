"""The leaves of a state by name, as a checkpoint has them."""

from typing import Any

import jax

from zoo.errors import UsageError
from zoo.sharding import dotted


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: "embed.embedding", "units.blocks.0.mixer.q.kernel"."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # An nnx.Variable adds ".value" to the path of the array that it holds.
        named[dotted(path).removesuffix(".value")] = leaf
    return named


def with_leaves(tree: Any, named: dict[str, Any]) -> Any:
    """`tree` with its leaves replaced by those that `named_leaves` would call so."""
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in named_leaves(tree)])


def shapes(tree: Any) -> dict[str, list[int]]:
    """Of the leaves, by dotted path."""
    return {name: list(x.shape) for name, x in named_leaves(tree).items()}


def check_parameters(where: str, found: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """UsageError naming the parameters that differ between what `where` holds and what the config makes."""
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if not names:
        return
    differences = [f"{n}: {found.get(n, 'missing')} there, {wanted.get(n, 'missing')} in this config" for n in names]
    shown = "; ".join(differences[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
    raise UsageError(
        f"{where} is of another architecture: {shown}. Use the model that it was trained with, or another --workdir"
    )
