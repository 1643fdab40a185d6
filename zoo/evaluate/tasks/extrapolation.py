"""Does more context help, or break the model, beyond the length that it was trained at?

Of text: the same tokens are predicted each time, with more and more of their document before them. The last tokens, as
many as a training context has, of the first 16 such lengths of a document are read from 1, 2, 4, 8 and 16 lengths back;
differences are those of the context alone. Of a synthetic task: its own rows of 1 to 16 times the length.
"""

import dataclasses
import itertools

import numpy as np

from zoo.data import synthetic
from zoo.errors import UsageError
from zoo.evaluate import documents
from zoo.evaluate.task import Request, Task
from zoo.evaluate.windows import longest_windows
from zoo.figures import Chart, Line, interval, line_names, of_runs, shown

_TOKENS = 1 << 15  # of rows of a task, at each length, at most; one batch is read at least


class Extrapolation(Task):
    name = "extrapolation"
    about = "loss by context length, to 16 times the training length"
    of_text = True

    def check(self, request):
        request.check_reader(self.name)
        if request.trained_on is None:
            longest_windows(request, self.name)

    def measure(self, request):
        found = _of_text(request) if request.trained_on is None else _of_task(request)
        return {"training_length": request.training_length, "by_context_length": found}, {}

    def tables(self, results):
        first = next(iter(results.values()))["by_context_length"][0]
        asks, headings = first["accuracy"] is not None, ["context length", "loss (nats per token)"]
        headings += ["accuracy", "answers"] if asks else ["against 1 x", "95 % interval", "tokens"]

        def row(r):
            change = [shown(r["change"], "+z.4f"), interval(r["low"], r["high"], "+z.4f")]
            rest = [shown(r["accuracy"], ".2%")] if asks else change
            return [f"{r['context_length']:,}", shown(r["loss"], ".4f"), *rest, f"{r['tokens']:,}"]

        rows = {run: [row(r) for r in result["by_context_length"]] for run, result in results.items()}
        return [of_runs("extrapolation", headings, rows)]

    def charts(self, results):
        charts = []
        for key, y in (("loss", "loss (nats per token)"), ("accuracy", "accuracy")):
            chosen = {
                run: [(r["context_length"], r[key]) for r in result["by_context_length"]]
                for run, result in results.items()
            }
            chosen = {run: points for run, points in chosen.items() if any(value is not None for _, value in points)}
            lengths = {results[run]["training_length"] for run in chosen}
            marked = (next(iter(lengths)), "trained at") if len(lengths) == 1 else None
            names = line_names({run: ["loss of the same tokens" if key == "loss" else key] for run in chosen})
            lines = [Line(names[run][0], points, run) for run, points in chosen.items()]
            if lines:
                title = f"{key.capitalize()} by context length"
                charts.append(Chart(title, "context length (tokens)", y, lines, marked=marked))
        return charts


def _of_text(request: Request) -> list[dict]:
    piece, windows = request.training_length, longest_windows(request, Extrapolation.name)
    longest = windows.shape[1] - 1
    lengths = [length for length in request.multiples() if length <= longest]
    found, shortest = [], None
    for length in request.track(lengths, "extrapolation"):
        tokens, targets = windows[:, -1 - length : -1], windows[:, -length:]
        weights = np.broadcast_to(np.arange(length) >= length - piece, tokens.shape)
        nats = request.reader(tokens, targets, weights)[0].sum(1, dtype=np.float64)
        measured = documents.Documents(nats, np.full(len(nats), float(piece)), np.zeros(len(nats)))
        shortest = shortest or measured
        found.append(_entry(length, nats.sum(), nats.size * piece))
        if measured is not shortest:
            low, high = documents.differences([shortest, measured])[1]
            found[-1] |= {"change": float((nats - shortest.nats).mean() / piece), "low": low, "high": high}
    return found


def _of_task(request: Request) -> list[dict]:
    found = []
    for length in request.track(request.multiples(), "extrapolation"):
        try:
            task = synthetic.find(request.config, context_length=length)
        except UsageError:  # one that is not made of this many tokens
            continue
        config = request.config
        rows = dataclasses.replace(synthetic.validation_rows(task, config, 0), batch_size=request.reader.rows)
        batches = list(itertools.islice(rows, max(1, _TOKENS // (request.reader.rows * length))))
        arrays = [np.concatenate([b[name] for b in batches]) for name in ("tokens", "targets", "weights")]
        losses, right = request.reader(*arrays)
        answers = arrays[2].sum(dtype=np.float64)
        found.append(
            _entry(length, losses.sum(dtype=np.float64), answers) | {"accuracy": float(right.sum() / max(answers, 1))}
        )
    return found


def _entry(length: int, nats: float, tokens: float) -> dict:
    nothing = dict.fromkeys(("accuracy", "change", "low", "high"))
    return {"context_length": length, "loss": float(nats / max(tokens, 1)), "tokens": int(tokens)} | nothing
