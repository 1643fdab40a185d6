"""The least time that a compiled program takes on a chip: what each operation computes and moves, by the data sheet.

    operation       max(flops / peak, bytes / bandwidth of HBM)
    Pallas kernel   the same, times what its static count of cycles says (zoo.pallas_costs)
    collective      bytes that a device sends / the links along which its group lies
    step            max(sum of operations and kernels, collectives beside which other work runs) + the other collectives

Operations run one after another on a chip, so their times add up; within one, memory hides behind arithmetic or the
other way round. Bytes are those of arrays in HBM: a TPU's compiler says which of them stay in vector memory.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from zoo import hlo
from zoo.chips import Chip
from zoo.hlo import Collective, Computation, Instruction, Program
from zoo.pallas_costs import Kernel, over_floor

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "copy-done", "slice-done", "async-done", "async-update", "add-dependency", "opt-barrier",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy", "convert", "transpose")


class Operation(NamedTuple):
    """What runs by itself on a device: a fusion, a copy, a kernel.

    Attributes:
      name: of a Pallas kernel its own, else the compiler's.
      kind: "matmul", "kernel" or "other".
      flops: of its products.
      bytes: that it reads and writes in HBM, of a stacked array one slice where it takes one.
      count: how often a step runs it.
      cycles: that the compiler expects of it; 0 where it does not say.
      source: the operation of the traced program.
    """

    name: str
    kind: str
    flops: int
    bytes: int
    count: int
    cycles: int
    source: str

    def seconds(self, chip: Chip) -> float:
        """Each time."""
        floor = max(self.flops / chip.peak, self.bytes / chip.bandwidth)
        return floor * over_floor(self.name, chip.kind)


def operations(program: Program, kernels: Sequence[Kernel] = ()) -> list[Operation]:
    """All operations of a step but collectives. Those in a loop whose turns are not known count once.

    Args:
      kernels: `zoo.pallas_costs.kernels` of the traced program, whose calls are named after them.
    """
    found = []
    for place, instruction, times, _ in program.operations():
        if instruction.opcode in _FREE or instruction.opcode.removesuffix("-done").removesuffix("-start") in hlo.KINDS:
            continue
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        flops, moved, kind, name = 0, _moved(program, place, instruction), "other", instruction.name
        if instruction.opcode == "custom-call" and re.search("tpu_custom_call|mosaic_gpu", instruction.attributes):
            kind, called = "kernel", _kernel(instruction, kernels)
            flops, name = (called.flops, called.name) if called else (0, name)
        elif flops := _flops(program, place, instruction):
            kind = "matmul"
        if flops or moved:
            count = int(cycles[1]) if cycles else 0
            found.append(Operation(name, kind, flops, moved, times, count, instruction.source))
    return found


def _kernel(instruction: Instruction, kernels: Sequence[Kernel]) -> Kernel | None:
    named = [k for k in kernels if k.name and (k.name in instruction.source or instruction.name.startswith(k.name))]
    size = hlo.array_bytes(instruction.type)
    return min(named, key=lambda k: (abs(k.results - size), -len(k.name)), default=None)


# --- Bytes ------------------------------------------------------------------------------------------------------------


def _moved(program: Program, place: Computation, instruction: Instruction) -> int:
    """Bytes in HBM."""
    operands = [place[name] for name in instruction.operands if name in place]
    if instruction.opcode in ("copy-start", "slice-start"):  # between HBM and vector memory
        arrays = re.findall(r"\b[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", instruction.type)
        target = arrays[0] if instruction.opcode == "copy-start" else arrays[-1]
        sides = sum(_in_hbm(x) > 0 for x in (target, operands[0].type))
        return sides * hlo.stored_bytes(target)
    if instruction.opcode == "fusion":
        called = program.computations[instruction.calls()[0]]
        parameters = sorted(
            (i for i in called.values() if i.opcode == "parameter"), key=lambda i: int(re.sub(r"\D", "", i.literal))
        )
        read = sum(
            min(hlo.stored_bytes(outside.type), _read(program, called, inside.name))
            for outside, inside in zip(operands, parameters, strict=False)
            if _in_hbm(outside.type)
        )
        return read + min(_written(program, called, called.root), _in_hbm(instruction.type))
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1].type)
    if instruction.opcode in _SLICES:
        return 2 * _in_hbm(instruction.type)
    return sum(_in_hbm(x.type) for x in (instruction, *operands))


def _in_hbm(type_: str) -> int:
    return hlo.stored_bytes(type_, on_chip=False)


def _read(program: Program, place: Computation, name: str) -> int:
    """Bytes of a fusion's operand that it reads: slices where it takes slices."""
    total = 0
    for user in place.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            total += hlo.stored_bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # in its place
        elif user.opcode == "bitcast":
            total += _read(program, place, user.name)
        elif user.opcode == "fusion":
            called = program.computations[user.calls()[0]]
            numbers = {n for n, operand in enumerate(user.operands) if operand == name}
            inner = [i.name for i in called.values() if i.opcode == "parameter" and int(i.literal) in numbers]
            total += sum(_read(program, called, parameter) for parameter in inner)
        else:
            return hlo.stored_bytes(place[name].type)
    return total


