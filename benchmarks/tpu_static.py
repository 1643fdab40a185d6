"""What the kernels cost on TPUs that are not there: `python -m benchmarks.tpu_static [--chips=v5e] [--shapes=square]`.

libtpu compiles the op, forward and backward, for a chip, and its static model counts cycles of each kernel and of
each XLA operation around it (it simulates the grid; what it says of the body of an XLA loop is multiplied by the
loop's trip count here). Printed, for each shape of `benchmarks.tpu_static_ops` and each chip, per token and unit of
the op (a head of v, a channel): cycles of the forward and the backward kernel and of everything, XLA's operations
included; what share of them the floors are: the kernel's matmuls at the chip's bfloat16 rate, and its operands, each
read or written once, at the chip's memory rate; the bytes of VMEM its blocks take; its bundles.
`--implementation=chunked` gives the whole op in its XLA form (minutes for a shape of linear attention).

All numbers are static. Against published timings of other kernels they read 0.95 to 1.0 where matmuls bind, 0.7 to
0.85 where latency or vector operations do: believe a difference of 25%.

    --check   compare with benchmarks/results/tpu_static.json: exit 1 if a kernel takes 10% more cycles than it says
    --sweep   tiles of one shape of linear attention and chip, best first: what `specs.tiles` was chosen by. One axis at
              a time, from those that it chooses, until no other value of an axis takes fewer cycles

Needs libtpu (pip install 'jax[tpu]'). No TPU.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

CHIPS = {  # topology; clock in Hz and bfloat16 FLOP/s and HBM bytes/s, from the makers' data sheets
    "v5e": ("v5e:2x2", 1.5e9, 197e12, 0.82e12),
    "v5p": ("v5p:2x2x1", 1.75e9, 459e12, 2.765e12),
    "v6e": ("v6e:2x2", 1.75e9, 918e12, 1.64e12),
}
RESULTS = pathlib.Path(__file__).parent / "results" / "tpu_static.json"
LIMIT = 1.1  # of the stored cycles
MARK = "STATIC "
NOTHING = "kernel_that_does_nothing"
KERNELS = ("forward", "backward")
SWEPT = {"chunk": (128, 256), "block": (256, 512, 1024), "heads": (1, 2, 4, 8), "unroll": (1, 2), "backward's": (1, 2)}


@dataclasses.dataclass(frozen=True)
class Job:
    chip: str
    shape: str
    implementation: str = "mosaic_tpu"
    tiles: tuple[int, ...] | None = None
    whole: bool = True  # the op with XLA's part too, after the kernels alone


def measure(job: Job) -> dict:
    """Costs by kernel, and of all, in a process of its own: libtpu reads its flags once, and its profiler may abort.

    What was counted before an abort, or before ten minutes, is returned; kernels without cycles are left out.
    """
    command = [sys.executable, "-m", "benchmarks.tpu_static", "--child", json.dumps(dataclasses.asdict(job))]
    with tempfile.TemporaryFile("w+") as out:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=out, stderr=subprocess.DEVNULL, timeout=600)
        out.seek(0)
        found = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK)]
    return {name: value for part in found for name, value in part.items()}


def child(job: Job) -> None:
    """Prints each cost as it is known."""
    with tempfile.TemporaryDirectory() as dump:
        for folder in ("cycles", "text"):
            os.mkdir(f"{dump}/{folder}")
        os.environ.update(
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_static_llo_profile_to={dump}/cycles --xla_jf_dump_to={dump}/text "
            "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final",
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v5litepod-4",
            TPU_WORKER_HOSTNAMES="localhost",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            JAX_ENABLE_COMPILATION_CACHE="false",
        )
        import jax

        program, args, op = _program(job)
        units = op.time * op.units
        _, clock, flops, bandwidth = CHIPS[job.chip]
        sharding, in_kernels = jax.tree.leaves(args)[0].sharding, 0
        for equation, _ in _equations(jax.make_jaxpr(program)(*args).jaxpr):
            if equation.primitive.name != "pallas_call":
                continue
            name = equation.params["name"]
            _clear(dump)
            _alone(equation, sharding).compile()
            counted = _cycles(pathlib.Path(dump, "cycles"))
            operation = max(counted, key=counted.get)  # there is no other but copies
            cycles, bundles = counted[operation], _bundles(pathlib.Path(dump, "text"))[operation]
            in_kernels += cycles
            costs = _kernel_costs(equation)
            row = {
                "cycles": cycles / units,
                "matmul_floor": costs["flops"] / (flops / clock) / units,
                "memory_floor": costs["bytes"] / (bandwidth / clock) / units,
                "vmem_bytes": costs["vmem"],
                "bundles": bundles,
                "per": f"token and {op.unit}, of {op.time} tokens",
            }
            print(MARK + json.dumps({name.rsplit("_", 1)[1]: row}), flush=True)
        if job.whole:
            _clear(dump)
            with _kernels_that_do_nothing():
                program, args, _ = _program(job)
                times = _times(program.lower(*args).compile().as_text())
            counted = _cycles(pathlib.Path(dump, "cycles"))
            around = sum(count * times.get(name, 1) for name, count in counted.items() if not name.startswith(NOTHING))
            print(MARK + json.dumps({"whole": (around + in_kernels) / units}), flush=True)


@contextlib.contextmanager
def _kernels_that_do_nothing():
    """While tracing: in the place of Pallas calls, which some programs' profile does not survive, their operands and
    results alone, so that XLA's part stays as it is."""
    from unittest import mock

    import jax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    pallas_call, block = pl.pallas_call, pl.BlockSpec(memory_space=pltpu.HBM)

    def nothing(kernel, *, out_shape, **_):
        def call(*operands):
            blocks = {"in_specs": [block] * len(operands), "out_specs": jax.tree.map(lambda _: block, out_shape)}
            return pallas_call(lambda *refs: None, out_shape=out_shape, name=NOTHING, **blocks)(*operands)

        return call

    with mock.patch.object(pl, "pallas_call", nothing):
        yield


