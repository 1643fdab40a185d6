"""flash-linear-attention's Triton kernels on the calls of benchmarks/kernels_calls.py, in a process of their own.

    python -m benchmarks.kernels_fla FOLDER SECONDS CALL ...

writes FOLDER/rows.jsonl, a line a call, and FOLDER/CALL.npz: the output and gradients of the call's small form, on the
operands of `Call.draw_checked`. No call is begun after SECONDS. benchmarks/kernels_gpu.py runs it, with a jax that has
no GPU, so that torch has all of its memory.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import numpy as np
import torch
from fla.ops import chunk_gla, chunk_rwkv6, chunk_simple_gla

from benchmarks import measure
from benchmarks.kernels_calls import CALLS, FLOAT32, QUICK_CALLS, input_sets


def function(call, arrays):
    q, k, v, log_decay = (arrays[name] for name in ("q", "k", "v", "log_decay"))
    shared = call.shape.heads // call.shape.groups
    if shared > 1:  # these kernels want as many heads of q and k as of v
        q, k = (x.repeat_interleave(shared, dim=2) for x in (q, k))
    if call.shape.bonus:
        return chunk_rwkv6(q, k, v, log_decay, arrays["bonus"])[0]
    if call.shape.decay == "vector":
        return chunk_gla(q, k, v, log_decay)[0]
    return chunk_simple_gla(q, k, v, **{"g_gamma" if call.shape.decay == "fixed" else "g": log_decay})[0]


def forward(call, arrays):
    with torch.no_grad():
        return function(call, arrays)


def forward_and_backward(call, arrays):
    out = function(call, arrays)
    inputs = {name: arrays[name] for name in call.operands if name not in call.constants}
    return out, dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), arrays["cotangent"]), strict=True))


def operands(call, arrays):
    """float32 tensors or arrays -> leaves on the GPU, in the dtypes of the call."""
    leaves = {}
    for name, array in arrays.items():
        dtype = torch.float32 if name in FLOAT32 else torch.bfloat16
        leaf = torch.as_tensor(array, device="cuda").to(dtype).detach()
        leaves[name] = leaf.requires_grad_(name != "cotangent" and name not in call.constants)
    return leaves


def measure_call(call):
    def wait(_):
        torch.cuda.synchronize()

    sets = [operands(call, call.draw(lambda shape: torch.randn(shape, device="cuda"))) for _ in range(input_sets(call))]
    passes = {"forward": forward, "both": forward_and_backward}
    thunks = {name: [functools.partial(run, call, arrays) for arrays in sets] for name, run in passes.items()}
    return {name: dataclasses.asdict(timing) for name, timing in measure.queued(thunks, wait).items()}


def write_checked(call, path):
    checked = call.checked()
    out, gradients = forward_and_backward(checked, operands(checked, call.draw_checked()))
    arrays = {name: array.detach().float().cpu().numpy() for name, array in (gradients | {"out": out}).items()}
    np.savez(path, **arrays)


def main():
    folder, seconds, names = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    start = time.monotonic()
    with open(folder / "rows.jsonl", "w", buffering=1) as rows:
        for name in names:
            if time.monotonic() - start > seconds:
                break
            call = (CALLS | QUICK_CALLS)[name]
            try:
                write_checked(call, folder / f"{name}.npz")
                row = measure_call(call)
            except Exception as error:  # the rows of other calls must not be lost
                row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            rows.write(json.dumps(row | {"call": name}) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
