"""What a compiled program does, read off its text (`jax.stages.Compiled.as_text()`): operations, loops, collectives.

XLA's own cost analysis takes the body of a loop once, and the layers of a model are a loop. Here an operation counts as
often as the loops around it turn.

The text is of one device of a partitioned program, so shapes are a device's. What is read is what CPU, GPU and TPU
compilers write: collectives alone, in pairs of start and done, in fusions, and on TPUs in chains of fusions that carry
one collective along with other work.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(([^)]*)\)(.*)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{(.*?)\}")
_CALLED = re.compile(r"(?:calls|to_apply|body|(?:branch|true|false)_computations?)=(\{[^}]*\}|%?\S+)")


class Instruction(NamedTuple):
    name: str
    type: str  # "f32[2,3]{1,0}", or a tuple of such
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses: a constant's value
    attributes: str

    def calls(self) -> list[str]:
        """Computations that this instruction runs, a loop's body among them."""
        found = _CALLED.findall(self.attributes)
        return [name.strip(" %{},") for names in found for name in names.split(",") if name.strip(" %{},")]

    @property
    def source(self) -> str:
        """The operation of the traced program that it came from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


class Run(NamedTuple):
    """An instruction of a step."""

    place: "Computation"
    instruction: Instruction
    times: int  # that a step runs it
    loop: str  # around it, whose turns are not known before it runs, and count as one; "": none


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order of the text."""

    root: str = ""

    def operand_types(self, instruction: Instruction) -> list[str]:
        return [self[name].type for name in instruction.operands if name in self]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: Mapping[str, Computation]
    entry: str
    devices: int

    def operations(self) -> Iterator[Run]:
        """Every instruction that runs by itself. Fusions are one instruction. All branches of a conditional count."""
        yield from self._run(self.entry, 1, "")

    def _run(self, name: str, times: int, unknown: str) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                turns = self._turns(computation, instruction)
                unknown_too = instruction.name if turns is None else unknown
                yield from self._run(instruction.calls()[0], times * (1 if turns is None else turns), unknown_too)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for called in instruction.calls():
                    yield from self._run(called, times, unknown)
            else:
                yield Run(computation, instruction, times, unknown)

    def _turns(self, outside: Computation, loop: Instruction) -> int | None:
        """From XLA's own note, else from the counter that the condition holds against a constant; None: neither."""
        if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
        compare = condition[condition.root]
        limit, counter = None, None
        for operand in compare.operands:
            instruction = condition[operand]
            if instruction.opcode == "get-tuple-element":
                counter = _index(instruction)
            else:
                limit = _constant(condition, operand)
        if compare.opcode != "compare" or limit is None or counter is None:
            return None
        body = self.computations[loop.calls()[0]]
        first = _constant(outside, _element(outside, loop.operands[0], counter))
        step = _step(body, _element(body, body.root, counter), counter)
        if first is None or step == 0:
            return None
        included = re.search(r"direction=(LE|GE)", compare.attributes) is not None
        last = limit + (1 if step > 0 else -1) * included
        return max(0, -(-(last - first) // step))


def parse(text: str) -> Program:
    """The computations of a compiled program."""
    computations, computation, entry = {}, None, ""
    for line in text.splitlines():
        if line[:1] in ("%", "E", "}") or (line[:1].isalpha() and line.endswith("{")):
            header = _HEADER.match(line)
            if header:
                computation = computations.setdefault(header[2], Computation())
                entry = header[2] if header[1] else entry
        elif computation is not None and (match := _INSTRUCTION.match(line)):
            root, name, type_, opcode, operands, attributes = match.groups()
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            computation[name] = Instruction(name, type_, opcode, names, operands, attributes)
            if root:
                computation.root = name
    counts = [re.search(rf"{name}=(\d+)", text[:100_000]) for name in ("num_partitions", "replica_count")]
    return Program(computations, entry, math.prod(int(count[1]) for count in counts if count))


def array_bytes(type_: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(_bits(dtype) * math.prod(_numbers(shape)) for dtype, shape, _ in _ARRAY.findall(type_)) // 8


def stored_bytes(type_: str, *, on_chip: bool = True) -> int:
    """`array_bytes` in whole tiles: an array whose last axis is 64 wide takes twice its size where tiles are 8 x 128.

    `on_chip`: False leaves out arrays in a TPU's vector memory.
    """
    bits = 0
    for dtype, shape, layout in _ARRAY.findall(type_):
        if "S(" in layout and not on_chip:
            continue
        sizes, order = list(_numbers(shape)), _numbers(layout.partition(":")[0])
        tile = re.search(r":T\(([\d,]+)\)", layout)
        for axis, side in zip(order, reversed(_numbers(tile[1]) if tile else ()), strict=False):
            sizes[axis] = -(-sizes[axis] // side) * side
        bits += _bits(dtype) * math.prod(sizes)
    return bits // 8


def _bits(dtype: str) -> int:
    return BITS.get(dtype, 8 if dtype.startswith("f8") else 0)


def _index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _element(computation: Computation, name: str, index: int) -> str:
    """The instruction that makes an element of a tuple; "" where the tuple is not made here."""
    instruction = computation[name]
    return instruction.operands[index] if instruction.opcode == "tuple" else ""


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


def _step(body: Computation, name: str, counter: int) -> int:
    """What a turn adds to the counter: 1 unless the body adds another constant to it, several times perhaps."""
    step, instruction = 0, body.get(name)
    while instruction is not None:
        if instruction.opcode == "get-tuple-element" and _index(instruction) == counter:
            return step or 1
        if instruction.opcode in ("add", "subtract"):
            constants = [_constant(body, operand) for operand in instruction.operands]
            sign = 1 if instruction.opcode == "add" else -1
            step += sign * next((value for value in constants if value is not None), 0)
            others = [name for name, value in zip(instruction.operands, constants, strict=True) if value is None]
            instruction = body.get(others[0]) if others else None
        elif instruction.opcode in ("copy", "bitcast"):
            instruction = body.get(instruction.operands[0])
        else:
            return 1
    return 1


# --- Collectives ------------------------------------------------------------------------------------------------------


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: of KINDS.
      bytes: that one device sends, each time: of an operand of s bytes among n devices (n - 1) s for an all-gather,
        (n - 1) / n s for a reduce-scatter and an all-to-all, 2 (n - 1) / n s for an all-reduce, s for the others.
      count: how often a step runs it.
      group: one of the groups of devices that take part, by their place in the mesh; of a permutation, one chain.
      overlapped: other work may run meanwhile.
      source: the operation of the traced program that it came from.
    """

    kind: str
    bytes: int
    count: int
    group: tuple[int, ...]
    overlapped: bool
    source: str


def collectives(program: str | Program, *, strict: bool = True) -> list[Collective]:
    """All collectives of a compiled program (its text, or `parse` of it), each once.

    `strict`: False takes a loop whose turns are not known to turn once.

    Raises:
      ValueError: one is in a loop whose turns are not known before it runs.
    """
    program, found = parse(program) if isinstance(program, str) else program, []
    for run in program.operations():
        inside = list(_of(program, run.place, run.instruction, run.times))
        if inside and run.loop and strict:
            raise ValueError(f"the number of turns of the loop {run.loop} is not known: {inside[0]}")
        found += inside
    return found


def by_kind(found: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """Of each kind, how many a step runs, and the bytes that one device sends in them."""
    return {
        kind: (sum(c.count for c in found if c.kind == kind), sum(c.count * c.bytes for c in found if c.kind == kind))
        for kind in KINDS
        if any(c.kind == kind for c in found)
    }


def total_bytes(found: Sequence[Collective]) -> int:
    """That one device sends in a step."""
    return sum(c.count * c.bytes for c in found)


def _of(program: Program, place: Computation, instruction: Instruction, times: int) -> Iterator[Collective]:
    """Those of an instruction, in fusions too. A chain of fusions counts where it starts."""
    kind, overlapped = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
    if kind in KINDS:
        chained = "chain_id=" in instruction.attributes
        starts = chained and any("AsyncCollectiveStart" in other.attributes for other in place.values())
        if not chained or starts:
            group = _group(instruction.attributes, program.devices)
            size = sum(map(array_bytes, place.operand_types(instruction)))
            sent = round(_sent(kind, size, len(group)))
            yield Collective(kind, sent, times, group, overlapped or starts, instruction.source)
    elif instruction.opcode == "fusion":
        for called in instruction.calls():
            for inner in program.computations[called].values():
                for found in _of(program, program.computations[called], inner, times):
                    if called.startswith("all-reduce-scatter"):  # a TPU's reduce-scatter: an all-reduce, cut
                        found = found._replace(kind="reduce-scatter", bytes=found.bytes // 2)
                    yield found if found.source else found._replace(source=instruction.source)


def _sent(kind: str, size: int, devices: int) -> float:
    others = devices - 1
    return {
        "all-gather": others * size,
        "all-reduce": 2 * size * others / devices,
        "reduce-scatter": size * others / devices,
        "all-to-all": size * others / devices,
        "ragged-all-to-all": size * others / devices,
    }.get(kind, size)


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of `replica_groups`, in each of the forms that it is written in."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return tuple(map(int, re.search(r"(\d+),(\d+)", pairs[1]).groups()))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return tuple(_places(tiled[2], tiled[3]).reshape(_numbers(tiled[1]))[0].tolist())
    if meshed := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        along = re.findall(r"'(\w+)'(?!:)", meshed[4])
        if all(axis in sizes for axis in along):
            places = _places(meshed[2] or str(math.prod(sizes.values())), meshed[3]).reshape(tuple(sizes.values()))
            index = tuple(slice(None) if axis in along else 0 for axis in sizes)
            return tuple(places[index].reshape(-1).tolist())
    return tuple(range(devices))


def _places(tiles: str, order: str | None) -> np.ndarray:
    """All devices, "2,4" as a grid, its axes in another order."""
    grid = np.arange(math.prod(_numbers(tiles))).reshape(_numbers(tiles))
    return np.transpose(grid, _numbers(order) if order else None)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
