"""`model.mixer` as layers, and the widths that follow from them."""

import copy
import dataclasses
import functools
from typing import Any

from zoo import lists
from zoo.config.sections import ModelConfig
from zoo.errors import UsageError
from zoo.layers import MLPS
from zoo.mixers import MIXERS, passes
from zoo.settings import declarations, nearest, shown

MLP_LAYER = "mlp"  # in a pattern: an MLP as a layer of its own


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer of the repeating unit."""

    name: str  # as the pattern has it: "attention@window=512"
    family: str  # or MLP_LAYER
    settings: Any  # the family's section of the config, with what the place sets; None of MLP_LAYER
    passes: int = 1  # of the mixer over the time
    copies: int = 1  # of the mixer's parameters, one a pass unless they are shared

    @property
    def longest(self) -> int | None:
        """Of the mixer, as `Mixer.longest`."""
        return None if self.family == MLP_LAYER else MIXERS[self.family].longest(self.settings)

    def num_parameters(self, d_model: int) -> int:
        """Of the mixer."""
        if self.family == MLP_LAYER:
            return 0
        return self.copies * MIXERS[self.family].num_parameters(self.settings, d_model)

    def flops_per_token(self, d_model: int, context_length: int) -> float:
        """Of the mixer, as `Mixer.flops_per_token`."""
        if self.family == MLP_LAYER:
            return 0.0
        return self.passes * MIXERS[self.family].flops_per_token(self.settings, d_model, context_length)


def pattern(model: ModelConfig) -> list[str]:
    """The families of the repeating unit."""
    return [family for family, _ in lists.places(model.mixer)]


def places(model: ModelConfig) -> list[Place]:
    """The layers of the repeating unit, of known families.

    Raises:
      UsageError: a setting of a place that its family lacks, or a value that it cannot have.
    """
    return [_place(model, family, own) for family, own in lists.places(model.mixer)]


def _place(model: ModelConfig, family: str, own: tuple[tuple[str, str], ...]) -> Place:
    name = "@".join([family, *(f"{setting}={value}" for setting, value in own)])
    if family == MLP_LAYER:
        if own:
            raise UsageError(
                f"model.mixer: {shown(name)}: an MLP has no settings of its own place; set model.mlp, model.d_ff"
            )
        return Place(name, family, None)
    settings = copy.deepcopy(getattr(model, family))
    known = dict(declarations(type(settings)))
    for setting_name, text in own:
        if setting_name not in known:
            near = nearest(setting_name, known, 5)
            raise UsageError(
                f"model.mixer: {shown(name)}: {family} has no setting {shown(setting_name)}; nearest: {near}"
            )
        try:
            value = known[setting_name].read(text)
            problem = known[setting_name].problem(value)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise UsageError(f"model.mixer: {shown(name)}: {setting_name}: {problem}")
        *sections, last = setting_name.split(".")
        setattr(functools.reduce(getattr, sections, settings), last, value)
    runs = passes(MIXERS[family], model.direction)
    return Place(name, family, settings, runs, 1 if model.direction_shared else runs)


def mlp_width(model: ModelConfig, place: Place) -> int:
    """The inner width of a layer's MLP; 0 if it has none.

    With `d_ff` 0 it is what brings the layer (mixer and MLP) to 12 d_model^2 parameters, so that families whose
    mixers differ in size compare at equal size; rounded to a multiple of 8, of 64 from d_model 512 on.
    """
    if place.family != MLP_LAYER and model.mlp == "none":
        return 0
    if model.d_ff:
        return model.d_ff
    mixer, mlp = place.num_parameters(model.d_model), mlp_class(model)
    multiple = 64 if model.d_model >= 512 else 8
    return round(mlp.width(model.d_model, 12 * model.d_model**2 - mixer) / multiple) * multiple


def positions(model: ModelConfig, length: int) -> int:
    """Of an input of `length` tokens or steps."""
    return length // model.patch


def mlp_class(model: ModelConfig) -> type:
    """Of the blocks, and of MLPs that are layers of their own."""
    return MLPS[model.mlp_layer if model.mlp == "none" else model.mlp]
