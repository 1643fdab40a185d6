"""Compare runs: what each learnt, what it cost, and what decoding with it keeps.

    python -m zoo.compare runs/gla runs/retnet --output=comparison

Reads the workdirs (config.json, metrics.jsonl, summary.json, and evaluate.json where `zoo.evaluate` has written it),
also of runs that are still training, and writes nothing there. Prints a table, and writes comparison.json, plots of
training and validation loss against tokens and against time, and report.html: the curves, and what evaluation measured,
with the interval of each difference. Runs on different texts are kept apart: their losses do not compare.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import re
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo import checkpoints, files, heads, metrics
from zoo.config import Config
from zoo.errors import UsageError, exit_with_message, warn
from zoo.evaluate import evaluated, html, report
from zoo.evaluate.evaluated import Difference, Evaluated
from zoo.figures import Chart, Line
from zoo.flops import num_parameters, state_bytes
from zoo.settings import Parser, argument
from zoo.terminal import one_line

_LARGEST_METRICS = 1 << 30  # bytes
_LONGEST_FINGERPRINT = 64  # characters
_UNITS = {"eval_bits_per_byte": "bits per byte, validation"}
_CURVE_POINTS = 300  # of a line in the report, at most


@dataclasses.dataclass
class Run:
    name: str
    config: Config
    rows: list[metrics.Row]
    corpus: str  # fingerprint of its text, "unknown" until training has begun
    finished: bool
    evaluated: Evaluated | None = None

    def last(self, field: str) -> float | None:
        """The newest value of a metric."""
        return next((row[field] for row in reversed(self.rows) if field in row), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole run; compiling, evaluating and saving left out."""
        tokens, seconds = self.last("tokens"), self.last("seconds")
        return tokens / seconds if tokens is not None and seconds else None


def read_runs(workdirs: list[str]) -> list[Run]:
    """The runs in `workdirs`, named by their folders, or by their paths where folders have the same name.

    Raises:
      UsageError: a folder that is no run, or a file in it that training did not write.
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
    rows = metrics.read(path, _LARGEST_METRICS)
    known = [{name: value for name, value in row.items() if value is not None} for row in rows]
    name = one_line(name)
    evaluation = evaluated.read(path / "evaluate.json", name, config.model.mixer)
    return Run(name, config, known, _short(one_line(corpus)), finished, evaluation)


def _summary(path: pathlib.Path) -> dict:
    """What a run's summary.json holds; empty where there is none yet. UsageError for one that no training wrote."""
    try:
        summary = files.read_json(path, metrics.LARGEST_SUMMARY)
    except FileNotFoundError:
        return {}
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


