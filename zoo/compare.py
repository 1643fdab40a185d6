"""Compare runs: what each learnt, what it cost, and what decoding with it keeps.

    python -m zoo.compare runs/gla runs/retnet --output=comparison

Reads the workdirs (config.json, metrics.jsonl, summary.json), also of runs that are still training, and writes nothing
there. Prints a table, and writes comparison.json and plots of training and validation loss against tokens and against
time. Runs on different texts are kept apart: their losses do not compare.
"""

import argparse
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo import checkpoints, files, metrics
from zoo.config import Config
from zoo.errors import UsageError, exit_with_message
from zoo.flops import num_parameters, state_bytes
from zoo.paths import expand
from zoo.settings import argument
from zoo.terminal import one_line

_LARGEST_SUMMARY, _LARGEST_METRICS = 1 << 20, 1 << 30  # bytes


@dataclasses.dataclass
class Run:
    name: str
    config: Config
    rows: list[metrics.Row]
    corpus: str  # fingerprint of its text, "unknown" until training has begun
    finished: bool

    def last(self, field: str) -> float | None:
        """The newest value of a metric."""
        return next((row[field] for row in reversed(self.rows) if field in row), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole run; compiling, evaluating and saving left out."""
        seconds = self.last("seconds")
        return self.last("tokens") / seconds if seconds else None


def read_runs(workdirs: list[str]) -> list[Run]:
    """The runs in `workdirs`, named by their folders, or by their paths where folders have the same name.

    Raises:
      UsageError: a folder that is no run.
    """
    paths = [pathlib.Path(workdir) for workdir in workdirs]
    short = [path.resolve().name for path in paths]
    unique = len(set(short)) == len(short)
    return [_read_run(path, name if unique else str(path)) for path, name in zip(paths, short, strict=True)]


def _read_run(path: pathlib.Path, name: str) -> Run:
    config = checkpoints.read_config(path)
    summary = _summary(path / "summary.json")
    corpus = summary.get("corpus", {}).get("fingerprint", "unknown")
    finished = summary.get("step") == config.train.steps
    return Run(one_line(name), config, _rows(path), one_line(corpus), finished)


def _summary(path: pathlib.Path) -> dict:
    """What a run's summary.json holds; empty where there is none yet. UsageError for one that no training wrote."""
    if not os.path.lexists(path):
        return {}
    try:
        summary = files.read_json(path, _LARGEST_SUMMARY)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}); it is not the file that training wrote") from error
    corpus = summary.get("corpus", {}) if isinstance(summary, dict) else None
    if not isinstance(corpus, dict) or not isinstance(corpus.get("fingerprint", ""), str):
        raise UsageError(
            f'{path}: expected an object with {{"corpus": {{"fingerprint": text}}}}, as training writes it'
        )
    return summary


def _rows(workdir: pathlib.Path) -> list[metrics.Row]:
    path = workdir / "metrics.jsonl"
    try:
        if os.path.lexists(path):
            status = os.stat(path)
            files.check_regular(status)
            if status.st_size > _LARGEST_METRICS:
                raise UsageError(f"{path}: larger than {_LARGEST_METRICS >> 30} GiB; it is no run's")
        rows = metrics.read(workdir)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not the lines of JSON that training writes") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(name, 0), int | float | None) for name in _NUMBERS):
            raise UsageError(f"{path}: row {number} is not what training writes, an object of numbers")
    return [{name: value for name, value in row.items() if _is_finite(value)} for row in rows]


_NUMBERS = ("step", "tokens", "seconds", "loss", "eval_loss", "eval_bits_per_byte")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def warnings(runs: list[Run]) -> list[str]:
    """What makes the figures less comparable than they look."""
    found = []
    if len({run.corpus for run in runs}) > 1:
        found.append("the runs read different texts; their losses do not compare, so each text has a table of its own")
    for field, value, what in (
        ("train.context_length", lambda c: c.train.context_length, "longer contexts make tokens easier to predict"),
        ("data.tokenizer", lambda c: c.data.tokenizer, "compare bits per byte, not loss per token"),
    ):
        values = {run.name: value(run.config) for run in runs}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name}: {value}" for name, value in values.items())
            found.append(f"{field} differs ({shown}); {what}")
    for run in runs:
        step = run.last("step")
        if step is None:
            found.append(f"{run.name} has written no metrics yet")
        elif not run.finished:
            found.append(f"{run.name} has not finished: step {step} of {run.config.train.steps}")
    return found


