"""A model's parameters from those of another, whose layers have other mixers.

What lies around the mixers is kept as it is. A mixer of the same family and shapes is kept too; another takes over from
softmax attention what its own file says (`Mixer.from_softmax`), and starts fresh where nothing came.

The patterns of the two models may differ in length: layers are walked over their least common multiple, at each place
of which both have one block, whose layers are rows of its stacked parameters and go through `jax.vmap`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.checkpoints import named_leaves, shapes, with_leaves
from zoo.config import ModelConfig, mlp_width, places
from zoo.errors import UsageError
from zoo.mixers import CAUSAL, Mixer
from zoo.model import LanguageModel

FRESH = "fresh"
OF_HEAD = ("vocab_size", "tie_embeddings")  # and of the embedding
AGREE = ("num_layers", "d_model", "vocab_size", "direction", "tie_embeddings", "mlp", "norm", "norm_position")


class Origin(NamedTuple):
    """Where a parameter came from."""

    name: str
    shape: tuple[int, ...]
    of: str


class Layers(NamedTuple):
    """Of one place of the common pattern: the layers that both models have there."""

    place: int
    count: int  # of places
    source: int  # the block, in its pattern
    target: int

    def rows(self, leaf: jax.Array, length: int) -> jax.Array:
        """Of a leaf that is stacked over the units of a pattern of `length`."""
        return leaf[self.place // length :: self.count // length]


class Transfer:
    """Parameters of `target` from those of `source`; the table of where each came from.

    Nothing is computed yet; what cannot be done is a UsageError here.

    Args:
      where: what the source is, for messages: "--init_from=runs/a".
      source, target: their configs, with vocabularies settled.
      models: the two, abstract.
      span: tokens of the contexts that the source was trained on.
      anew: beginnings of the parameters that start fresh whatever the source has: of another head.
    """

    def __init__(
        self,
        where: str,
        source: ModelConfig,
        target: ModelConfig,
        models: tuple[LanguageModel, LanguageModel],
        span: int,
        anew: tuple[str, ...] = (),
    ):
        self._where, self._span, self._anew = where, span, anew
        self._check_settings(source, target)
        self._origins: dict[str, str] = {}
        self._graphs, params = zip(*(nnx.split(model, nnx.Param) for model in models), strict=True)
        self._check_kept(*models)
        jax.eval_shape(self, *params)
        self.table = [Origin(name, x.shape, self._origins[name]) for name, x in named_leaves(params[1]).items()]

    def __call__(self, source: nnx.State, fresh: nnx.State) -> nnx.State:
        """The parameters of the target, of those of the source and of fresh ones."""
        models = tuple(nnx.merge(graph, params) for graph, params in zip(self._graphs, (source, fresh), strict=True))
        theirs, found = named_leaves(source), named_leaves(fresh)
        for name in found:
            if name.startswith(self._anew):
                self._origins[name] = FRESH
            elif not name.startswith("units."):
                found[name], self._origins[name] = theirs[name], "kept"
        parts: dict[str, list[jax.Array]] = {}
        for layers in walk(*(len(model.pattern) for model in models)):
            for name, value in self._block(layers, *models).items():
                parts.setdefault(name, []).append(value)
        for name, rows in parts.items():
            # Of layers p, p + length, ... of each place p of the common pattern, in the order of layers.
            found[name] = jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])
        return with_leaves(fresh, found)

    def lines(self) -> list[str]:
        """The table, one line a parameter; stacked ones of all layers of a place."""
        width = max(len(row.name) for row in self.table)
        size = max(len(str(list(row.shape))) for row in self.table)
        return [f"{row.name:{width}}  {list(row.shape)!s:{size}}  {row.of}" for row in self.table]

    def _block(self, layers: Layers, source: LanguageModel, target: LanguageModel) -> dict[str, jax.Array]:
        """The parameters of one place, by their paths in the model, each [layers, ...]."""
        blocks = source.units.blocks[layers.source], target.units.blocks[layers.target]
        lengths = len(source.pattern), len(target.pattern)
        theirs, found = (
            {name: layers.rows(x, length) for name, x in named_leaves(nnx.state(block, nnx.Param)).items()}
            for block, length in zip(blocks, lengths, strict=True)
        )
        mixer = "mixer."
        of = dict.fromkeys((name for name in found if not name.startswith(mixer)), "kept")
        if _same_mixer(layers, source, target):
            of |= dict.fromkeys((name for name in found if name.startswith(mixer)), "kept")
        found |= {name: theirs[name] for name in of}
        if len(of) < len(found):
            family = target.pattern[layers.target]
            of |= {name: FRESH for name in found if name.startswith(mixer)}
            values, words = self._taken_over(layers, lengths, *(block.mixer for block in blocks), family)
            for name in words:
                if mixer + name not in found:
                    raise ValueError(f"{family} takes over {name}, which is none of its parameters")
            found |= {mixer + name: value for name, value in values.items()}
            of |= {mixer + name: text for name, text in words.items()}
        prefix = f"units.blocks.{layers.target}."
        for name, text in of.items():
            before = self._origins.get(prefix + name, text)
            self._origins[prefix + name] = text if before == text or text in before else f"{before}; {text}"
        return {prefix + name: value for name, value in found.items()}

    def _taken_over(self, layers, lengths, theirs, own, family):
        graphs, states = zip(*(nnx.split(mixer, nnx.Param) for mixer in (theirs, own)), strict=True)
        states = tuple(
            jax.tree.map(lambda x, length=length: layers.rows(x, length), state)
            for state, length in zip(states, lengths, strict=True)
        )
        words: dict[str, str] = {}

        def one(theirs, own):
            theirs, own = (nnx.merge(graph, state) for graph, state in zip(graphs, (theirs, own), strict=True))
            softmax = theirs.as_softmax(self._span)
            try:
                taken = own.from_softmax(softmax)
            except UsageError as error:
                raise UsageError(f"{self._where}: attention -> {family}: {error}") from error
            words.update({name: entry.of for name, entry in taken.items()})
            return {name: entry.value for name, entry in taken.items() if entry.value is not None}

        return jax.vmap(one)(*states), words

    def _check_settings(self, source: ModelConfig, target: ModelConfig) -> None:
        names = [name for name in AGREE if getattr(source, name) != getattr(target, name)]
        names = [name for name in names if not (self._anew and name in OF_HEAD)]
        learned = "learned"
        if learned in (source.positions, target.positions) and source.positions != target.positions:
            names.append("positions")
        if names:
            raise UsageError(
                f"{self._where} is of another architecture: "
                + "; ".join(
                    f"model.{name}: {getattr(source, name)} there, {getattr(target, name)} here" for name in names
                )
                + ". Only mixers may differ; use the model that it was trained with but for them"
            )
        if target.direction != CAUSAL:
            raise UsageError(
                f"{self._where}: {source.mixer} -> {target.mixer}: a bidirectional mixer takes nothing over from "
                "another family; set model.direction=causal, or the mixer that it was trained with"
            )

    def _check_kept(self, source: LanguageModel, target: LanguageModel) -> None:
        """UsageError for what is no mixer and differs, and for mixers that have nothing to hand on."""
        differ, apart = {}, ("units.", *self._anew)
        outside = [{n: s for n, s in shapes(nnx.state(m, nnx.Param)).items() if not n.startswith(apart)}
                   for m in (source, target)]  # fmt: skip
        _compare(differ, "", *outside)
        for layers in walk(len(source.pattern), len(target.pattern)):
            blocks = source.units.blocks[layers.source], target.units.blocks[layers.target]
            families = source.pattern[layers.source], target.pattern[layers.target]
            inside = [{n: s[1:] for n, s in shapes(nnx.state(b, nnx.Param)).items() if not n.startswith("mixer.")}
                      for b in blocks]  # fmt: skip
            where = f"layer {layers.place} ({families[0]} -> {families[1]}): "
            _compare(differ, where, *inside)
            if blocks[0].has_mixer and blocks[1].has_mixer and not _same_mixer(layers, source, target):
                if type(blocks[0].mixer).as_softmax is Mixer.as_softmax:
                    raise UsageError(
                        f"{self._where}: {where}{families[0]} has nothing that another family takes over; only softmax "
                        f"attention has. Keep {families[0]} at that layer of model.mixer"
                    )
        if differ:
            shown = "; ".join(f"{name}: {a} there, {b} here" for name, (a, b) in list(differ.items())[:6])
            advice = (
                "; model.d_ff sets the width of MLPs, and 0 another one for another mixer" if "mlp." in shown else ""
            )
            raise UsageError(f"{self._where}: what is no mixer is kept, and differs: {shown}{advice}")


def same_parameters(source: LanguageModel, target: LanguageModel, anew: tuple[str, ...] = ()) -> bool:
    """Whether the target takes the source's parameters as they are: the same families, the same shapes.

    `anew`: as in `Transfer`.
    """
    count = math.lcm(len(source.pattern), len(target.pattern))
    layers = [[model.pattern[i % len(model.pattern)] for i in range(count)] for model in (source, target)]
    of = [
        {name: shape for name, shape in shapes(nnx.state(model, nnx.Param)).items() if not name.startswith(anew)}
        for model in (source, target)
    ]
    return layers[0] == layers[1] and of[0] == of[1]


def settled_width(source: ModelConfig, target: ModelConfig) -> int:
    """`model.d_ff` of the target: where 0 would give its MLPs other widths than the source has, those."""
    if target.d_ff or source.mlp != target.mlp:
        return target.d_ff
    widths = [[mlp_width(model, place) for place in places(model)] for model in (source, target)]
    count = math.lcm(*map(len, widths))
    theirs, own = ([of[i % len(of)] for i in range(count)] for of in widths)
    distinct = {width for width in theirs if width}
    return 0 if theirs == own or len(distinct) != 1 else distinct.pop()


def walk(source: int, target: int) -> Iterator[Layers]:
    """The places of the common pattern of two, of so many layers each."""
    count = math.lcm(source, target)
    for place in range(count):
        yield Layers(place, count, place % source, place % target)


def _same_mixer(layers: Layers, source: LanguageModel, target: LanguageModel) -> bool:
    if source.pattern[layers.source] != target.pattern[layers.target]:
        return False
    of = [nnx.state(m.units.blocks[i], nnx.Param) for m, i in ((source, layers.source), (target, layers.target))]
    theirs, own = ({n: s[1:] for n, s in shapes(state).items() if n.startswith("mixer.")} for state in of)
    return theirs == own


def _compare(differ, where, theirs, own) -> None:
    for name in sorted(theirs.keys() | own.keys()):
        if theirs.get(name) != own.get(name):
            differ[where + name] = theirs.get(name, "missing"), own.get(name, "missing")