def warnings(runs: list[Run]) -> list[str]:
    """What makes the figures less comparable than they look."""
    found = []
    if len({run.corpus for run in runs}) > 1:
        found.append("the runs read different texts; their losses do not compare, so each text has a table of its own")
    for field, value, what in (
        ("train.objective", lambda c: c.train.objective, "losses of masked and of next tokens do not compare"),
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
        elif run.evaluated and run.evaluated.record["step"] != step:
            found.append(f"{run.name} was evaluated at step {run.evaluated.record['step']}, and has trained to {step}")
        elif not run.finished:
            found.append(f"{run.name} has not finished: step {step} of {run.config.train.steps}")
    return found


def page(runs: list[Run]) -> str:
    """The report: what training left, and what evaluation measured."""
    measured = [run.evaluated for run in runs if run.evaluated]
    missing = [run.name for run in runs if not run.evaluated]
    notes = [f"Not evaluated yet (python -m zoo.evaluate --workdir=...): {', '.join(missing)}."] if missing else []
    curves = html.Section("Training", _curves(runs), notes=notes)
    mixers = {run.name: run.config.model.mixer for run in runs}
    title = f"{len(runs)} runs side by side" if len(runs) > 1 else runs[0].name
    return html.page(title, [], mixers, [*(evaluated.sections(measured) if measured else []), curves])


def _curves(runs: list[Run]) -> list[Chart]:
    """Of training and validation, against tokens; of long runs every n-th row."""
    charts = []
    metrics_shown = {"loss": "Training loss", "eval_loss": "Validation loss", "eval_bits_per_byte": "Bits per byte"}
    for metric, title in metrics_shown.items():
        for text in dict.fromkeys(run.corpus for run in runs):
            lines, of_it = [], [run for run in runs if run.corpus == text]
            unit = heads.of(of_it[0].config.model).unit
            for run in of_it:
                points = [(row["tokens"], row[metric]) for row in run.rows if metric in row and "tokens" in row]
                lines.append(Line(run.name, points[:: -(-len(points) // _CURVE_POINTS) or 1], run.name))
            of_text = f", text {text}" if len({run.corpus for run in runs}) > 1 else ""
            charts.append(Chart(title + of_text, "tokens", _UNITS.get(metric, unit), lines, log_x=False))
    return charts


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
        "eval_accuracy": run.last("eval_accuracy"),
        "eval_mae": run.last("eval_mae"),
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.last("seconds"),
        "state_bytes": state_bytes(run.config.model, context_length),
        "state_context_length": context_length,
        "corpus": run.corpus,
    }


_COLUMNS = {
    "run": "{}", "mixer": "{}", "parameters": "{:,}", "context_length": "{:,}", "step": "{:,}", "tokens": "{:,}",
    "eval_loss": "{:.4f}", "eval_bits_per_byte": "{:.4f}", "eval_accuracy": "{:.2%}",
    "eval_mae": "{:.4f}",
    "tokens_per_second": "{:,.0f}", "seconds": "{:,.1f}", "state_bytes": "{:,}",
}  # fmt: skip


# On a narrow screen.
_FIRST_TO_GO = ("context_length", "step", "seconds", "tokens", "parameters", "state_bytes", "mixer")


def table(records: list[dict], width: int = 160) -> Table:
    """Of runs on one text, best first. What is the same in all stands in the title; what does not fit is left out."""
    first = records[0]
    cells = {
        name: ["-" if r[name] is None else one_line(form.format(r[name])) for r in records]
        for name, form in _COLUMNS.items()
    }
    cells["run"] = [name + ("" if r["finished"] else " *") for name, r in zip(cells["run"], records, strict=True)]
    title = f"text {first['corpus']}; state at {first['state_context_length']:,} tokens; * not finished"
    for name in ("context_length", "step", "tokens"):
        if len(set(cells[name])) == 1 < len(records):
            title += f"; {name.replace('_', ' ')} {cells.pop(name)[0]}"
    for name in ("eval_accuracy", "eval_mae"):
        if all(r[name] is None for r in records):
            del cells[name]
    if all(r["mixer"] == r["run"] for r in records):
        del cells["mixer"]

    def needed() -> int:
        """Characters: of cells or the longest word of a heading, with three for a column's edges and spaces."""
        return 1 + sum(3 + max(map(len, [*values, *name.split("_")])) for name, values in cells.items())

    left_out = [name for name in _FIRST_TO_GO if name in cells and needed() > width and cells.pop(name)]
    title += f"; in comparison.json alone: {', '.join(left_out)}" if left_out else ""
    shown = Table(title=Text(title), title_justify="left")  # Text: brackets in it are no markup
    for name in cells:
        shown.add_column(name.replace("_", "\n"), justify="left" if name in ("run", "mixer") else "right", no_wrap=True)
    of_text = any(r["eval_bits_per_byte"] is not None for r in records)
    loss = "eval_bits_per_byte" if of_text else "eval_loss"
    for i in sorted(range(len(records)), key=lambda i: (records[i][loss] is None, records[i][loss])):
        shown.add_row(*(Text(values[i]) for values in cells.values()))
    return shown


def _differences(runs: list[Run]) -> list[list[Difference]]:
    """Of runs that were evaluated on the same text, for each text that several were."""
    measured = [run.evaluated for run in runs if run.evaluated]
    texts = dict.fromkeys(run.text for run in measured)
    found = [evaluated.differences([run for run in measured if run.text == text])[0] for text in texts]
    return [of_text for of_text in found if of_text]


def _short(fingerprint: str) -> str:
    """A fingerprint as it is; its end is a hash where a workdir says a megabyte instead."""
    if len(fingerprint) <= _LONGEST_FINGERPRINT:
        return fingerprint
    return f"{fingerprint[:32]}...{_hash(fingerprint)}"


def _in_file_names(fingerprint: str) -> str:
    """A fingerprint as it is; a hash of what a workdir says instead of one, which could be a path."""
    return fingerprint if re.fullmatch("[0-9A-Za-z]+", fingerprint) else _hash(fingerprint)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = Parser(program, __doc__)
    add = parser.add_argument
    add("runs", type=files.expand, nargs="+", metavar="RUN", help="a workdir")
    output_help = "folder for the JSON and the plots; default: comparison"
    add("--output", type=files.expand, default="comparison", help=output_help)
    add(
        "--context_length",
        type=argument(int, unit="token"),
        help="tokens at which the state is counted; default: the longest trained at",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, program: str = "python -m zoo.compare") -> None:
    arguments = _arguments(argv, program)
    with exit_with_message():
        from zoo import plots  # here, so that --help needs no matplotlib

        runs = read_runs(arguments.runs)
        context_length = arguments.context_length
        if context_length is None:
            context_length = max(run.config.train.context_length for run in runs)
        for warning in warnings(runs):
            warn(warning)
        texts = list(dict.fromkeys(run.corpus for run in runs))
        console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
        records = [record(run, context_length) for run in runs]
        ranked = _differences(runs)
        for run, r in zip(runs, records, strict=True):
            r["difference"] = next((d._asdict() for of_text in ranked for d in of_text if d.run == run.name), None)
        for text in texts:
            console.print(table([r for r in records if r["corpus"] == text], console.width))
        for of_text in ranked:
            console.print(report.on_terminal(evaluated.difference_table(of_text)))
        folder = pathlib.Path(arguments.output)
        written = [folder / "comparison.json"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with files.replacing(written[0]) as path:
                path.write_text(files.to_json(records, indent=2) + "\n")
            written.append(folder / "report.html")
            with files.replacing(written[-1]) as path:
                path.write_text(page(runs), encoding="utf-8")
            for text in texts:
                written.append(folder / ("loss.png" if len(texts) == 1 else f"loss_{_in_file_names(text)}.png"))
                with files.replacing(written[-1]) as path:
                    drawn = [(run.name, run.config.model.mixer, run.rows) for run in runs if run.corpus == text]
                    plots.comparison(drawn, path)
        except OSError as error:
            raise UsageError(f"--output: cannot write {str(written[-1])!r} ({error.strerror})") from error
        shown = one_line("written: " + ", ".join(map(str, written)))
        console.print(shown, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
