"""Evaluations of one run or of several as the sections of a report; read from files, they are checked first."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from zoo import files
from zoo.errors import UsageError
from zoo.evaluate import documents, html, tasks
from zoo.evaluate.documents import Documents
from zoo.figures import Intervals, Table, interval, shown

_LARGEST = 64 << 20  # bytes of an evaluate.json
_ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError)


class Evaluated(NamedTuple):
    """What was measured of a run."""

    name: str
    mixer: str
    record: dict[str, Any]  # as `zoo.evaluate` writes it
    documents: dict[documents.Read, Documents]

    @property
    def text(self) -> str:
        """The fingerprint of the text."""
        return str(self.record["corpus"]["fingerprint"])


def read(path: pathlib.Path, name: str, mixer: str) -> Evaluated | None:
    """The evaluation in `path`, with what lies beside it; None where there is none.

    Raises:
      UsageError: it, or the file beside it, is not what `zoo.evaluate` writes.
    """
    try:
        record = files.read_json(path, _LARGEST)
        found = Evaluated(name, mixer, record, {})
        html.page("", [], {name: mixer}, sections([found]))  # what can be shown is what was written
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except _ODD as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} is not what zoo.evaluate writes ({what}); evaluate the run again") from error
    fingerprint, by_length = documents.read(path.with_suffix(".npz"))
    return found._replace(documents=by_length if fingerprint == found.text else {})


class Difference(NamedTuple):
    """Of a run's loss from the best run's on the same text, with its 95 % interval."""

    run: str
    best: str
    context_length: int
    unit: str
    loss: float
    difference: float
    low: float
    high: float


def differences(runs: Sequence[Evaluated]) -> tuple[list[Difference], list[str]]:
    """Of runs on one text, the best first; and why a run is not among them, a sentence each."""
    with_documents = [run for run in runs if run.documents]
    notes = [f"{run.name}: no losses by document beside its evaluate.json" for run in runs if not run.documents]
    if len(with_documents) < 2:
        return [], notes if len(runs) > 1 else []
    if not (common := set.intersection(*(set(run.documents) for run in with_documents))):
        what = "context lengths, or a task's rows in batches of different sizes"
        return [], [*notes, f"The runs were evaluated at different {what}; evaluate all alike (--context_length)."]
    read_in = max(common)

    def loss(run):
        measured = run.documents[read_in]
        return measured.nats.sum() / max(measured.units.sum(), 1e-30)

    ranked = sorted(with_documents, key=loss)
    best, alike = ranked[0], []
    for run in ranked:
        if documents.alike(run.documents[read_in], best.documents[read_in]):
            alike.append(run)
        else:
            notes.append(f"{run.name}: other parts of the text were read than of {best.name}; evaluate both alike")
    if len(alike) < 2:
        return [], notes
    try:
        intervals = documents.differences([run.documents[read_in] for run in alike])
    except ValueError as error:
        return [], [*notes, f"No intervals: {error}"]
    unit = "bits per byte" if best.documents[read_in].bytes.any() else "nats per token"
    return [
        Difference(run.name, best.name, read_in.context_length, unit, loss(run), loss(run) - loss(best), low, high)
        for run, (low, high) in zip(alike, intervals, strict=True)
    ], notes


def sections(runs: Sequence[Evaluated]) -> list[html.Section]:
    """The runs, what each task measured of them, and their differences."""
    found = [html.Section("Runs", tables=[_runs(runs)])]
    by_text: dict[str, list[Evaluated]] = {}
    for run in runs:
        by_text.setdefault(run.text, []).append(run)
    for text, on_text in by_text.items():
        ranked, notes = differences(on_text)
        if ranked or notes:
            table = [difference_table(ranked)] if ranked else []
            figure = [_difference_figure(ranked)] if ranked else []
            title = "Differences" if len(by_text) == 1 else f"Differences on text {text}"
            found.append(html.Section(title, figure, table, notes=[*([_ABOUT] if ranked else []), *notes]))
    names = dict.fromkeys(name for run in runs for name in run.record["tasks"])
    for name in names:
        if (task := tasks.of_record(name)) is None:
            found.append(html.Section(name, notes=["A task that this version does not know."]))
            continue
        groups = by_text if task.of_text else {"": list(runs)}
        for text, group in groups.items():
            results = {run.name: run.record["tasks"][name] for run in group if name in run.record["tasks"]}
            if results:
                title = name if len(groups) == 1 else f"{name} on text {text}"
                title += f": {', '.join(results)}" if len(results) == 1 < len(runs) else ""
                note = task.about[0].upper() + task.about[1:] + "."
                found.append(html.Section(title, task.charts(results), task.tables(results), [note]))
    return found


_ABOUT = (
    "Less is better. Intervals: 95 %, of a paired bootstrap over documents (the same draws for all runs). "
    "Where one holds 0, this text does not tell the two runs apart."
)


def difference_table(ranked: Sequence[Difference]) -> Table:
    first = ranked[0]
    title = f"{first.unit} at context {first.context_length:,}, and the difference from {first.best}"
    rows = [[d.run, f"{d.loss:.4f}", *(["the best", "", ""] if d.run == d.best else _apart(d))] for d in ranked]
    return Table(title, ["run", first.unit, "difference", "95 %", "told apart"], rows, texts=1)


def _difference_figure(ranked: Sequence[Difference]) -> Intervals:
    rows = [(d.run, d.low, d.difference, d.high) for d in ranked]
    return Intervals(f"Difference from {ranked[0].best}", f"{ranked[0].unit}, with 95 % interval", rows)


def _apart(d: Difference) -> list[str]:
    return [f"{d.difference:+.4f}", interval(d.low, d.high, "+.4f"), "yes" if d.low > 0 or d.high < 0 else "no"]


def _runs(runs: Sequence[Evaluated]) -> Table:
    headings = ["run", "mixer", "text", "measured", "parameters", "step", "validation tokens"]
    headings += ["bits per byte of a table", "of gzip -9"]
    rows = []
    for run in runs:
        record, corpus = run.record, run.record["corpus"]
        rows.append(
            [
                run.name,
                run.mixer,
                f"{corpus['source']} ({run.text})",
                f"{str(record['date'])[:16].replace('T', ' ')}, {record['device']}, jax {record['versions']['jax']}",
                f"{record['parameters']:,}",
                f"{record['step']:,}",
                f"{corpus['validation_tokens']:,}",
                shown(corpus.get("table_bits_per_byte"), ".4f"),
                shown(corpus.get("gzip_bits_per_byte"), ".4f"),
            ]
        )
    return Table("", headings, rows, texts=4)
