"""Norms: root-mean-square (Zhang & Sennrich 2019, arXiv:1910.07467), mean and variance (1607.06450), length."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.precision import narrow
from zoo.layers.parameter import parameter, with_axes
from zoo.layers.rounded_once import rounded_once


def rms_norm(width: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs, with_scale: bool = True) -> nnx.RMSNorm:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, statistics in float32.

    On [..., heads, width] it is a norm per head, with one scale for all heads.
    """
    scale_init = with_axes(jax.nn.initializers.ones, ("norm",), decay=False)
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, use_scale=with_scale, scale_init=scale_init, rngs=rngs)


def layer_norm(width: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, statistics in float32."""
    init = {
        "scale_init": with_axes(jax.nn.initializers.ones, ("norm",), decay=False),
        "bias_init": with_axes(jax.nn.initializers.zeros, ("norm",), decay=False),
    }
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs, **init)


# `model.norm`, and the parameters that a norm has a channel
NORMS: dict[str, Callable[..., nnx.Module]] = {"rms_norm": rms_norm, "layer_norm": layer_norm}
NORM_PARAMETERS = {"rms_norm": 1, "layer_norm": 2}


def unit_length(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x^2) + epsilon) over the last axis, in float32, rounded once: without epsilon, of length 1."""
    return rounded_once(lambda x: x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + epsilon), x)


def gated(norm: Callable, o: jax.Array, gate: jax.Array, activation: Callable) -> jax.Array:
    """norm(o) * activation(gate), rounded once, of a gate [B, T, D] and o of as many entries, in heads or not.

    `norm` gives float32, [B, T, D] or in heads.
    """
    return rounded_once(lambda o, gate: norm(o).reshape(gate.shape) * activation(gate), o, gate)


class HeadLayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) over each head, then a scale (and a bias) for each channel of each head.

    [B, T, heads, width] -> [B, T, heads * width], statistics in float32.
    """

    def __init__(self, heads: int, width: int, *, epsilon: float, dtype: jnp.dtype, bias: bool = False):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = parameter(jnp.ones((heads * width,)), ("norm",), decay=False)
        self.bias = parameter(jnp.zeros((heads * width,)), ("norm",), decay=False) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon)
        x = x.reshape(*x.shape[:-2], -1) * self.scale[...]
        return (x if self.bias is None else x + self.bias[...]).astype(self.dtype)


class GatedRMSNorm(nnx.Module):
    """norm(x * silu(z)) * scale, over each of `groups` parts of the last axis; statistics in float32 (Mamba-2's)."""

    def __init__(self, width: int, *, groups: int, epsilon: float, dtype: jnp.dtype):
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = parameter(jnp.ones((width,)), ("norm",), decay=False)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        x = narrow(x, self.dtype).astype(jnp.float32)  # it waits for the statistics
        parts = x.reshape(*x.shape[:-1], self.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts**2, -1, keepdims=True) + self.epsilon)
        return (parts.reshape(x.shape) * self.scale[...]).astype(self.dtype)
