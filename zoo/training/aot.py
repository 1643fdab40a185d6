"""The whole training step, compiled ahead of time for chips that are not there: what it needs, and how long it takes.

Nothing runs, so the times are estimates (zoo.roofline): the least that the compiled operations take by the chip's data
sheet, and beside it what the compiler's own model of costs says.
"""

import dataclasses
import re
import textwrap
import time
from typing import Any

import jax

from zoo import chips, data, flops, hlo, memory, pallas_costs, roofline, sharding
from zoo import config as zoo_config
from zoo.config import Config
from zoo.training import placement, step, topology

GIB = 2**30
_EXCEEDED = re.compile(r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT]?)")


@dataclasses.dataclass
class Report:
    """What was found of a step; bytes, FLOPs and seconds are of one device.

    Attributes:
      needed: bytes at the peak.
      has: bytes that a program may have.
      parts: bytes by what they are for.
      model_flops, program_flops, kernel_flops, xla_flops: by the model's formula; of the compiled matrix products; of
        Pallas kernels; by XLA's cost analysis. None where nothing was compiled.
      collectives: by kind, how many and how many bytes a device sends.
      estimate: seconds, by `zoo.roofline`; None where nothing was compiled.
      compile_seconds: tracing included.
      why: what the compiler or the check of sizes said, where the step does not fit.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    needed: int
    has: int
    parts: dict[str, int]
    tokens: int
    model_flops: float
    program_flops: float | None = None
    kernel_flops: float | None = None
    xla_flops: float | None = None
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    estimate: roofline.Estimate | None = None
    compile_seconds: float = 0.0
    why: str = ""
    measured: float = 0.0  # seconds of a step at the rates that the chip was measured to reach; 0: it was not
    unknown: tuple[str, ...] = ()  # loops whose turns are not known before they run; they count once
    peak: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.why and self.needed <= self.has

    @property
    def by_compiler(self) -> float:
        """Seconds of a step by the compiler's own model of costs, kernels and collectives as estimated; 0: unknown."""
        e = self.estimate
        return max(e.compiler + e.kernels, e.hidden) + e.exposed if e and e.compiler else 0.0

    def mfu(self, seconds: float) -> float:
        return self.model_flops / (seconds * self.peak)


def compile_step(config: Config, name: str) -> Report:
    """Compile the step of `config` for the topology `name`.

    Args:
      config: with its vocabulary settled.

    Raises:
      UsageError: an unknown topology, a mesh that does not fit it, a config that does not fit the mesh.
    """
    devices = topology.devices(name)
    placement.check(config, len(devices))
    mesh = sharding.make_mesh(config.mesh, devices)
    chip = chips.CHIPS[name.partition(":")[0]]
    start = time.perf_counter()
    programs = step.build(config, mesh)
    state = programs.abstract_state
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=programs.batch_shardings[key])
        for key, x in step.abstract_batch(config).items()
    }
    train = config.train
    tokens = train.batch_size * train.context_length
    parts = {
        "parameters": placement.bytes_of(jax.tree.leaves(state.params))[1],
        "optimizer": placement.bytes_of(jax.tree.leaves(state.opt))[1],
        "batch": placement.bytes_of(batch.values())[1],
    }
    if programs.distillation is not None:
        parts["teacher"] = placement.bytes_of(jax.tree.leaves(programs.abstract_teacher))[1]
    labels = data.labels(config, training=True)
    counted = programs.distillation.flops_per_token if programs.distillation else flops.train_flops_per_token
    report = Report(
        topology=name,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        needed=sum(parts.values()) + parts["parameters"],
        has=int(chip.memory),
        parts=parts,
        tokens=tokens,
        model_flops=counted(config.model, train.context_length, labels) * tokens / mesh.size,
        peak=chip.peak,
    )
    optimizer = programs.optimizer_bytes
    floor = memory.floor(config, mesh, optimizer) // mesh.size
    if floor > report.has:
        report.needed = floor
        report.why = f"at least, by formula ({memory.training(config, optimizer)}); nothing was compiled"
        return report
    traced = programs.train.trace(state, batch, *programs.abstract_teacher)
    try:
        compiled = topology.compile_for(devices[0].platform, traced)
    except jax.errors.JaxRuntimeError as error:
        _did_not_fit(report, error)
        return report
    report.compile_seconds = time.perf_counter() - start
    _read(report, compiled, pallas_costs.kernels(traced.jaxpr.jaxpr), chip, mesh)
    return report


def _did_not_fit(report: Report, error: jax.errors.JaxRuntimeError) -> None:
    """The compiler's numbers of memory; anything else that it says is raised again."""
    said = str(error).strip().splitlines()[0]
    if "RESOURCE_EXHAUSTED" not in said:
        raise error
    report.why = said.removeprefix("RESOURCE_EXHAUSTED: ")
    if numbers := _EXCEEDED.search(report.why):
        used, report.has = _amount(*numbers.groups()[:2]), _amount(*numbers.groups()[2:])
        report.parts["temporaries"] = used if "temporaries" in said else max(0, used - sum(report.parts.values()))
        report.needed = sum(report.parts.values())