def record(run: Run, context_length: int) -> dict:
    """The figures of a run; None where it has not come to them."""
    return {
        "run": run.name,
        "mixer": run.config.model.mixer,
        "parameters": num_parameters(run.config.model),
        "context_length": run.config.train.context_length,
        "step": run.last("step"),
        "steps": run.config.train.steps,
        "finished": run.finished,
        "tokens": run.last("tokens"),
        "eval_loss": run.last("eval_loss"),
        "eval_bits_per_byte": run.last("eval_bits_per_byte"),
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.last("seconds"),
        "state_bytes": state_bytes(run.config.model, context_length),
        "state_context_length": context_length,
        "corpus": run.corpus,
    }


_COLUMNS = {
    "run": "{}", "mixer": "{}", "parameters": "{:,}", "context_length": "{:,}", "step": "{:,}", "tokens": "{:,}",
    "eval_loss": "{:.4f}", "eval_bits_per_byte": "{:.4f}", "tokens_per_second": "{:,.0f}", "seconds": "{:,.1f}",
    "state_bytes": "{:,}",
}  # fmt: skip


def table(records: list[dict]) -> Table:
    """Of runs on one text, best first."""
    first = records[0]
    title = f"text {first['corpus']}; state at {first['state_context_length']:,} tokens; * not finished"
    shown = Table(title=Text(title), title_justify="left")  # Text: brackets in it are no markup
    for name in _COLUMNS:
        shown.add_column(name.replace("_", " "), justify="left" if name in ("run", "mixer") else "right")
    loss = "eval_bits_per_byte"
    for r in sorted(records, key=lambda r: (r[loss] is None, r[loss])):
        cells = ["-" if r[name] is None else one_line(form.format(r[name])) for name, form in _COLUMNS.items()]
        shown.add_row(*map(Text, [cells[0] + ("" if r["finished"] else " *"), *cells[1:]]))
    return shown


def plot(runs: list[Run], path: pathlib.Path) -> None:
    """Training loss and validation bits per byte, against tokens and against seconds of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    labels = {"loss": "training loss (nats per token)", "eval_bits_per_byte": "validation bits per byte"}
    for row, (metric, label) in zip(panels, labels.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, x in zip(row, ("tokens", "seconds"), strict=True):
            axes.grid(alpha=0.3)
            for run in runs:
                points = [(r[x], r[metric]) for r in run.rows if metric in r and x in r]
                at, values = zip(*points, strict=True) if points else ((), ())
                style = "-" if metric == "loss" else "o-"
                axes.plot(at, values, style, label=run.name, markersize=3, linewidth=1)
    panels[1][0].set_xlabel("tokens")
    panels[1][1].set_xlabel("seconds of training")
    panels[0][0].legend()
    FigureCanvasAgg(figure).print_png(path)


def _in_file_names(fingerprint: str) -> str:
    """A fingerprint as it is; a hash of what a workdir says instead of one, which could be a path."""
    if re.fullmatch("[0-9A-Za-z]{1,64}", fingerprint):
        return fingerprint
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


def _arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(program, description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", type=expand, nargs="+", metavar="RUN", help="a workdir")
    add("--output", type=expand, default="comparison", help="folder for the JSON and the plots; default: comparison")
    add(
        "--context_length",
        type=argument(int, unit="token"),
        help="tokens at which the state is counted; default: the longest trained at",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, program: str = "python -m zoo.compare") -> None:
    arguments = _arguments(argv, program)
    with exit_with_message():
        runs = read_runs(arguments.runs)
        context_length = arguments.context_length
        if context_length is None:
            context_length = max(run.config.train.context_length for run in runs)
        for warning in warnings(runs):
            print(f"warning: {one_line(warning)}", file=sys.stderr)
        texts = list(dict.fromkeys(run.corpus for run in runs))
        console = Console(width=None if sys.stdout.isatty() else 160)
        records = [record(run, context_length) for run in runs]
        for text in texts:
            console.print(table([r for r in records if r["corpus"] == text]))
        folder = pathlib.Path(arguments.output)
        written = [folder / "comparison.json"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with files.replacing(written[0]) as path:
                path.write_text(files.to_json(records, indent=2) + "\n")
            for text in texts:
                written.append(folder / ("loss.png" if len(texts) == 1 else f"loss_{_in_file_names(text)}.png"))
                with files.replacing(written[-1]) as path:
                    plot([run for run in runs if run.corpus == text], path)
        except OSError as error:
            raise UsageError(f"--output: cannot write {str(written[-1])!r} ({error.strerror})") from error
        shown = one_line("written: " + ", ".join(map(str, written)))
        console.print(shown, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
