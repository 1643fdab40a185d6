"""Cycles that libtpu's static model counts for one op: the process behind `benchmarks.tpu_static`."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from zoo import hlo, pallas_costs

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # of `zoo.chips`, and a topology that has them
MARK = "STATIC "
NOTHING = "kernel_that_does_nothing"
SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Job:
    chip: str
    shape: str
    implementation: str = "mosaic_tpu"
    tiles: tuple[int, ...] | None = None
    whole: bool = True  # the op with XLA's part too, after the kernels alone


def measure(job: Job) -> dict:
    """Costs by kernel, and of all, in a process of its own: libtpu reads its flags once, and its profiler may abort.

    What was counted before an abort, or before `SECONDS`, is returned; kernels without cycles are left out.
    """
    command = [sys.executable, "-m", "benchmarks.tpu_cycles", json.dumps(dataclasses.asdict(job))]
    with tempfile.TemporaryFile("w+") as out:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=out, stderr=subprocess.DEVNULL, timeout=SECONDS)
        out.seek(0)
        found = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK)]
    return {name: value for part in found for name, value in part.items()}


def count(job: Job) -> None:
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

        from zoo import chips

        program, args, op = _program(job)
        units = op.time * op.units
        chip = chips.CHIPS[job.chip]
        sharding, in_kernels = jax.tree.leaves(args)[0].sharding, 0
        for equation, _ in pallas_costs.equations(jax.make_jaxpr(program)(*args).jaxpr):
            if equation.primitive.name != "pallas_call":
                continue
            name = equation.params["name"]
            _clear(dump)
            _alone(equation, sharding).compile()
            counted = _cycles(pathlib.Path(dump, "cycles"))
            operation = max(counted, key=counted.get)  # there is no other but copies
            cycles, bundles = counted[operation], _bundles(pathlib.Path(dump, "text"))[operation]
            if not cycles:
                sys.exit(f"{name}: the profiler counts nothing")  # of some kernels for v5p
            in_kernels += cycles
            costs = pallas_costs.kernel(equation)
            row = {
                "cycles": cycles / units,
                "matmul_floor": costs.flops / (chip.peak / chip.clock) / units,
                "memory_floor": costs.bytes / (chip.bandwidth / chip.clock) / units,
                "vmem_bytes": _vmem(equation),
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

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[job.chip]).devices[0]
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
    return {run.instruction.name: run.times for run in hlo.parse(program).operations()}


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


def _vmem(equation):
    """Bytes of VMEM that the blocks of a Pallas call take."""
    mapping, blocks = equation.params["grid_mapping"], [_bytes(ref.aval) for ref in equation.params["jaxpr"].invars]
    pipelined = len(mapping.block_mappings)
    return 2 * sum(blocks[:pipelined]) + sum(blocks[pipelined:])


def _bytes(aval):
    return aval.size * aval.dtype.itemsize


if __name__ == "__main__":
    count(Job(**json.loads(sys.argv[1])))
