"""What a run leaves to read: metrics.jsonl, TensorBoard events, Weights & Biases, loss.png.

A training row: step, loss (nats per token, mean since the row before), learning_rate, grad_norm, parameter_norm,
tokens (all trained on so far), tokens_per_second, mfu (model FLOP/s over the bf16 rate of all devices by data sheet;
null where that is not known, as on a CPU), seconds (of training since the run began, resumes included; compiling,
evaluating and saving left out). An evaluation row: step, eval_loss, eval_bits_per_byte (of text; synthetic tasks have
none), eval_tokens (that it was measured on), tokens, seconds. The last one is of eval.final_batches, the others are of
eval.batches.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable

from zoo import files
from zoo.config import Config, MetricsConfig
from zoo.errors import UsageError

Row = dict[str, float | int | None]


def check(config: MetricsConfig) -> None:
    """UsageError if a writer that is asked for is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "metrics.wandb: wandb is not installed; pip install 'sequence-zoo[wandb]', or set metrics.wandb=False"
        )


def read(workdir: str | os.PathLike) -> list[Row]:
    """All rows of a run, in order; none if it has not begun. A last line cut off by a kill is left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Writer:
    """Writes rows as they come, each whole on disk before the next.

    Rows after `step`, of a run that is resumed there, are cut away: their steps come again.
    """

    def __init__(self, workdir: str | os.PathLike, config: Config, step: int):
        self.workdir, self._mixer = pathlib.Path(workdir), config.model.mixer
        path = self.workdir / "metrics.jsonl"
        kept = [row for row in read(workdir) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.rename(path)
        self._file = open(path, "a", buffering=1)  # a line at a time
        self._others: list[tuple[Callable[[Row], None], Callable[[], None]]] = []
        if config.metrics.tensorboard:
            self._others.append(_tensorboard(self.workdir / "tensorboard", step))
        if config.metrics.wandb:
            self._others.append(_wandb(self.workdir, config))

    def write(self, row: Row) -> None:
        self._file.write(files.to_json(row) + "\n")
        for write, _ in self._others:
            write(row)

    def plot(self) -> None:
        """Draw loss.png from the rows so far."""
        from zoo import plots  # matplotlib, which few commands need

        plots.loss(read(self.workdir), self._mixer, self.workdir / "loss.png")

    def close(self) -> None:
        self._file.close()
        for _, close in self._others:
            close()


def _tensorboard(directory: pathlib.Path, step: int) -> tuple[Callable[[Row], None], Callable[[], None]]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(directory), purge_step=step + 1, flush_secs=30)

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, row["step"])

    return write, writer.close


def _wandb(workdir: pathlib.Path, config: Config) -> tuple[Callable[[Row], None], Callable[[], None]]:
    import wandb

    identifier = workdir / "wandb_id"
    if not identifier.exists():
        identifier.write_text(wandb.util.generate_id())
    run = wandb.init(
        dir=str(workdir),
        name=workdir.name,
        id=identifier.read_text(),
        resume="allow",
        config=dataclasses.asdict(config),
    )

    def write(row: Row) -> None:
        run.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    return write, run.finish