def _clear(dump):
    for path in (*pathlib.Path(dump, "cycles").iterdir(), *pathlib.Path(dump, "text").iterdir()):
        path.unlink()


def _alone(equation, sharding):
    """The lowered program of one Pallas call, its operands in HBM: XLA would keep small ones in VMEM."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    def run(*operands):
        operands = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in operands]
        return equation.primitive.bind(*operands, **equation.params)

    avals = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=sharding) for x in equation.invars]
    return jax.jit(run).lower(*avals)


def _program(job):
    """The op, forward and backward, jitted; its abstract operands on the chip; and the op."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from benchmarks import tpu_static_ops
    from kernels import dispatch

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[job.chip][0]).devices[0]
    op = tpu_static_ops.SHAPES[job.shape](job.implementation, job.tiles)

    def run(arrays, d_out):
        with dispatch.use_device(device):
            out, pull = jax.vjp(op.function, arrays)
            return out, pull(d_out)[0]

    def operand(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    arrays = {name: operand(*array) for name, array in op.arrays.items()}
    return jax.jit(run), (arrays, operand(*op.out)), op


def _times(program):
    """How often each operation of a compiled program runs: the trip counts of the loops that it is in, multiplied."""
    operations, loops, limits, computation = {}, {}, {}, None
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = header[1]
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            operations[operation[1]] = computation
            if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                loops[loop[2]] = computation, loop[1]
            if limit := re.search(r" = s32\[\]\S* constant\((\d+)\)", line):
                limits[computation] = int(limit[1])  # of a condition, that a counter from 0 stays below

    def times(computation):
        if computation not in loops:
            return 1
        outside, condition = loops[computation]
        return limits[condition] * times(outside)

    return {name: times(computation) for name, computation in operations.items()}


def _cycles(folder):
    found = {}
    for path in folder.glob("*textproto"):
        text = path.read_text(errors="replace")
        name, cycles = re.search(r'hlo_op_name: "([^"]*)"', text), re.search(r"estimated_cycles: (\d+)", text)
        if name and cycles:
            found[name[1]] = int(cycles[1])
    return found


def _bundles(folder):
    found = {}
    for path in folder.glob("*schedule-analysis_final_bundles*"):
        name = re.match(r"\d+-(.*?)-\d+-schedule", path.name)
        bundles = re.search(r"total scheduled bundles:\s*(\d+)", path.read_text())
        if name and bundles:
            found[name[1]] = int(bundles[1])
    return found


def _kernel_costs(equation):
    """Matmul FLOPs, operand bytes and VMEM bytes of a Pallas call."""
    kernel, mapping = equation.params["jaxpr"], equation.params["grid_mapping"]
    blocks = [_bytes(ref.aval) for ref in kernel.invars]
    pipelined = len(mapping.block_mappings)
    return {
        "flops": math.prod(mapping.grid) * sum(_dot_flops(inner) * times for inner, times in _equations(kernel)),
        "bytes": sum(_bytes(x.aval) for x in (*equation.invars, *equation.outvars)),
        "vmem": 2 * sum(blocks[:pipelined]) + sum(blocks[pipelined:]),
    }


def _equations(jaxpr, times=1):
    """All equations with how often each runs; both sides of a branch."""
    for equation in jaxpr.eqns:
        yield equation, times
        if equation.primitive.name == "pallas_call":
            continue
        inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner, inner_times)


def _dot_flops(equation):
    if equation.primitive.name != "dot_general":
        return 0
    ((contracted, _), _), out = equation.params["dimension_numbers"], equation.outvars[0].aval
    depth = 1
    for axis in contracted:
        depth *= equation.invars[0].aval.shape[axis]
    return 2 * out.size * depth


def _bytes(aval):
    return aval.size * aval.dtype.itemsize


HEADER = (
    f"{'shape':16}{'chip':5}{'implementation':15}{'kernel':10}{'cycles':>8}{'matmul floor':>14}{'HBM floor':>11}"
    f"{'VMEM MB':>9}{'bundles':>9}{'whole op f+b':>14}"
)