def _written(program: Program, place: Computation, name: str) -> int:
    """Bytes of a fusion's result that it writes: the slice where it changes one of an operand."""
    instruction = place.get(name)
    if instruction is None:
        return 0
    if instruction.opcode == "tuple":
        return sum(_written(program, place, operand) for operand in instruction.operands)
    if instruction.opcode == "dynamic-update-slice":
        return hlo.stored_bytes(place[instruction.operands[1]].type)
    if instruction.opcode == "bitcast":
        return _written(program, place, instruction.operands[0])
    if instruction.opcode == "fusion" and not instruction.type.startswith("("):
        called = program.computations[instruction.calls()[0]]
        return _written(program, called, called.root)
    return 0 if instruction.opcode == "parameter" else _in_hbm(instruction.type)


# --- Products ---------------------------------------------------------------------------------------------------------


def _flops(program: Program, place: Computation, instruction: Instruction) -> int:
    """Of the matrix products in an instruction."""
    if instruction.opcode == "fusion":
        called = program.computations[instruction.calls()[0]]
        return sum(_flops(program, called, inner) for inner in called.values())
    if instruction.opcode == "dot":
        left = _shape(place[instruction.operands[0]].type)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        depth = math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
        return 2 * math.prod(_shape(instruction.type)) * depth
    if instruction.opcode == "convolution":
        return _convolution(place, instruction)
    if "__cublas" in instruction.attributes:
        return _gemm(place, instruction)
    return 0


