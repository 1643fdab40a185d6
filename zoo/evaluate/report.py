"""What evaluation leaves to read: tables, and what each figure was measured on."""

import datetime
import platform
from importlib.metadata import version

import jax
from rich.table import Table


def provenance() -> dict:
    """Device, versions and date: what stands beside every figure."""
    device = jax.devices()[0]
    packages = ("jax", "flax", "sequence-zoo")
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def perplexity_tables(result: dict) -> list[Table]:
    """One row a context length; and one row a range of positions."""
    results = result["by_context_length"]
    whole = Table(title="perplexity")
    asks = any(r["accuracy"] is not None for r in results)
    last = ["accuracy", "answers"] if asks else ["tokens"]
    for heading in ("context length", "loss (nats per token)", "perplexity", "bits per byte", *last):
        whole.add_column(heading, justify="right")
    for r in results:
        whole.add_row(
            f"{r['context_length']}",
            f"{r['loss']:.4f}",
            f"{r['perplexity']:.3f}",
            "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}",
            *([f"{r['accuracy']:.2%}"] if asks else []),
            f"{r['tokens']:,}",
        )
    positions = Table(title="loss by position")
    positions.add_column("position", justify="right")
    columns = []
    for r in results:
        positions.add_column(f"context {r['context_length']}", justify="right")
        columns.append({(b["first"], b["last"]): b["loss"] for b in r["loss_by_position"]})
    for first, last in sorted(set().union(*columns)):
        cells = (f"{column[first, last]:.4f}" if (first, last) in column else "" for column in columns)
        positions.add_row(f"{first}" if first == last else f"{first} to {last}", *cells)
    return [whole, positions]
