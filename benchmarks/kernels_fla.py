"""flash-linear-attention's Triton kernels on the calls of benchmarks/kernels_calls.py, in a process of their own.

    python -m benchmarks.kernels_fla FOLDER CALL ...

writes FOLDER/CALL.fla.pickle: times, and output and gradients of the call's small form, on the operands of
`Call.draw_checked`. benchmarks/kernels_gpu.py runs it, with a jax that has no GPU, on the calls of a group.

Its autotuner has hundreds of configurations, 0.5 to 3 seconds to compile each. The small form comes first, in as many
sequences and heads as the call has, filled up with zeros: so the kernels are the call's, and all configurations are
compiled, several at a time, and loaded while other processes have the GPU. What it then chose is forgotten: the choice
is made on the call's own operands and with the GPU alone. A choice that its kernels do not make by the number of
heads, tokens or sequences, they make once a process, as always: the first call of a group makes it for the others.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time
from unittest import mock

import numpy as np
import torch
import triton.testing
from fla.ops import chunk_delta_rule, chunk_gated_delta_rule, chunk_gla, chunk_kda, chunk_rwkv6, chunk_simple_gla
from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner

from benchmarks import measure
from benchmarks.kernels_calls import CALLS, FLOAT32, QUICK_CALLS, input_sets

PROCESSES = max(1, len(os.sched_getaffinity(0)) // 3)  # that compile: three groups share the host
ROUNDS = 5


def function(call, arrays):
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    log_decay = arrays.get("log_decay")
    shared = call.shape.heads // call.shape.groups
    if shared > 1:  # these kernels want as many heads of q and k as of v
        q, k = (x.repeat_interleave(shared, dim=2) for x in (q, k))
    if call.op == "dplr_delta_rule":
        return chunk_dplr_delta_rule(q, k, v, arrays["a"], arrays["b"], log_decay)[0]
    if call.op == "delta_rule" and log_decay is None:
        return chunk_delta_rule(q, k, v, arrays["beta"])[0]
    if call.op == "delta_rule":
        kernel = chunk_kda if call.shape.decay == "vector" else chunk_gated_delta_rule
        return kernel(q, k, v, log_decay, arrays["beta"])[0]
    if call.shape.bonus:
        return chunk_rwkv6(q, k, v, log_decay, arrays["bonus"])[0]
    if call.shape.decay == "vector":
        return chunk_gla(q, k, v, log_decay)[0]
    return chunk_simple_gla(q, k, v, **{"g_gamma" if call.shape.decay == "fixed" else "g": log_decay})[0]


def forward(call, arrays):
    with torch.no_grad():
        return function(call, arrays)


def forward_and_backward(call, arrays, function=function):
    out = function(call, arrays)
    inputs = {name: arrays[name] for name in call.operands if name not in call.constants}
    return out, dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), arrays["cotangent"]), strict=True))


def filled_up(call, small, arrays):
    """The output of `small`, by the kernels of `call`."""
    call = dataclasses.replace(call, time=small.time)
    wide = {name: torch.zeros(shape, dtype=arrays[name].dtype, device="cuda") for name, shape in call.operands.items()}
    for name, array in wide.items():
        array[tuple(map(slice, small.operands[name]))] = arrays[name]
    return function(call, wide)[tuple(map(slice, small.out))]


def operands(call, arrays):
    """float32 tensors or arrays -> leaves on the GPU, in the dtypes of the call."""
    leaves = {}
    for name, array in arrays.items():
        dtype = torch.float32 if name in FLOAT32 else torch.bfloat16
        leaf = torch.as_tensor(array, device="cuda").to(dtype).detach()
        leaves[name] = leaf.requires_grad_(name != "cotangent" and name not in call.constants)
    return leaves


def checked(call):
    small = call.checked()
    arrays = operands(small, call.draw_checked())
    out, gradients = forward_and_backward(small, arrays, lambda small, arrays: filled_up(call, small, arrays))
    return {name: x.detach().double().cpu().numpy() for name, x in (gradients | {"out": out}).items()}


def timings(call):
    def wait(_):
        torch.cuda.synchronize()

    sets = [operands(call, call.draw(lambda shape: torch.randn(shape, device="cuda"))) for _ in range(input_sets(call))]
    passes = {"forward": forward, "both": forward_and_backward}
    wait(forward_and_backward(call, sets[0]))  # the autotuner's choices
    thunks = {name: [functools.partial(run, call, arrays) for arrays in sets] for name, run in passes.items()}
    return tuple(measure.queued(thunks, wait, ROUNDS)[name] for name in passes)


@contextlib.contextmanager
def rehearsal():
    """The autotuner compiles all configurations, runs each once, and forgets which it took."""
    known = []

    def prune_configs(tuner, kwargs):
        known.append((tuner, set(tuner.cache)))
        configs = choose(tuner, kwargs)
        compile_all(tuner, kwargs, configs)
        return configs

    def once(run, quantiles):
        run()
        return [0.0] * len(quantiles)

    choose = Autotuner.prune_configs
    try:
        with mock.patch.multiple(Autotuner, prune_configs=prune_configs, do_bench=staticmethod(once)):
            yield
    finally:
        for tuner, keys in known:
            for key in set(tuner.cache) - keys:
                del tuner.cache[key]


def compile_all(tuner, kwargs, configs):
    """Fill Triton's cache on disk, in forks: compiling holds Python's lock. Nothing is told of what fails in them."""
    active, parent, children = driver.active, os.getpid(), []
    target, device = active.get_current_target(), active.get_current_device()
    for first in range(PROCESSES):
        if child := os.fork():
            children.append(child)
            continue
        with contextlib.suppress(BaseException):
            os.nice(19)
            active.get_current_target, active.get_current_device = lambda: target, lambda: device  # a fork has no GPU
            active.get_current_stream = lambda device: 0
            for config in configs[first::PROCESSES]:
                if os.getppid() == parent:
                    with contextlib.suppress(Exception):
                        tuner.fn.run(*tuner.nargs.values(), **(kwargs | config.all_kwargs() | {"warmup": True}))
        os._exit(0)
    for child in children:
        os.waitpid(child, 0)


def measure_call(call, lock):
    times = [time.monotonic()]
    with rehearsal():
        results = checked(call)
    times.append(time.monotonic())
    with measure.alone(lock):
        times.append(time.monotonic())
        found = timings(call)
        torch.cuda.empty_cache()
    times.append(time.monotonic())
    lengths = dict(zip(("build", "wait", "time"), np.diff(times).tolist(), strict=True))
    return {"results": {"fla": (found, results)}, "seconds": lengths, "reasons": {}}


def main():
    # triton's own takes 125 ms a configuration
    Autotuner.do_bench = staticmethod(functools.partial(triton.testing.do_bench, warmup=2, rep=10))
    folder = pathlib.Path(sys.argv[1])
    for name in sys.argv[2:]:
        try:
            found = measure_call((CALLS | QUICK_CALLS)[name], folder / "lock")
        except Exception as error:  # the rows of other calls must not be lost
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found = {"results": {}, "seconds": {}, "reasons": {"fla": reason}}
        measure.write(folder / f"{name}.fla.pickle", found)


if __name__ == "__main__":
    main()