def lines(job, result):
    whole = f"{result['whole']:14.3f}" if "whole" in result else f"{'-':>14}"
    if job.implementation != "mosaic_tpu":
        yield f"{job.shape:16}{job.chip:5}{job.implementation:15}{'':61}{whole}"
        return
    for kernel in KERNELS:
        if row := result.get(kernel):
            shares = [f"{row[name] / row['cycles']:.0%}" for name in ("matmul_floor", "memory_floor")]
            yield (
                f"{job.shape:16}{job.chip:5}{job.implementation:15}{kernel:10}{row['cycles']:8.3f}"
                f"{shares[0]:>14}{shares[1]:>11}{row['vmem_bytes'] / 1e6:9.1f}{row['bundles']:9d}{whole}"
            )
        else:
            yield f"{job.shape:16}{job.chip:5}{job.implementation:15}{kernel:10} not counted: the profiler aborted"


def check(stored: dict, jobs: list[Job]) -> list[str]:
    """What takes more cycles than `stored` says, by more than LIMIT."""
    problems = []
    for job in jobs:
        result = measure(dataclasses.replace(job, whole=False))
        for kernel in KERNELS:
            before, now = stored[f"{job.shape} {job.chip}"][kernel]["cycles"], result[kernel]["cycles"]
            print(f"{job.shape} {job.chip} {kernel}: {now:.3f} cycles, stored {before:.3f}")
            if now > LIMIT * before:
                problems.append(f"{job.shape} {job.chip} {kernel}: {now:.3f} cycles, {now / before:.2f} of the stored")
    return problems


def sweep(chip: str, shape: str) -> None:
    """One axis at a time, from the tiles that `specs` chooses, until no other value of an axis takes fewer cycles."""
    import jax.numpy as jnp

    from kernels.dispatch import Device
    from kernels.linear_attention import specs

    sizes = specs.SHAPES[shape]
    padded = [dim + -dim % 128 for dim in (sizes.key_dim, sizes.value_dim)]
    per_key, heads = sizes.decay == "vector", (sizes.heads, sizes.groups)
    chosen = dataclasses.astuple(specs.tiles(Device("tpu", chip), 4096, *heads, *padded, jnp.bfloat16, per_key))
    costs: dict[tuple[int, ...], tuple[float, ...]] = {}

    def total(tiles):
        if tiles not in costs:
            result = measure(Job(chip, shape, tiles=tiles, whole=False))
            costs[tiles] = tuple(result[kernel]["cycles"] if kernel in result else math.inf for kernel in KERNELS)
            print(*tiles, *costs[tiles], flush=True)
        return sum(costs[tiles])

    best, before = chosen, None
    while best != before:
        before = best
        for axis, values in enumerate(SWEPT.values()):
            others = [(*best[:axis], value, *best[axis + 1 :]) for value in values if value <= sizes.heads or axis != 2]
            best = min([best, *(tiles for tiles in others if tiles[1] >= tiles[0] * max(tiles[3:]))], key=total)
    print(f"\n{shape} {chip}, of {len(costs)} tiles, {' '.join(SWEPT)}: forward, backward")
    for tiles in sorted(costs, key=total)[:5]:
        mark = "  chosen by specs.tiles" * (tiles == chosen)
        print(f"{' '.join(map(str, tiles)):20} {costs[tiles][0]:8.2f} {costs[tiles][1]:8.2f}{mark}")


def main():
    from benchmarks.tpu_static_ops import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--implementation", choices=("mosaic_tpu", "chunked"), default="mosaic_tpu")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Job(**json.loads(args.child)))
        return
    chips, shapes = args.chips.split(","), args.shapes.split(",")
    for given, known in ((chips, CHIPS), (shapes, SHAPES)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    if args.sweep:
        if len(chips) != 1 or len(shapes) != 1:
            parser.error("--sweep needs one chip and one shape: --chips=v5e --shapes=square")
        return sweep(chips[0], shapes[0])
    jobs = [Job(chip, shape) for shape in shapes for chip in chips]
    if args.check:
        problems = check(json.loads(RESULTS.read_text())["results"], jobs)
        sys.exit("\n".join(problems) if problems else 0)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from benchmarks import record

    stored = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    print(HEADER)
    for job in jobs:
        job = dataclasses.replace(job, implementation=args.implementation)
        result, key = measure(job), f"{job.shape} {job.chip}"
        print("\n".join(lines(job, result)), flush=True)
        if job.implementation == "mosaic_tpu":
            stored[key] = {**stored.get(key, {}), **result}
        else:
            stored.setdefault(key, {})["chunked"] = result.get("whole")
        RESULTS.write_text(json.dumps(record.environment() | {"results": stored}, indent=1) + "\n")
    print(f"written to {RESULTS.relative_to(RESULTS.parent.parent.parent)}")


if __name__ == "__main__":
    main()
