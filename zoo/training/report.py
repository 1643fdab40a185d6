"""What a run says of itself: the lines that it begins and ends with."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from zoo import data, flops, processes
from zoo.config import Config
from zoo.training.progress import duration
from zoo.training.schedules import shortening


def beginning(
    config: Config, mesh: Mesh, info: dict[str, Any], epochs: float, step: int, overrides: list[dict[str, Any]]
) -> list[str]:
    """What is about to be trained, and on what.

    Args:
      info: `data.corpus_info`.
      epochs: that all steps make.
      step: up to which it was trained before.
      overrides: what was changed and when, as in overrides.jsonl.
    """
    unit = "rows" if "train_rows" in info else "tokens"
    corpus = f"{info['source']} ({info['fingerprint']}), {info[f'train_{unit}']:,} training {unit}, "
    corpus += f"{info[f'validation_{unit}']:,} validation {unit}"
    if info["lost_text"]:
        corpus += f"; the tokenizer has no tokens for {info['lost_text']:.2%} of the text's bytes"
    lines = [
        f"device      {device(mesh)}, jax {jax.__version__}",
        f"model       {config.model.mixer}, {config.model.num_layers} layers of width {config.model.d_model}, "
        f"{flops.num_parameters(config.model):,} parameters, {config.model.dtype}",
        f"corpus      {corpus}",
        f"training    {config.train.steps:,} steps of {config.train.batch_size * config.train.context_length:,} tokens "
        f"({epochs:.2f} epochs), {config.optimizer.name}",
    ]
    if shortened := shortening(config.optimizer, config.train.steps):
        lines.append(f"warm-up     {shortened}")
    if step:
        lines.append(f"resumed     at step {step}")
    for override in overrides:
        changed = (f"{name}: {' -> '.join(map(str, both))}" for name, both in override.items() if name != "step")
        lines.append(f"changed     at step {override['step']}: {'; '.join(changed)}")
    return lines


def end(summary: dict[str, Any], workdir: pathlib.Path) -> list[str]:
    """What came of it.

    Args:
      summary: what summary.json holds.
    """
    lines = [f"finished    step {summary['step']} after {duration(summary['seconds'])} of training; {workdir}"]
    if summary["eval_bits_per_byte"] is None:
        lines.append(f"            {_evaluation(summary)}")
    for name, found in summary["corpus"].get("baselines", {}).items():
        lines.append(f"            {name}: {found['mse']:.4f}, {found['mae']:.4f}")
    return lines + data.conclusion(summary["eval_bits_per_byte"], summary)


def _evaluation(row: Mapping[str, Any]) -> str:
    """ "validation loss 1.2345 nats per token, accuracy 12.34%", of summary.json."""
    accuracy, absolute = row.get("eval_accuracy"), row.get("eval_mae")
    return (
        f"validation loss {row['eval_loss']:.4f} {row['unit']}"
        + ("" if accuracy is None else f", accuracy {accuracy:.2%}")
        + ("" if absolute is None else f", mean absolute error {absolute:.4f}")
    )


def device(mesh: Mesh) -> str:
    """ "8 x NVIDIA H100 (gpu)", and of how many processes."""
    first, several = mesh.devices.flat[0], processes.count()
    return f"{mesh.size} x {first.device_kind} ({first.platform})" + (f", {several} processes" if several > 1 else "")
