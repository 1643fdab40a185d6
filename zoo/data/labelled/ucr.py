"""Series of the UCR and UEA archives, with their splits (Dau et al., arXiv:1810.07758; Bagnall et al., 1811.00075).

    ucr?name=GunPoint                                    one that the package aeon ships, whose files are read
    ucr?path=data/Wafer_TRAIN.ts&validation=data/Wafer_TEST.ts

A .ts file has lines `@name value`, then `@data` and a series a line: the channels' numbers, `:` between channels, the
class at the end. Series may differ in length.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from zoo import files
from zoo.data.labelled.stored import LabelledRows, Part
from zoo.data.readers import read_errors
from zoo.data.stored import folder_of_package, source
from zoo.errors import UsageError
from zoo.settings import nearest, setting, shown
from zoo.terminal import one_line

LARGEST_FILE = 1 << 30  # bytes


@dataclasses.dataclass
class Options:
    name: str = setting("", "a data set that the package aeon ships, such as GunPoint")
    path: str = setting("", "a .ts file of training rows, in place of a name")
    validation: str = setting("", "the .ts file of those that validate, beside a path")
    cut: bool = setting(False, "series that are longer than train.context_length lose their end")


@source("ucr", Options)
def ucr(config, options):
    if bool(options.name) == bool(options.path) or bool(options.path) != bool(options.validation):
        raise UsageError(
            "data.source: ucr takes a name, as in ucr?name=GunPoint, or two files, as in "
            "ucr?path=A_TRAIN.ts&validation=A_TEST.ts"
        )
    paths = _shipped(options.name) if options.name else [files.expand(p) for p in (options.path, options.validation)]
    train, validation = (_part(path) for path in paths)
    name = f"ucr {options.name}".strip()
    return LabelledRows(name, config.train.context_length, train, validation, cut=options.cut)


def _shipped(name: str) -> list[str]:
    folder = folder_of_package("aeon", "aeon", "ucr") / "datasets" / "data"
    known = sorted(path.name.removesuffix("_TRAIN.ts") for path in folder.glob("*/*_TRAIN.ts"))
    if name not in known:
        raise UsageError(f"data.source: aeon ships no {shown(name)}; nearest: {nearest(name, known, 5)}")
    (train,) = folder.glob(f"*/{name}_TRAIN.ts")
    return [str(train), str(train.with_name(f"{name}_TEST.ts"))]


def _part(path: str) -> Part:
    with read_errors(path):
        content = files.read_bytes(path, LARGEST_FILE)
    rows = list(_rows(one_line(path), content.decode(errors="replace")))
    return Part(*(zip(*rows, strict=True) if rows else ((), (), ())))


def _rows(path: str, content: str) -> Iterator[tuple[np.ndarray, str, str]]:
    in_data = False
    for number, line in enumerate(content.splitlines(), 1):
        where, line = f"{path}:{number}", line.strip()
        if not line or line.startswith("#"):
            continue
        if in_data:
            *channels, label = line.split(":")
            yield _series(where, channels), label.strip(), where
            continue
        name, *value = line.lower().split()
        in_data = name == "@data"
        if (name == "@timestamps" and value != ["false"]) or (name == "@classlabel" and value[:1] != ["true"]):
            raise UsageError(f"{where}: got {shown(line)}, expected a file without time stamps, and with class labels")
        if name == "@targetlabel":
            raise UsageError(f"{where}: got {shown(line)}, whose labels are numbers to predict; expected classes")
    if not in_data:
        raise UsageError(f"{path}: no line @data; expected a .ts file of the UCR or UEA archive")


def _series(where: str, channels: list[str]) -> np.ndarray:
    """float32 [t, C]."""
    found = []
    for number, text in enumerate(channels, 1):
        try:
            found.append(np.array([np.nan if entry.strip() == "?" else float(entry) for entry in text.split(",")]))
        except ValueError:
            raise UsageError(f"{where}: channel {number}: got {shown(text)}, expected numbers and commas") from None
    if len({len(channel) for channel in found}) != 1:
        lengths = ", ".join(str(len(channel)) for channel in found) or "none"
        raise UsageError(f"{where}: channels of different lengths ({lengths}); expected a number of each at every step")
    return np.stack(found, axis=1).astype(np.float32)
