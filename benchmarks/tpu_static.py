"""What the kernels cost on TPUs that are not there: `python -m benchmarks.tpu_static [--chips=v5e] [--shapes=square]`.

libtpu compiles the op, forward and backward, for a chip, and its static model counts cycles of each kernel and of
each XLA operation around it (it simulates the grid; what it says of the body of an XLA loop is multiplied by the
loop's trip count here). Printed, for each shape of `benchmarks.tpu_static_ops` and each chip, per token and unit of
the op (a head of v, a channel): cycles of the forward and the backward kernel and of everything, XLA's operations
included; what share of them the floors are: the kernel's matmuls at the chip's bfloat16 rate, and its operands, each
read or written once, at the chip's memory rate; the bytes of VMEM its blocks take; its bundles.
At most eight heads are counted, or those of two heads of q and k; the others have nothing to do with them.
`--implementation=chunked` gives the whole op in its XLA form (minutes for a shape of linear attention).

All numbers are static. Against published timings of other kernels they read 0.95 to 1.0 where matmuls bind, 0.7 to
0.85 where latency or vector operations do: believe a difference of 25%.

    --check   compare with benchmarks/results/tpu_static.json: exit 1 if a kernel takes 10% more cycles than it says
    --sweep   tiles of one chip and shape of linear attention or the delta rule, best first: what `specs.tiles` was
              chosen by. One axis at a time, from those that it chooses, until no other value of an axis takes fewer
              cycles

Needs libtpu (pip install 'jax[tpu]'). No TPU.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys

from benchmarks.tpu_cycles import CHIPS, Job, measure

RESULTS = pathlib.Path(__file__).parent / "results" / "tpu_static.json"
LIMIT = 1.1  # of the stored cycles
KERNELS = ("forward", "backward")
UNROLLED = (1, 2, 4, 8)
SWEPT = {"chunk": (64, 128, 256), "block": (256, 512, 1024), "heads": (1, 2, 4, 8)} | {
    "unroll": UNROLLED,
    "backward's": UNROLLED,
}


HEADER = (
    f"{'shape':18}{'chip':5}{'implementation':15}{'kernel':10}{'cycles':>8}{'matmul floor':>14}{'HBM floor':>11}"
    f"{'VMEM MB':>9}{'bundles':>9}{'whole op f+b':>14}"
)


def lines(job, result):
    whole = f"{result['whole']:14.3f}" if "whole" in result else f"{'-':>14}"
    if job.implementation != "mosaic_tpu":
        yield f"{job.shape:18}{job.chip:5}{job.implementation:15}{'':61}{whole}"
        return
    for kernel in KERNELS:
        if row := result.get(kernel):
            shares = [f"{row[name] / row['cycles']:.0%}" for name in ("matmul_floor", "memory_floor")]
            yield (
                f"{job.shape:18}{job.chip:5}{job.implementation:15}{kernel:10}{row['cycles']:8.3f}"
                f"{shares[0]:>14}{shares[1]:>11}{row['vmem_bytes'] / 1e6:9.1f}{row['bundles']:9d}{whole}"
            )
        else:
            yield f"{job.shape:18}{job.chip:5}{job.implementation:15}{kernel:10} not counted: the profiler aborted"


def check(stored: dict, jobs: list[Job]) -> list[str]:
    """What takes more cycles than `stored` says, by more than LIMIT."""
    problems = []
    for job in jobs:
        result = measure(dataclasses.replace(job, whole=False))
        for kernel in KERNELS:
            if kernel not in (known := stored.get(f"{job.shape} {job.chip}", {})):
                print(f"{job.shape} {job.chip} {kernel}: nothing is stored, or its profiler aborted")
                continue
            before, now = known[kernel]["cycles"], result[kernel]["cycles"]
            print(f"{job.shape} {job.chip} {kernel}: {now:.3f} cycles, stored {before:.3f}")
            if now > LIMIT * before:
                problems.append(f"{job.shape} {job.chip} {kernel}: {now:.3f} cycles, {now / before:.2f} of the stored")
    return problems


def sweep(chip: str, shape: str) -> None:
    """One axis at a time, from the tiles that `specs` chooses, until no other value of an axis takes fewer cycles."""
    from benchmarks.tpu_static_ops import tiles_of

    chosen, possible = tiles_of(shape, chip)
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
            others = [(*best[:axis], value, *best[axis + 1 :]) for value in values]
            best = min([best, *filter(possible, others)], key=total)
    print(f"\n{shape} {chip}, of {len(costs)} tiles, {' '.join(SWEPT)}: forward, backward")
    for tiles in sorted(costs, key=total)[:5]:
        mark = "  chosen by specs.tiles" * (tiles == chosen)
        print(f"{' '.join(map(str, tiles)):20} {costs[tiles][0]:8.2f} {costs[tiles][1]:8.2f}{mark}")


def main():
    from benchmarks.tpu_static_ops import SHAPES, TILED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--implementation", choices=("mosaic_tpu", "chunked"), default="mosaic_tpu")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    chips, shapes = args.chips.split(","), args.shapes.split(",")
    for given, known in ((chips, CHIPS), (shapes, SHAPES)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    if args.sweep:
        if len(chips) != 1 or len(shapes) != 1:
            parser.error("--sweep needs one chip and one shape: --chips=v5e --shapes=square")
        if shapes[0] not in TILED:
            parser.error(f"--sweep has no tiles for {shapes[0]}; expected one of {', '.join(TILED)}")
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
