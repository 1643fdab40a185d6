"""Costs by family: forward floating-point operations, parameters, state bytes, and what the device could do.

A multiply and an add are two operations. Matrix products and recurrences count; norms, activations and the softmax
do not.
"""

import dataclasses

import jax
from flax import nnx

from zoo import chips, heads
from zoo.config import MLP_LAYER, ModelConfig, mlp_class, mlp_width, places, positions
from zoo.layers import NORM_PARAMETERS
from zoo.mixers import CAUSAL
from zoo.model import LanguageModel


def forward_flops_per_token(model: ModelConfig, context_length: int, labels: int | None = None) -> float:
    """Mixers (as each family counts itself), MLPs and the head, which reads `labels` tokens of a context, or all. Of
    numbers a step counts as a token, and its patch is projected."""
    layers, length = places(model), positions(model, context_length)
    unit = 0.0
    for place in layers:
        unit += place.flops_per_token(model.d_model, length)
        if d_ff := mlp_width(model, place):
            unit += 2 * mlp_class(model).num_parameters(model.d_model, d_ff)
    body = unit * (model.num_layers // len(layers)) + 2 * model.d_model * model.patch * model.channels
    return (body * length + heads.of(model).flops_per_row(model, context_length, labels)) / context_length


def train_flops_per_token(model: ModelConfig, context_length: int, labels: int | None = None) -> float:
    """Three times the forward pass: the backward pass has two products for each one. Recomputation does not count."""
    return 3 * forward_flops_per_token(model, context_length, labels)


def num_parameters(model: ModelConfig) -> int:
    """By formula; the test suite holds it equal to the model's own."""
    layers, mlp = places(model), mlp_class(model)
    norm = NORM_PARAMETERS[model.norm] * model.d_model
    of_branch = 2 * norm if model.norm_position == "both" else norm
    unit = 0
    for place in layers:
        if place.family != MLP_LAYER:
            unit += place.num_parameters(model.d_model) + of_branch
        if d_ff := mlp_width(model, place):
            unit += mlp.num_parameters(model.d_model, d_ff) + of_branch
            unit += sum(mlp.outputs(model.d_model, d_ff)) if model.mlp_bias else 0
    norms = (1 + model.embedding_norm) * norm
    return unit * (model.num_layers // len(layers)) + table_parameters(model) + norms


def table_parameters(model: ModelConfig) -> int:
    """Of the embedding, the table of positions and the head together."""
    embedding = (model.patch * model.channels + 1 if model.channels else model.vocab_size) * model.d_model
    learned = model.max_positions * model.d_model if model.positions == "learned" else 0
    return embedding + learned + heads.of(model).num_parameters(model)


def state_bytes(model: ModelConfig, context_length: int) -> int | None:
    """Bytes that decoding one sequence keeps at `context_length` tokens; None of what sees both ways."""
    if model.direction != CAUSAL:
        return None
    smallest = dataclasses.replace(model, head="tokens", channels=0, vocab_size=model.vocab_size or 1)

    def init():
        return LanguageModel(smallest, rngs=nnx.Rngs(0)).init_state(1, context_length)

    state = jax.eval_shape(init)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Matrix FLOP/s of one device by its data sheet, in bf16; None for a CPU, and for what the table does not know.

    float32 on an accelerator is held against the same bf16 rate: its matrix units have no faster way.
    """
    chip = chips.of((device or jax.devices()[0]).device_kind)
    return chip and chip.peak
