"""What a run leaves to read: metrics.jsonl, TensorBoard events, Weights & Biases, loss.png.

A training row: step, loss (the head's, of tokens nats per token; the mean since the row before), learning_rate,
grad_norm, parameter_norm, tokens (all trained on so far), tokens_per_second, mfu (model FLOP/s over the bf16 rate of
all devices by data sheet; null where that is not known, as on a CPU), seconds (of training since the run began,
resumes included; compiling, evaluating and saving left out). An evaluation row: step, eval_loss, eval_bits_per_byte
(of text) or eval_accuracy (of a synthetic task: the share of answers that are the likeliest token; of labels) or
eval_mae (of a series: mean absolute error), eval_tokens or eval_rows (that it was measured on), tokens, seconds. The
last one is of eval.final_batches, the others are of eval.batches.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

from zoo import files, heads
from zoo.config import Config, MetricsConfig
from zoo.errors import UsageError, warn

Row = dict[str, float | int | None]
LARGEST_SUMMARY = 1 << 20  # bytes of a summary.json
_LARGEST_NUMBER = 2.0**128  # beyond float32, in which they were computed; figures end in errors above it
FLUSH_SECONDS = 30  # between writes of TensorBoard's events to the disk


class _Other(NamedTuple):
    """Where rows go besides metrics.jsonl."""

    write: Callable[[Row], None]
    flush: Callable[[], None]
    close: Callable[[], None]


def check(config: MetricsConfig) -> None:
    """UsageError if a writer that is asked for is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "metrics.wandb: wandb is not installed; pip install 'sequence-zoo[wandb]', or set metrics.wandb=False"
        )


def read(workdir: str | os.PathLike, limit: int | None = None) -> list[Row]:
    """All rows of a run, in order; none if it has not begun.

    A line that is no row (damage, a power cut) is left out with a warning, a last line cut off by a kill without one.

    Args:
      limit: bytes that metrics.jsonl may have; None: any number.

    Raises:
      UsageError: metrics.jsonl cannot be read.
    """
    return [row for _, row in _lines(pathlib.Path(workdir) / "metrics.jsonl", limit)]


def _lines(path: pathlib.Path, limit: int | None = None) -> list[tuple[bytes, Row]]:
    """Lines that are rows, as they stand and as what they say."""
    try:
        *lines, rest = files.read_bytes(path, limit).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    found = [(line, _row(line)) for line in lines]
    unreadable = [str(number) for number, (_, row) in enumerate(found, 1) if row is None]
    if unreadable:
        shown = ", ".join(unreadable[:6]) + (", ..." if len(unreadable) > 6 else "")
        warn(f"{path}: no row in line {shown}; left out")
    return [(line, row) for line, row in [*found, (rest, _row(rest))] if row is not None]


def _row(line: bytes) -> Row | None:
    """None: it is none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(value is None or _is_number(value) for value in row.values()) else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < (1 << 63 if type(value) is int else _LARGEST_NUMBER)


class Writer:
    """Writes rows as they come, each whole before the next.

    Rows after `step`, of a run that is resumed there, are cut away: their steps come again.

    Raises:
      WriteError: here and in every method. The rows that metrics.jsonl lacks for it are in `unwritten`.
    """

    def __init__(self, workdir: str | os.PathLike, config: Config, step: int):
        self.workdir, self._model = pathlib.Path(workdir), config.model
        self.unwritten: list[Row] = []
        self._path = self.workdir / "metrics.jsonl"
        kept = b"".join(line + b"\n" for line, row in _lines(self._path) if row["step"] <= step)
        if not self._path.exists() or self._path.read_bytes() != kept:
            files.write(self._path, kept)
        self._file = self._open()
        self._others: list[_Other] = []
        if config.metrics.tensorboard:
            self._others.append(_tensorboard(self.workdir / "tensorboard", step))
        if config.metrics.wandb:
            self._others.append(_wandb(self.workdir, config, step))

    def write(self, row: Row) -> None:
        self.unwritten.append(row)
        self._append((files.to_json(row) + "\n").encode())
        self.unwritten.remove(row)
        for other in self._others:
            other.write(row)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise files.WriteError(self._path, error) from error

    def _append(self, line: bytes) -> None:
        """All of it or nothing: a full disk takes the beginning of a line."""
        if os.fstat(self._file).st_nlink == 0:
            warn(f"{self._path} was deleted while the run trains; its rows so far are lost")
            os.close(self._file)
            self._file = self._open()
        size = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise files.WriteError(self._path, error) from error

    def sync(self) -> None:
        """Until all rows so far are on the disk, and outlive a power cut."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise files.WriteError(self._path, error) from error
        for other in self._others:
            other.flush()

    def plot(self) -> None:
        """Draw loss.png from the rows so far."""
        from zoo import plots  # matplotlib, which few commands need

        image = io.BytesIO()
        plots.loss(read(self.workdir), self._model.mixer, image, heads.of(self._model).unit)
        files.write(self.workdir / "loss.png", image.getvalue())

    def close(self) -> None:
        os.close(self._file)
        for other in self._others:
            other.close()


class NoWriter:
    """In place of `Writer` on all of several processes but the first."""

    unwritten: tuple[Row, ...] = ()

    def write(self, row: Row) -> None: ...

    def sync(self) -> None: ...

    def plot(self) -> None: ...

    def close(self) -> None: ...


def _tensorboard(directory: pathlib.Path, step: int) -> _Other:
    # Not SummaryWriter: it writes in a thread, whose errors nobody hears, and waits for that thread for ever.
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import scalar

    path, flushed = directory / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}", time.monotonic()

    def record(event: Event) -> None:
        event.wall_time = time.time()
        try:
            records.write(event.SerializeToString())
        except OSError as error:
            raise files.WriteError(path, error) from error

    def flush() -> None:
        nonlocal flushed
        flushed = time.monotonic()
        try:
            records.flush()
        except OSError as error:
            raise files.WriteError(path, error) from error

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                record(Event(step=row["step"], summary=scalar(name, value)))
        if time.monotonic() - flushed > FLUSH_SECONDS:
            flush()

    def close() -> None:
        with contextlib.suppress(OSError):  # what a full disk does not take now, it did not take at the last save
            records.close()

    try:
        directory.mkdir(exist_ok=True)
        records = RecordWriter(str(path))
    except OSError as error:
        raise files.WriteError(path, error) from error
    record(Event(file_version="brain.Event:2"))
    record(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))  # from here on it comes again
    flush()
    return _Other(write, flush, close)


def _wandb(workdir: pathlib.Path, config: Config, step: int) -> _Other:
    import wandb

    identifier = workdir / "wandb_id"
    if step == 0 or not identifier.exists():
        files.write(identifier, wandb.util.generate_id())
    run = wandb.init(
        dir=str(workdir),
        name=workdir.name,
        id=identifier.read_text(),
        resume="allow",
        config=dataclasses.asdict(config),
    )

    def write(row: Row) -> None:
        run.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    return _Other(write, lambda: None, run.finish)
