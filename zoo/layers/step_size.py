"""Step sizes of state-space models."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def check_steps(config: Any) -> list[str]:
    """Problems with the range of initial step sizes."""
    if config.dt_min <= config.dt_max:
        return []
    return [f"dt_min: got {config.dt_min} with dt_max {config.dt_max}, expected dt_min <= dt_max"]


def log_uniform(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    """Numbers between `low` and `high`, uniform in their logarithm."""
    return jnp.exp(jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high)))


def step_size_bias(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    """b such that softplus(b) is log-uniform between `low` and `high` (Mamba's dt bias)."""
    dt = log_uniform(key, shape, low, high)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus
