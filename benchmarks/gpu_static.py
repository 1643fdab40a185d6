"""What a layer of a training step moves on a GPU that is not there: `python -m benchmarks.gpu_static --mixers=mamba2`.

XLA compiles the step for an H200, and the loops over the layers are read: for each of their kernels the bytes of its
operands and results, each once, of arrays stacked over the layers one layer's. What a kernel reads twice, and what the
cache saves, is not in it. Printed, for each mixer and pass: gigabytes of a layer that matrix products move, Pallas
kernels, and all the rest, which is elementwise; then the rest's largest kernels. Divided by the rate of a copy (4.2
TB/s measured on an H200) the rest is the least time that it takes.

    --size, --rows, --tokens, --remat   of the step (1.3b, 16, 2048, minimal), in bfloat16
    --kernels                           lines of each pass (8)

Needs jax's CUDA plugin and ptxas, no GPU: `make build/gpu-compile`, then PYTHONPATH=build/gpu-compile and
JAX_PLATFORMS=cpu in the environment.
"""

import argparse
import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from zoo import config, sharding
from zoo.settings import argument
from zoo.training import step, topology

LAYERS = 6  # more are the same loop; fewer are not one
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    kind: str  # "matmul", "pallas" or "other"
    moved: int  # bytes
    result: str
    source: str  # of the operation that gave it its name
    loop: int  # which of the loops over layers


def compile_step(settings: config.Config, device: jax.Device) -> str:
    """The compiled step's HLO."""
    programs = step.build(settings, sharding.make_mesh(settings.mesh, [device]))
    rows = (settings.train.batch_size, settings.train.context_length)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
    placed = {"sharding": programs.batch_sharding}
    batch = {name: jax.ShapeDtypeStruct(rows, dtype, **placed) for name, dtype in dtypes.items()}
    traced = programs.train.trace(programs.abstract_state, batch)
    return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


def kernels_of_layers(text: str, layers: int) -> list[Kernel]:
    """The kernels in the bodies of loops of `layers` turns, those of inner loops as often as they run."""
    computations = {}
    for computation in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \([^\n]*\) -> [^\n]*\{\n)", text):
        name = computation.split(" (")[0].removeprefix("ENTRY ").strip().lstrip("%")
        computations[name] = computation.splitlines()[1:]

    def bodies(lines):
        for line in lines:
            if " while(" in line and (turns := re.search(r'known_trip_count":\{"n":"(\d+)"', line)):
                yield re.search(r"body=%?([\w.\-]+)", line)[1], int(turns[1])

    def moved(types):
        total = 0
        for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types):
            sizes = [int(size) for size in shape.split(",") if size]
            stacked = layers if len(sizes) > 1 and sizes[0] == layers else 1
            total += BYTES.get(dtype, 0) * math.prod(sizes) // stacked
        return total

    def kernels(name, times, loop):
        types = {}
        for line in computations[name]:
            match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z\-]+)\((.*?)\)(.*)", line)
            if not match:
                continue
            result, types[result], operation, operands, rest = match[1], match[2], match[3], match[4], match[5]
            if operation not in ("fusion", "custom-call", "copy"):
                continue
            operands = "".join(types.get(operand, "") for operand in re.findall(r"%([\w.\-]+)", operands))
            called = re.search(r"calls=%([\w.\-]+)", rest)
            rest += "".join(computations[called[1]]) if called else ""
            is_matmul = "gemm" in result or "__cublas" in rest or "cudnn" in rest
            kind = "pallas" if '"mosaic_gpu' in rest else "matmul" if is_matmul else "other"
            source = re.search(r'op_name="([^"]*)"', rest)
            bytes_moved = times * (moved(types[result]) + moved(operands))
            yield Kernel(result, kind, bytes_moved, types[result], source[1] if source else "", loop)
        for body, turns in bodies(computations[name]):
            yield from kernels(body, times * turns, loop)

    found, loop = [], 0
    for lines in computations.values():
        for body, turns in bodies(lines):
            if turns == layers:
                found += kernels(body, 1, loop)
                loop += 1
    return found


def table(mixer: str, kernels: list[Kernel], most: int):
    backward = {kernel.loop for kernel in kernels if "transpose(jvp" in kernel.source}
    for name in ("forward", "backward"):
        of_pass = [k for k in kernels if (k.loop in backward) == (name == "backward")]
        sums = {kind: sum(k.moved for k in of_pass if k.kind == kind) for kind in ("matmul", "pallas", "other")}
        yield f"{mixer:12}{name:10}" + "".join(f"{kind} {1e-9 * size:6.2f} GB  " for kind, size in sums.items())
        rest = sorted((k for k in of_pass if k.kind == "other"), key=lambda k: -k.moved)
        for k in rest[:most]:
            yield f"    {1e-9 * k.moved:6.2f} GB  {k.name:40.40} {k.result:50.50} {k.source[-50:]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mixers", default="attention,gla,retnet,mamba2")
    parser.add_argument("--size", default="1.3b")
    parser.add_argument("--rows", type=argument(int), default=16)
    parser.add_argument("--tokens", type=argument(int), default=2048)
    parser.add_argument("--remat", default="minimal")
    parser.add_argument("--kernels", type=argument(int, at_least=0), default=8)
    flags = parser.parse_args()
    (device,) = topology.devices("h200:1")
    for mixer in flags.mixers.split(","):
        settings = config.preset(flags.size)
        model, train = settings.model, settings.train
        model.mixer, model.vocab_size, model.dtype, model.remat = mixer, 32000, "bfloat16", flags.remat
        model.num_layers, train.batch_size, train.context_length = LAYERS, flags.rows, flags.tokens
        kernels = kernels_of_layers(compile_step(settings, device), LAYERS)
        print("\n".join(table(mixer, kernels, flags.kernels)), flush=True)


if __name__ == "__main__":
    main()
