"""What a person watching sees: one live line on a terminal, plain lines elsewhere."""

import contextlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zoo.metrics import Row
from zoo.terminal import printable


class ProgressLine:
    """Step, loss, tokens/s, time left; MFU (`zoo.metrics`) where the devices' rate is known. Unless it is `silent`."""

    def __init__(self, first_step: int, steps: int, silent: bool = False):
        self._steps = steps
        self._print = _nothing if silent else _print
        console = Console(file=sys.stdout, emoji=False)  # a path such as runs/a:bug:b stays one
        self._live: Progress | None = None
        if console.is_terminal and not silent:
            self._live = Progress(
                MofNCompleteColumn(), BarColumn(20), TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(), console=console, refresh_per_second=4,
            )  # fmt: skip
            self._live.start()
            self._task = self._live.add_task("", total=steps, completed=first_step, text="")

    def step(self, step: int) -> None:
        if self._live:
            self._live.update(self._task, completed=step)

    def row(self, row: Row, seconds_per_step: float = 0.0) -> None:
        """Show a row of metrics: of training, or of an evaluation."""
        if "eval_loss" in row:
            bits, accuracy = row.get("eval_bits_per_byte"), row.get("eval_accuracy")
            absolute, unit = row.get("eval_mae"), "rows" if "eval_rows" in row else "tokens"
            self.say(
                f"step {row['step']}  validation loss {row['eval_loss']:.4f}"
                + (f"  bits per byte {bits:.4f}" if bits is not None else "")
                + (f"  accuracy {accuracy:.2%}" if accuracy is not None else "")
                + (f"  absolute error {absolute:.4f}" if absolute is not None else "")
                + f"  ({row[f'eval_{unit}']:,} {unit})"
            )
            return
        text = f"loss {row['loss']:.4f}  {_count(row['tokens_per_second'])} tokens/s"
        if row["mfu"] is not None:
            text += f"  MFU {row['mfu']:.1%}"
        if self._live:
            self._live.update(self._task, text=text)
        else:
            left = (self._steps - row["step"]) * seconds_per_step
            self._print(f"step {row['step']}/{self._steps}  {text}  {duration(left)} left")

    def say(self, text: str) -> None:
        text = printable(text)
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def _nothing(text: str) -> None:
    pass


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it (a closed terminal or pipe, a full disk): no reason to stop
        print(text, flush=True)


def _count(x: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def duration(seconds: float) -> str:
    """3:05, or 1:02:03 with hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
