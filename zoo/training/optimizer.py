"""AdamW and Muon over one model's parameters: which parameter gets which rule, decay and learning rate.

    AdamW   Loshchilov & Hutter 2019, arXiv:1711.05101
    Muon    Jordan 2024; Liu et al. 2025, arXiv:2502.16982: Nesterov momentum, orthogonalised by Newton-Schulz,
            times 0.2 sqrt(max(in, out)), which gives it the root-mean-square of AdamW's update:
            one learning rate and one weight decay serve both

The depth is stacked: a matrix of the repeating unit is [layers, in, out], and Muon orthogonalises each layer's.
"""

import re

import jax
import optax
from flax import nnx

from zoo import lists
from zoo.checkpoints import named_leaves
from zoo.config import OptimizerConfig
from zoo.errors import UsageError
from zoo.sharding import dotted, logical_axes
from zoo.training.schedules import schedule

MUON_UPDATE_RMS = 0.2  # of AdamW's update, measured by Liu et al.
TABLES = {"vocab", "positions", "classes", "patch"}  # logical axes of embeddings and heads
VECTORS = {"state"}  # of what a channel has for itself: taps, read-outs of its state


def make_optimizer(config: OptimizerConfig, steps: int, params: nnx.State) -> optax.GradientTransformation:
    """Gradients (clipped already) to updates; `params` may be abstract.

    Raises:
      UsageError: a regex of `learning_rate_factors` matches no parameter.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "muon":
        muon = optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=_last_two_axes)
        labels = _map(lambda _, p: "muon" if is_matrix(p) else "adam", params)
        rms = _map(lambda _, p: MUON_UPDATE_RMS * max(p.shape[-2:]) ** 0.5 if is_matrix(p) else 1.0, params)
        direction = optax.chain(optax.partition({"muon": muon, "adam": adam}, labels), _scale_each(rms))
    else:
        direction = adam
    factors = learning_rate_factors(config.learning_rate_factors, params)
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=_map(lambda _, p: decays(p), params)),
        _scale_each(_map(lambda name, _: factors[name], params)),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def decays(parameter: nnx.Param) -> bool:
    """Whether weight decay applies: to matrices, unless the module marked them `decay=False` (gates, norms, biases)."""
    stacked = logical_axes(parameter)[:1] == ("layers",)
    return parameter.ndim - stacked >= 2 and parameter.get_metadata().get("decay", True)


def is_matrix(parameter: nnx.Param) -> bool:
    """Whether Muon applies: to [in, out] and [layers, in, out] that decay and are neither embedding nor head.

    Both axes must be named, and a filter of [channels, taps] is a bundle of vectors, not a map between spaces.
    """
    axes = [axis for axis in logical_axes(parameter) if axis != "layers"]
    return decays(parameter) and len(axes) == 2 and None not in axes and not (TABLES | VECTORS) & set(axes)


def learning_rate_factors(text: str, params: nnx.State) -> dict[str, float]:
    """By parameter path, from "regex=factor,..."; the first regex found in the path counts, 1 where none is."""
    rules = lists.learning_rate_factors(text)
    names = list(named_leaves(params))
    for regex, _ in rules:
        if not any(re.search(regex, name) for name in names):
            raise UsageError(f"optimizer.learning_rate_factors: {regex!r} matches no parameter of {', '.join(names)}")
    return {name: next((factor for regex, factor in rules if re.search(regex, name)), 1.0) for name in names}


def _map(f, params):
    """f(name, parameter) at the place of each nnx.Param: a prefix of the tree of arrays, as optax's masks may be."""
    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, p: f(dotted(path), p), params, is_leaf=is_param)


def _last_two_axes(updates):
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)


def _scale_each(factors) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda factor, u: jax.tree.map(lambda x: factor * x, u), factors, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
