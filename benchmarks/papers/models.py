"""The model and the optimizer of a set-up."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.papers.row_task import RowTask
from benchmarks.papers.set_up import Setup
from zoo.config import Config, ModelConfig
from zoo.data.synthetic import Task
from zoo.model import LanguageModel
from zoo.training.optimizer import make_optimizer
from zoo.training.schedules import schedule


def model_config(setup: Setup) -> ModelConfig:
    config = Config().model
    config.mixer, config.num_layers, config.d_model = setup.mixer, 2, setup.d_model
    config.tie_embeddings = True
    config.mlp, config.d_ff = ("gelu", setup.d_ff) if setup.d_ff else ("none", 0)
    config.positions = "learned" if setup.mixer == "attention" else "none"
    config.dropout = setup.embedding_dropout
    for field, value in (of_task(setup.task) | setup.model).items():
        setattr(config, field, value)
    for field, value in setup.settings.items():
        setattr(getattr(config, setup.mixer), field, value)
    return config


def make_model(setup: Setup, seed: int) -> LanguageModel:
    model = LanguageModel(model_config(setup), rngs=nnx.Rngs(seed))
    for block in model.units.blocks:
        block.dropout = 0.0  # these set-ups drop embeddings alone
    if setup.as_gpt2:
        _make_gpt2_layers(model)
    if setup.init_std:
        scaled = functools.partial(_scaled, setup.init_std)
        nnx.update(model, jax.tree_util.tree_map_with_path(scaled, nnx.state(model, nnx.Param)))
    return model


def of_task(task: Task | RowTask) -> dict[str, Any]:
    """What the task makes of a model's settings."""
    if isinstance(task, RowTask):
        return task.model_settings()
    return {"vocab_size": task.vocab_size, "max_positions": task.context_length}


def _make_gpt2_layers(model: LanguageModel) -> None:
    """LayerNorms in place of RMS norms, and biases, 0 at first, in every projection."""
    holders = [(model, ["norm"])] + [(block, ["mixer_norm", "mlp_norm"]) for block in model.units.blocks]
    for holder, names in holders:
        for name in names:
            scale = getattr(holder, name).scale[...]  # [width], in blocks [units, width]
            norm = nnx.LayerNorm(scale.shape[-1], epsilon=model.norm.epsilon, rngs=nnx.Rngs(0))
            norm.scale, norm.bias = nnx.Param(scale), nnx.Param(jnp.zeros_like(scale))
            setattr(holder, name, norm)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            kernel = module.kernel[...]  # [in, out], in blocks [units, in, out]
            module.use_bias, module.bias = True, nnx.Param(jnp.zeros((*kernel.shape[:-2], kernel.shape[-1])))


def _scaled(std: float, path: tuple, parameter: jax.Array) -> jax.Array:
    """A matrix at the standard deviation `std`, half of it in an MLP's second: a residual stream has 4 branches."""
    *_, layer, name = _keys(path)
    if name != "kernel":
        return parameter
    return parameter * std / jnp.std(parameter) * (0.5 if layer == "down" else 1.0)


def _keys(path: tuple) -> list[str]:
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]


def optimizer_of(setup: Setup, params: nnx.State) -> optax.GradientTransformation:
    """The trainer's optimizer, or AdamW with weight decay on all but `undecayed`."""
    config = setup.optimizer
    if not setup.undecayed:
        return make_optimizer(config, setup.steps, params)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: _keys(path)[-1] not in setup.undecayed, params)
    rate = schedule(config, setup.steps)
    return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=mask)
