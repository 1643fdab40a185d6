"""Times and memory of compiled functions."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass
class Timing:
    median_ms: float
    min_ms: float
    max_ms: float
    runs: int


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 15, seconds_each: float = 2.5
) -> dict[str, Timing]:
    """Wall times of the functions, called in turn so that a busy moment of the machine falls on all of them.

    Each is called once to warm up, then `rounds` times, or fewer (at least twice) when that would take longer
    than `seconds_each`.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(rounds):
        for name, function in functions.items():
            if len(times[name]) >= 2 and sum(times[name]) > seconds_each:
                continue
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: Timing(1e3 * statistics.median(t), 1e3 * min(t), 1e3 * max(t), len(t)) for name, t in times.items()}


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that the compiled function allocates at once: its temporaries and its outputs, without its arguments."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def matmul(width: int = 2048, dtype=jnp.float32) -> tuple[Callable[[], Any], float]:
    """A square matmul as a function to time, and its floating-point operations: this machine's yardstick."""
    x = jax.random.normal(jax.random.key(0), (width, width), dtype)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest" if dtype == jnp.float32 else None))
    return lambda: multiply(x, x), 2.0 * width**3