def _amount(number: str, unit: str) -> int:
    """Bytes of "29.64", "G"."""
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _read(report: Report, compiled: Any, kernels: list[pallas_costs.Kernel], chip: chips.Chip, mesh: Any) -> None:
    """The compiled step's memory, FLOPs, collectives and times."""
    sizes = compiled.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # the state is donated
    report.parts["temporaries"] = sizes.temp_size_in_bytes
    report.parts["program"] = sizes.generated_code_size_in_bytes
    report.needed = (
        sizes.argument_size_in_bytes + outputs + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    )
    report.xla_flops = (compiled.cost_analysis() or {}).get("flops")  # GPUs' compilers have none
    program = hlo.parse(compiled.as_text())
    operations, collectives = roofline.operations(program, kernels), hlo.collectives(program, strict=False)
    report.program_flops = sum(o.count * o.flops for o in operations if o.kind == "matmul")
    if kernels or not any(o.kind == "kernel" for o in operations):  # what is in a GPU's is not counted
        report.kernel_flops = sum(o.count * o.flops for o in operations if o.kind == "kernel")
    report.unknown = tuple(dict.fromkeys(run.loop for run in program.operations() if run.loop))
    report.collectives = hlo.by_kind(collectives)
    coordinates = {place: getattr(device, "coords", ()) for place, device in enumerate(mesh.devices.flat)}
    links = roofline.links(coordinates, chip)
    report.estimate = roofline.estimate(operations, collectives, chip, links)
    if chip.measured:
        peak, bandwidth = chip.measured
        chip = chip._replace(peak=peak, bandwidth=bandwidth)
        report.measured = roofline.estimate(operations, collectives, chip, links).step


# --- The report as text -----------------------------------------------------------------------------------------------


def describe(config: Config, report: Report) -> str:
    """All of it, in the manner of --dry_run."""
    model, shape = config.model, ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    lines = [
        f"mesh        {shape}: {report.devices:,} devices, {report.topology}",
        f"model       {model.num_layers} layers of width {model.d_model}, vocabulary {model.vocab_size}, "
        f"{flops.num_parameters(model):,} parameters",
        *textwrap.wrap(
            ", ".join(zoo_config.pattern(model)), 100, initial_indent="mixer       ", subsequent_indent=" " * 12
        ),
        f"a step      {config.train.batch_size} sequences of {config.train.context_length} tokens, "
        f"remat {model.remat}, {model.dtype}",
    ]
    if report.estimate:
        lines.append(f"compiled    in {report.compile_seconds:.1f} s")
    lines += ["", *_memory(report)]
    if report.estimate:
        lines += ["", *_flops(report), "", *_collectives(report), "", *_times(report)]
    return "\n".join([*lines, "", "Nothing ran, and nothing was written."])


def statement(report: Report) -> str:
    """ "fits, 3.4 GiB free"."""
    difference = abs(report.has - report.needed) / GIB
    if report.fits:
        return f"fits, {difference:.2f} GiB free"
    return f"does not fit, by {difference:.2f} GiB" if report.needed > report.has else "does not fit"


_WHAT = {
    "temporaries": "gradients, activations, and what else the compiler keeps",
    "program": "the compiled code",
}


def _memory(report: Report) -> list[str]:
    lines = [f"{'memory, a device':24}{'GiB':>9}"]
    lines += [f"  {name:22}{size / GIB:9.3f}  {_WHAT.get(name, '')}".rstrip() for name, size in report.parts.items()]
    lines.append(f"  {'together':22}{report.needed / GIB:9.3f}  of {report.has / GIB:.2f}: {statement(report)}")
    return lines + ([f"  {report.why}"] if report.why else [])


def _flops(report: Report) -> list[str]:
    rows = {
        "model": (report.model_flops, "by zoo.flops, three times the forward pass; MFU counts these"),
        "program": (
            report.program_flops,
            "matrix products as compiled: recomputation too, loops as often as they turn",
        ),
        "kernels": (report.kernel_flops, "products in Pallas kernels, sizes rounded up to 128"),
        "XLA's cost analysis": (report.xla_flops, "takes a loop's body once, and nothing of kernels"),
    }
    lines = [f"{'FLOPs a step, a device':24}{'TFLOP':>9}"]
    return lines + [f"  {name:22}{_tera(value):>9}  {what}" for name, (value, what) in rows.items()]


def _tera(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e12:.2f}"


def _collectives(report: Report) -> list[str]:
    lines = [f"{'collectives a step':24}{'number':>9}{'MB that a device sends':>26}"]
    lines += [f"  {kind:22}{count:9,}{sent / 1e6:26,.1f}" for kind, (count, sent) in report.collectives.items()]
    return lines if report.collectives else ["collectives a step      none"]


def _times(report: Report) -> list[str]:
    e, ms, rate = report.estimate, 1e3, report.peak / 1e12
    lines = [
        f"{'time a step, at least':24}{'ms':>9}",
        f"  {'matrix products':22}{e.matmul * ms:9.1f}  at {rate:.0f} TFLOP/s",
        f"  {'HBM':22}{e.memory * ms:9.1f}  all bytes that operations and kernels read and write",
        f"  {'kernels':22}{e.kernels * ms:9.1f}  their floors, times their static cycles' share of those",
        f"  {'elementwise, layout':22}{e.other * ms:9.1f}  operations without a product",
        f"  {'interconnect':22}{(e.hidden + e.exposed) * ms:9.1f}  {e.exposed * ms:.1f} of it with nothing beside it",
        f"  {'step':22}{e.step * ms:9.1f}  operation by operation; {_speed(report, e.step)}; bound by {e.bound()}",
    ]
    if report.unknown:
        lines.append(f"  {len(report.unknown)} loop(s), whose turns are not known before they run, count once")
    if seconds := report.by_compiler:
        lines.append(f"  {'by the compiler':22}{seconds * ms:9.1f}  its own model of costs; {_speed(report, seconds)}")
    if seconds := report.measured:
        what = "at the rates that a product and a copy were measured to reach"
        lines.append(f"  {'as measured':22}{seconds * ms:9.1f}  {what}; {_speed(report, seconds)}")
    return lines


def _speed(report: Report, seconds: float) -> str:
    return f"{report.tokens / seconds:,.0f} tokens/s, MFU {report.mfu(seconds):.1%}"
