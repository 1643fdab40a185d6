"""Where measurements are kept: benchmarks/results/<name>.<platform>.json, with device, date and versions."""

import datetime
import json
import os
import pathlib
import platform
from importlib.metadata import version
from typing import Any

import jax

from zoo import files

RESULTS = pathlib.Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, date and versions of this run."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def path(name: str) -> pathlib.Path:
    """Where the latest results of `name` on this platform are kept."""
    return RESULTS / f"{name}.{jax.devices()[0].platform}.json"


def write(name: str, values: dict[str, Any]) -> pathlib.Path:
    """Keep `values` as the latest results of `name` on this platform; returns the file."""
    file = path(name)
    RESULTS.mkdir(exist_ok=True)
    files.write(file, json.dumps(environment() | values, indent=1) + "\n")
    print(f"written to {file.relative_to(RESULTS.parent.parent)}")
    return file


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
