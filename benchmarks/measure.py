"""Times and memory of compiled functions."""

import contextlib
import dataclasses
import fcntl
import math
import pickle
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass
class Timing:
    median_ms: float
    min_ms: float
    max_ms: float
    runs: int
    host_share: float = 0.0  # of the time, spent before the last call was enqueued; near 1 the host is what is timed


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


def queued(
    functions: Mapping[Any, Sequence[Callable[[], Any]]],
    wait: Callable[[Any], Any] = jax.block_until_ready,
    rounds: int = 9,
    seconds_each: float = 0.02,
    slow: float = 1.0,
) -> dict[Any, Timing]:
    """Times of calls that queue up on a device, so that it never waits for the host: one call's share of a queue.

    Each function comes as several thunks, the same call on different operands, which take turns: with more bytes
    together than the device's cache, no call finds its operands there. A queue lasts about `seconds_each`, at least
    one call of each thunk; the functions take turns for `rounds` queues. All thunks are called before, to warm up; if
    that takes longer than `slow` seconds, the function has two queues of one call.

    Args:
      wait: returns when the result that it is given, and all enqueued before it, are there.
    """
    lengths, times = {}, {name: [] for name in functions}
    for name, thunks in functions.items():
        seconds, _ = _queue(thunks, len(thunks), wait)
        if seconds > slow:
            lengths[name] = 1
        else:
            seconds, _ = _queue(thunks, len(thunks), wait)  # nothing to load any more
            lengths[name] = max(len(thunks), math.ceil(seconds_each * len(thunks) / seconds))
    for turn in range(rounds):
        for name, thunks in functions.items():
            if turn < 2 or lengths[name] > 1:
                times[name].append(_queue(thunks, lengths[name], wait))
    timings = {}
    for name, length in lengths.items():
        each = [1e3 * seconds / length for seconds, _ in times[name]]
        share = statistics.median(enqueued / seconds for seconds, enqueued in times[name])
        timings[name] = Timing(statistics.median(each), min(each), max(each), length * len(each), share)
    return timings


def _queue(thunks, length, wait):
    """Seconds until all calls are done, and until all are enqueued."""
    start = time.perf_counter()
    for i in range(length):
        result = thunks[i % len(thunks)]()
    enqueued = time.perf_counter()
    wait(result)
    return time.perf_counter() - start, enqueued - start


@contextlib.contextmanager
def alone(path, seconds=60):
    """Hold the file's lock: of the processes that share a device, one times or fills it at once.

    A process that holds it longer is ended, as a kernel that hangs would keep the device from all others.
    """
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        signal.alarm(seconds)
        try:
            yield
        finally:
            signal.alarm(0)


def write(path, results):
    """All of the file or none of it, for a process that may be stopped."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(results))
    part.rename(path)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that the compiled function allocates at once: its temporaries and its outputs, without its arguments."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def matmul(width: int = 2048, dtype=jnp.float32) -> tuple[Callable[[], Any], float]:
    """A square matmul as a function to time, and its floating-point operations: this machine's yardstick."""
    x = jax.random.normal(jax.random.key(0), (width, width), dtype)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest" if dtype == jnp.float32 else None))
    return lambda: multiply(x, x), 2.0 * width**3
