"""What each layer of softmax attention is worth: what it costs to put another mixer in its place alone.

A layer's cost is the loss of the model with that one layer replaced, less the loss of the model as it is. Which layers
those are is an input of one program, and a layer computes the mixer that it is told to (`Swapped`): all layers, and all
sets of them, come for the price of one compilation. Layers are kept by their cost, the dearest first, and held against
as many that stand evenly over the depth (Wang et al. 2024, arXiv:2408.15237, keep every n-th). Costs are not additive:
what is measured of a set is measured of all of it.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from zoo import lists
from zoo.config import ModelConfig, places, validate_model
from zoo.data.rows import Batch
from zoo.errors import UsageError
from zoo.figures import Chart, Line, Table, shown
from zoo.linearize.along import along
from zoo.linearize.distill import replaced_layers
from zoo.linearize.transfer import settled_width
from zoo.mixers import MIXERS, Mixer
from zoo.model import LanguageModel

BY = {"loss": "validation loss", "recall_loss": "loss of the recalled answers"}
Figures = dict[str, float]  # loss and bits_per_byte of text; recall, a share, and recall_loss


class Rows(NamedTuple):
    """What is read, again and again: batches of one shape."""

    batches: Sequence[Batch]
    labels: int | None  # targets of a row that count; None: all


def with_mixer(model: ModelConfig, mixer: str) -> ModelConfig:
    """`model` with `mixer`, "gla" or "gla@expand_k=1", in place of each layer of softmax attention.

    Raises:
      UsageError: several mixers, or one that does not fit; no softmax attention to replace.
    """
    if mixer.count(",") or not mixer.strip():
        raise UsageError(f"--mixer: got {mixer!r}, expected one family, with settings or without: gla@expand_k=1")
    try:
        lists.places(mixer)
    except ValueError as error:
        raise UsageError(f"--mixer: {error}") from error
    found, was = copy.deepcopy(model), places(model)
    found.mixer = ",".join(mixer if _is_softmax(place.family) else place.name for place in was)
    validate_model(found)
    found.d_ff = settled_width(model, found)
    if not any(_is_softmax(place.family) for place in was):
        raise UsageError(f"--workdir: {model.mixer} has no layer of softmax attention to replace")
    if not replaced_layers(model, found):
        raise UsageError(f"--mixer: {mixer} is what the run has; name another family, or other settings of it")
    return found


def _is_softmax(family: str) -> bool:
    return family in MIXERS and MIXERS[family].as_softmax is not Mixer.as_softmax


def swappable(source: ModelConfig, target: ModelConfig) -> list[int]:
    """The layers whose mixers differ, by their numbers."""
    return sorted(
        layer for of in replaced_layers(source, target) for layer in range(of.place, source.num_layers, of.count)
    )


class Swapped:
    """A model in some of whose layers the mixers of another, of the same depth, stand in for its own.

    Args:
      configs: of the two.
    """

    def __init__(self, teacher: LanguageModel, model: LanguageModel, configs: tuple[ModelConfig, ModelConfig]):
        places = replaced_layers(*configs)
        self._depth, count = configs[0].num_layers, places[0].count
        (theirs, self._params), (own, self._others) = (nnx.split(each, nnx.Param) for each in (teacher, model))

        @jax.jit
        def hidden(params, others, swapped, tokens, segment_ids):
            both = nnx.merge(theirs, params), nnx.merge(own, others)

            def visit(layers, of_teacher, of_model, carry, of_unit):
                if layers not in places:
                    return of_teacher(), carry
                return jax.lax.cond(of_unit[layers.place], of_model, of_teacher), carry

            of_units = swapped.reshape(-1, count)
            x, _ = along(*both, tokens, visit, None, segment_ids=segment_ids, of_units=of_units)
            return both[0].norm(x)

        @functools.partial(jax.jit, static_argnames="labels")
        def scores(params, hidden, batch, labels):
            whole = nnx.merge(theirs, params)
            return whole.head.scores(hidden, batch, embed=whole.embed, labels=labels)

        self._hidden, self._scores, self._head = hidden, scores, teacher.head

    def figures(self, swapped: Iterable[int], rows: Rows) -> dict[str, float]:
        """What the head says of `rows` (`Head.figures`), with those layers swapped."""
        mask = np.zeros(self._depth, bool)
        mask[list(swapped)] = True
        sums: dict[str, float] = {}
        for batch in rows.batches:
            x = self._hidden(self._params, self._others, mask, batch["tokens"], batch["segment_ids"])
            for name, value in jax.device_get(self._scores(self._params, x, batch, rows.labels)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return self._head.figures(sums)


def measured(
    layers: Sequence[int],
    figures: Callable[[frozenset[int]], Figures],
    by: str = "loss",
    track: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Figures of each layer swapped alone; and of all but some, chosen by what they cost alone, and evenly spaced.

    Args:
      layers: those that can be swapped.
      figures: of a set of them.
      by: which figure ranks them, "loss" or "recall_loss".
      track: shows how far it is.

    Returns:
      As JSON: `none`, `layers` (each with its `cost`, less that of `none`), `order` (the dearest first), and `kept`: by
      the number that stay, `chosen` and `spaced`, each with the layers and their figures.
    """
    of = functools.cache(figures)
    none = of(frozenset())
    alone = [{"layer": layer} | of(frozenset([layer])) for layer in track(layers)]
    for row in alone:
        row["cost"] = row[by] - none[by]
    order = [row["layer"] for row in sorted(alone, key=lambda row: -row["cost"])]
    kept = []
    for number in track(range(len(layers) + 1)):
        sets = {"chosen": sorted(order[:number]), "spaced": evenly(layers, number)}
        of_sets = {name: {"layers": stay} | of(frozenset(layers) - frozenset(stay)) for name, stay in sets.items()}
        kept.append({"number": number} | of_sets)
    return {"by": by, "none": none, "layers": alone, "order": order, "kept": kept}


