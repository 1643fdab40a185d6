"""What evaluation leaves to read: tables on a terminal, PNGs, and what each figure was measured on."""

import datetime
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import jax
import rich.table
from rich.text import Text

from zoo.figures import Chart, Table
from zoo.terminal import one_line


def provenance(*others: str) -> dict:
    """Device, versions (of `others` too) and date: what stands beside every figure."""
    device = jax.devices()[0]
    packages = ("jax", "flax", "sequence-zoo", *others)
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def on_terminal(table: Table) -> rich.table.Table:
    shown = rich.table.Table(title=Text(one_line(table.title)))  # Text: brackets in it are no markup
    for i, heading in enumerate(table.headings):
        shown.add_column(Text(heading), justify="left" if i < table.texts else "right")
    for row in table.rows:
        shown.add_row(*(Text(one_line(cell)) for cell in row))
    return shown


def draw(charts: Sequence[Chart], mixers: Mapping[str, str], path: pathlib.Path) -> None:
    """A PNG. `mixers`: of each run."""
    from zoo import plots  # matplotlib, which few commands need

    plots.charts(charts, mixers, path)


def in_file_names(name: str) -> str:
    """A task's name in the name of its plot."""
    return re.sub(r"[^0-9A-Za-z]+", "-", name).strip("-")[:60]
