"""What make.py asks of a family's reference layer, and the sizes of the golden models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, D, HEADS, LAYERS, D_FF, TIME, PREFILL, EPSILON = 48, 16, 2, 2, 24, 24, 20, 1e-5
K = D // HEADS


@dataclasses.dataclass
class Family:
    """One reference layer.

    Attributes:
      config: our settings: of the model, and of the family's section under its name.
      layer: index -> the reference module.
      call: (module, x, cache, index) -> y; `cache` None for a full pass.
      names: our parameter -> (the reference's or a list of them, what turns it into ours). A constant stands for one
        it lacks.
      cache: makes the cache.
      states: (cache, index) -> our state, by its name.
      mlp: index -> the reference's MLP, called as (x, cache); None for SwiGLU.
      mlp_names: as names.
      epsilon: of all norms.
    """

    config: dict
    layer: Callable[[int], nn.Module]
    call: Callable
    names: dict[str, Any]
    cache: Callable
    states: Callable
    mlp: Callable[[int], nn.Module] | None = None
    mlp_names: dict[str, Any] = dataclasses.field(default_factory=dict)
    epsilon: float = EPSILON


def transpose(weight):
    return weight.T


def same(x):
    return x


def matrices(**names):
    return {f"{ours}.kernel": (f"{theirs}.weight", transpose) for ours, theirs in names.items()}


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, elementwise_affine=True, eps=EPSILON, activation="swish", **_):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None
        self.bias, self.eps = None, eps
        self.activation = {"swish": F.silu, "sigmoid": torch.sigmoid}[activation]

    def forward(self, x, gate=None):
        x = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return x if gate is None else x * self.activation(gate)