def evenly(layers: Sequence[int], number: int) -> list[int]:
    """So many of the layers, the last of as many groups of like size: of 6 two are numbers 2 and 5, as in a,a,b."""
    return [layers[(i + 1) * len(layers) // number - 1] for i in range(number)]


def pattern_of(source: ModelConfig, target: ModelConfig, stay: Iterable[int]) -> str:
    """`model.mixer` of the source's layers that stay and the target's elsewhere, as short as it can be written."""
    stay = set(stay)
    theirs, own = places(source), places(target)
    depth = source.num_layers
    names = [(theirs if layer in stay else own)[layer % len(own)].name for layer in range(depth)]
    periods = (n for n in range(1, depth + 1) if depth % n == 0)
    return ",".join(next(names[:n] for n in periods if names[:n] * (depth // n) == names))


# --- What is shown ----------------------------------------------------------------------------------------------------

_FORMS = {"loss": ".4f", "bits_per_byte": ".4f", "recall_loss": ".4f", "recall": ".2%"}
_HEADINGS = {"bits_per_byte": "bits per byte", "recall_loss": "loss of recall"}


def tables(found: Mapping[str, Any], mixer: str) -> list[Table]:
    names = [name for name in _FORMS if name in found["none"]]
    headings = [_HEADINGS.get(name, name) for name in names]

    def cells(figures: Mapping[str, float]) -> list[str]:
        return [shown(figures.get(name), _FORMS[name]) for name in names]

    rank = {layer: i for i, layer in enumerate(found["order"])}
    alone = [
        [f"{row['layer']}", f"{row['cost']:+.4f}", *cells(row)]
        for row in sorted(found["layers"], key=lambda row: rank[row["layer"]])
    ]
    title = f"{mixer} in place of one layer, the dearest first by {BY[found['by']]}"
    kept = [
        [f"{row['number']}", name, ", ".join(map(str, row[name]["layers"])) or "-", *cells(row[name])]
        for row in found["kept"]
        for name in ("chosen", "spaced")
        if name == "chosen" or row["spaced"]["layers"] != row["chosen"]["layers"]
    ]
    return [
        Table(title, ["layer", "cost", *headings], [["none", "", *cells(found["none"])], *alone], texts=1),
        Table(f"{mixer} in place of all but some", ["stay", "how", "layers", *headings], kept, texts=3),
    ]


def charts(found: Mapping[str, Any], mixer: str) -> list[Chart]:
    """`mixer` is whose all lines are."""
    of_layers = [Line("cost", [(row["layer"], row["cost"]) for row in found["layers"]], mixer)]
    drawn = [Chart(f"{mixer} in place of one layer", "layer", f"more {BY[found['by']]}", of_layers, log_x=False)]
    for name, what in (("loss", "validation loss"), ("recall", "recall, share of answers")):
        if name in found["none"]:
            lines = [
                Line(how, [(row["number"], row[how][name]) for row in found["kept"]], mixer)
                for how in ("chosen", "spaced")
            ]
            drawn.append(Chart(f"{mixer} in place of all but some", "layers that stay", what, lines, log_x=False))
    return drawn
