"""The learning rate by step: a linear warm-up, then cosine | linear | wsd | constant.

With n = step + 1 updates done, w of warm-up, N in all, f = final_fraction:

    warm-up    n / w                                           n <= w
    cosine     f + (1 - f) (1 + cos(pi p)) / 2                 p = (n - w) / (N - w)
    linear     1 - (1 - f) p                                   p as above
    wsd        1, then 1 - (1 - f) p in the last `decay_steps` p = (n - (N - decay_steps)) / decay_steps
    constant   1

times the learning rate (wsd: warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395). A warm-up that is longer than
the run takes the first tenth of it; the config keeps what was asked for, which holds again once the run is extended.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zoo.config import OptimizerConfig

SHORTENED = 10  # a longer warm-up than the run becomes the run's tenth


def effective_warmup(config: OptimizerConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps`."""
    return config.warmup_steps if config.warmup_steps <= steps else steps // SHORTENED


def shortening(config: OptimizerConfig, steps: int) -> str:
    """What a run says of a warm-up that it shortens; "" if it does not."""
    warmup = effective_warmup(config, steps)
    if warmup == config.warmup_steps:
        return ""
    return f"{warmup} steps, a tenth of the run: optimizer.warmup_steps = {config.warmup_steps} is longer than it"


def schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of the update that follows `step` done ones, float32; `steps` is the run's length."""
    warmup, final = effective_warmup(config, steps), config.final_fraction
    decay_steps = config.decay_steps or max(1, steps // 5)
    decay_start = max(warmup, steps - decay_steps) if config.schedule == "wsd" else warmup

    def rate(step: jax.Array) -> jax.Array:
        n = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((n - decay_start) / max(1, steps - decay_start), 0.0, 1.0)
        shape = {
            "cosine": final + (1 - final) * (1 + jnp.cos(jnp.pi * progress)) / 2,
            "linear": 1 - (1 - final) * progress,
            "wsd": 1 - (1 - final) * progress,
            "constant": jnp.ones_like(progress),
        }[config.schedule]
        return config.learning_rate * jnp.minimum(n / max(1, warmup), 1.0) * shape

    return rate
