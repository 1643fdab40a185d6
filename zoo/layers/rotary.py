"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from zoo.layers.rounded_once import rounded_once


def rotary(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], base: float = 10_000.0) -> Float[Array, "B T H K"]:
    """Turn the pair (x_i, x_{i + K/2}) by the angle positions * base^(-2i/K), so that q_t . k_s depends on t - s alone.

    The halves are paired as in GPT-NeoX and Llama. Angles are float32: exact to 1e-3 radians up to 2^14 tokens and to
    6e-2 up to 2^20.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [K/2]
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, T, 1, K/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def turn(x):
        x1, x2 = x[..., :half], x[..., half:]
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    return rounded_once(turn, x)
