"""Settings that every family has, and what they do, so that no family's file speaks of them.

`Mixer.__init_subclass__` puts them around a family's own `__init__`, `init_state`, `check` and `num_parameters`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import lists
from zoo.errors import UsageError
from zoo.layers import parameter
from zoo.settings import nearest, setting, shown


@dataclasses.dataclass
class MixerConfig:
    biases: str = setting(
        "",
        "projections that have a bias, as q,k,v (q+k+v at a place of a pattern)",
        parse=lists.names,
        also=("use_bias",),
    )


@dataclasses.dataclass
class NormedMixerConfig(MixerConfig):
    norm_epsilon: float = setting(
        0.0, "of the norms in the mixer", zero="model.norm_epsilon", at_least=1e-12, at_most=1
    )


NO_STATE = (
    "model.direction is bidirectional: what a token becomes depends on those after it, so there is no state to go on "
    "from and nothing to generate; train with model.direction=causal for that"
)


def put_around(family: type, sizes_of: Callable[[int], Any]) -> None:
    """Let a family's own constructor, check and formula do what the settings of this file say.

    `sizes_of` makes a mixer's Sizes of the model's width.
    """
    own = vars(family)

    if "__init__" in own:
        init = own["__init__"]

        @functools.wraps(init)
        def with_settings(self, config, sizes, **others):
            self.causal = sizes.direction == "causal"
            if sizes.direction not in self.directions or (self.runs_twice and not self.causal):
                raise UsageError(_no_way(type(self), sizes.direction))
            init(self, config, _with_epsilon(sizes, config), **others)
            for name in _biases(config):
                add_bias(projections(self)[name])

        family.__init__ = with_settings

    if "init_state" in own:
        init_state = own["init_state"]

        @functools.wraps(init_state)
        def of_causal(self, *arguments, **others):
            if not self.causal:
                raise UsageError(NO_STATE)
            return init_state(self, *arguments, **others)

        family.init_state = of_causal

    if "check" in own:
        check = family.check

        @functools.wraps(check)
        def with_names(config, d_model):
            problems = check(config, d_model)
            if problems or not _biases(config):
                return problems
            known = _projections(family, config, sizes_of(d_model))
            unknown = [name for name in _biases(config) if name not in known]
            return [f"biases: got {shown(name)}, expected some of {nearest(name, known)}" for name in unknown]

        family.check = staticmethod(with_names)

    if "num_parameters" in own:
        count = family.num_parameters

        @functools.wraps(count)
        def with_biases(config, d_model):
            known = _projections(family, config, sizes_of(d_model)) if _biases(config) else {}
            return count(config, d_model) + sum(known[name] for name in _biases(config))

        family.num_parameters = staticmethod(with_biases)


def projections(module: nnx.Module) -> dict[str, nnx.Linear]:
    """The linear layers of a module that have no bias, by their path: "q", "qkv.q"."""
    layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(module)}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nnx.Linear) and layer.bias is None}


def add_bias(layer: nnx.Linear) -> None:
    """y = x W + b: b is 0 at the start, and has no weight decay."""
    axes = layer.kernel.get_metadata("out_sharding")
    layer.use_bias, layer.bias = True, parameter(jnp.zeros((layer.out_features,)), axes[-1:], decay=False)


def _no_way(family: type, direction: str) -> str:
    if direction in family.directions:
        return f"{family.__name__} alone runs one way; make it by zoo.mixers.make_mixer, which adds the other"
    return f"direction: got {shown(direction)}, expected {' or '.join(family.directions)}, as {family.__name__} sees"


def _biases(config: Any) -> list[str]:
    return lists.names(getattr(config, "biases", ""))  # a layer of somebody else's may lack the setting


def _with_epsilon(sizes: Any, config: Any) -> Any:
    epsilon = getattr(config, "norm_epsilon", 0.0)
    return dataclasses.replace(sizes, norm_epsilon=epsilon) if epsilon else sizes


def _projections(family: type, config: Any, sizes: Any) -> dict[str, int]:
    """Output widths of the projections of a mixer, which is not allocated."""
    found, sizes = {}, dataclasses.replace(sizes, direction=family.directions[0])

    def build():
        mixer = family(dataclasses.replace(config, biases=""), sizes, layer_index=0, rngs=nnx.Rngs(0))
        found.update({name: layer.out_features for name, layer in projections(mixer).items()})

    jax.eval_shape(build)
    return found