def _convolution(place: Computation, instruction: Instruction) -> int:
    """TPUs' compilers write products as convolutions: a window along a batch axis takes padding at most places."""
    left, right = (_shape(place[name].type) for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    inputs, filters, outputs = labels.groups()
    out = _shape(instruction.type)
    window = dict(
        re.findall(r"(\w+)=([\w\-x]+)", (re.search(r"window=\{(.*?)\}", instruction.attributes) or ["", ""])[1])
    )

    def numbers(name: str, default: int) -> list[int]:
        return [int(n) for n in window[name].split("x")] if name in window else [default] * 9

    pads = [int(pad.split("_")[0]) for pad in window["pad"].split("x")] if "pad" in window else [0] * 9
    strides, left_dilation, right_dilation = (numbers(name, 1) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    positions = 1
    for axis in range(sum(label.isdigit() for label in outputs)):
        label = str(axis)
        size, taps, places = (
            s[labels_.index(label)] for s, labels_ in ((left, inputs), (right, filters), (out, outputs))
        )
        dilated = (size - 1) * left_dilation[axis] + 1
        valid = 0
        for tap in range(taps):
            offset = tap * right_dilation[axis] - pads[axis]
            valid += sum(
                0 <= (at := place_ * strides[axis] + offset) < dilated and at % left_dilation[axis] == 0
                for place_ in range(places)
            )
        positions *= valid
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = left[inputs.index("b")] // (int(groups[1]) if groups else 1)
    return 2 * batch * positions * right[filters.index("i")] * out[outputs.index("f")]


def _gemm(place: Computation, instruction: Instruction) -> int:
    """A call of cuBLAS: the left operand's contracted sizes are in its config."""
    left = _shape(place[instruction.operands[0]].type)
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if contracted is None:
        return 0
    depth = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
    return 2 * math.prod(_shape(instruction.type)) * depth


def _shape(type_: str) -> list[int]:
    """Of an array, or of the first of a tuple."""
    match = re.search(r"\[([\d,]*)\]", type_)
    return [int(size) for size in match[1].split(",") if size] if match else []


# --- The step ---------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Seconds of a step on one device.

    Attributes:
      matmul: matrix products at the chip's peak.
      memory: all bytes of HBM at its rate, kernels' included.
      kernels: Pallas kernels.
      other: operations without products.
      operations: all operations, each the larger of its two, with the kernels.
      hidden: collectives beside which other work runs.
      exposed: the other collectives.
      compiler: what the compiler's own model of costs says of all but kernels and collectives; 0 where it has none.
    """

    matmul: float
    memory: float
    kernels: float
    other: float
    operations: float
    hidden: float
    exposed: float
    compiler: float

    @property
    def step(self) -> float:
        return max(self.operations, self.hidden) + self.exposed

    def shares(self) -> dict[str, float]:
        """Of the step, by what binds it, the largest first."""
        parts = {
            "matrix products": self.operations - self.kernels - self.other,
            "kernels": self.kernels,
            "elementwise and layout work": self.other,
            "interconnect": self.exposed + max(0.0, self.hidden - self.operations),
        }
        return {name: parts[name] / self.step for name in sorted(parts, key=parts.get, reverse=True)}

    def bound(self) -> str:
        """ "matrix products 76%, elementwise and layout work 13%": what half of the step, or more, is spent on."""
        said, together = [], 0.0
        for name, share in self.shares().items():
            said.append(f"{name} {share:.0%}")
            together += share
            if together >= 0.5:
                break
        return ", ".join(said)


def estimate(
    found: Sequence[Operation],
    collectives: Sequence[Collective],
    chip: Chip,
    links: Callable[[Collective], float],
) -> Estimate:
    """Of a step.

    Args:
      chip: as much of it as one device has.
      links: that a collective's devices send along at once.
    """

    def total(kind: str) -> float:
        return sum(o.count * o.seconds(chip) for o in found if o.kind == kind)

    def sent(overlapped: bool) -> float:
        return sum(c.count * c.bytes / (links(c) * chip.link) for c in collectives if c.overlapped == overlapped)

    return Estimate(
        matmul=sum(o.count * o.flops for o in found if o.kind == "matmul") / chip.peak,
        memory=sum(o.count * o.bytes for o in found) / chip.bandwidth,
        kernels=total("kernel"),
        other=total("other"),
        operations=total("kernel") + total("other") + total("matmul"),
        hidden=sent(True),
        exposed=sent(False),
        compiler=sum(o.count * o.cycles for o in found if o.kind != "kernel") / chip.clock if chip.clock else 0.0,
    )


def links(coordinates: Mapping[int, Sequence[int]], chip: Chip) -> Callable[[Collective], float]:
    """How many links a collective's devices send along at once: two along each side of the torus on which the group
    lies where that side is a ring, one where it is a line; one for a permutation, and off a torus.

    Args:
      coordinates: of each device, by its place in the mesh.
    """
    sides = [max(axis) + 1 for axis in zip(*coordinates.values(), strict=True)]

    def of(collective: Collective) -> float:
        if not chip.sides or collective.kind == "collective-permute":
            return 1
        spans = zip(*(coordinates[device] for device in collective.group), strict=True)
        along = [side for side, span in zip(sides, spans, strict=False) if len(set(span)) > 1]
        return sum(2 if side % chip.wraps == 0 else 1 for side in along) or 1

    return of
