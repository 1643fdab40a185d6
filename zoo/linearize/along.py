"""Two models layer by layer, along the residual stream of the first."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from kernels.array_typing import Array, Float, Int
from zoo import sharding
from zoo.linearize.transfer import Layers, walk
from zoo.model import LanguageModel, positions_of

Mixed = Callable[[], jax.Array]  # what a mixer adds to the stream, when it is called
# (place, the teacher's, the model's, carry, of the unit) -> (what is added to the stream, carry)
Visit = Callable[[Layers, Mixed, Mixed, Any, Any], tuple[jax.Array, Any]]


def along(
    teacher: LanguageModel,
    model: LanguageModel,
    tokens: Int[Array, "B T"],
    visit: Visit,
    carry: Any,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    step: Int[Array, ""] | None = None,
    of_units: Any = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Read `tokens` with all of the teacher but its mixers, in whose places `visit` says what is added.

    The depth is scanned in units of the patterns' least common multiple.

    Args:
      visit: called at each place of that unit that has a mixer; each of the two mixers has the norms of its model, and
        computes nothing unless it is called.
      carry: what it hands on from layer to layer.
      of_units: [units, ...], of which it gets the unit's.

    Returns:
      the stream behind the last layer, before the norm; the carry.
    """
    positions = positions_of(tokens.shape, segment_ids, None)
    x = teacher.embedded(tokens, positions)
    both = teacher, model
    of_input = [each.on_input(x, segment_ids, None)[0] for each in both]
    depths = [teacher.over_depth(), model.over_depth(step)]
    parts = [[nnx.split(block) for block in each.units.blocks] for each in both]
    lengths = [len(each.pattern) for each in both]
    places = list(walk(*lengths))

    def rows(layers: Layers) -> list[Any]:
        """Parameters and depths of the layers of a place, stacked, of the teacher and of the model."""
        at = layers.source, layers.target
        stacked = [(parts[i][place][1], depths[i][place]) for i, place in enumerate(at)]
        return [
            jax.tree.map(lambda leaf, length=length: layers.rows(leaf, length), of)
            for of, length in zip(stacked, lengths, strict=True)
        ]

    def unit(carry, per_unit):
        (x, carry), (per_place, of_unit) = carry, per_unit

        def mixed(i: int, place: int, row: Any, x: jax.Array) -> Mixed:
            def compute():
                block = nnx.merge(parts[i][place][0], row[0])
                given = {"segment_ids": segment_ids, "positions": positions}
                return block.mixed(x, **given, depth=row[1], of_input=of_input[i][place])[0]

            return compute

        for layers, (theirs, own) in zip(places, per_place, strict=True):
            block = nnx.merge(parts[0][layers.source][0], theirs[0])
            if block.has_mixer:
                of_both = mixed(0, layers.source, theirs, x), mixed(1, layers.target, own, x)
                y, carry = visit(layers, *of_both, carry, of_unit)
                x = x + y
            if block.has_mlp:
                x = x + block.transformed(x, segment_ids=segment_ids)[0]
            x = sharding.constrain(x, "batch", "time", None)
        return (x, carry), None

    per_unit = [rows(layers) for layers in places], of_units
    return jax.lax.scan(model.rematerialised(unit), (x, carry), per_unit)[0]
