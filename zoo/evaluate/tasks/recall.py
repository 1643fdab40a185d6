"""How far back a model finds what it has read, by distance.

Of text: a passage of another document stands twice in a text, and what its second reading costs is held against the
same place without the first: what is gained is what the model carried over the distance. Natural passages, since a
model of text has learnt nothing about random tokens, from the middle of documents, whose beginnings are often alike.

Of a synthetic task: loss and accuracy of its answers by the distance to where the answer stood before, behind the same
tokens as now (`Task.recalled_by`: the key, of the needle with its mark).
"""

import contextlib
import dataclasses

import numpy as np

from zoo.data import synthetic
from zoo.errors import UsageError
from zoo.evaluate import documents
from zoo.evaluate.task import Request, Task
from zoo.evaluate.windows import longest_windows
from zoo.figures import Chart, Line, interval, line_names, of_runs, shown

_SHARE = 8  # a passage is an 8th of a training context
_TASK_LENGTHS = 4  # rows of a task are up to so many training lengths
_TOKENS = 1 << 15  # of rows of a task, at most


class Recall(Task):
    name = "recall"
    about = "what is found again, by distance: a passage of text, or a task's answers"
    of_text = True

    def check(self, request):
        request.check_reader(self.name)
        if request.trained_on is None:
            longest_windows(request, self.name)
        elif not request.trained_on.recalled_by:
            raise UsageError(
                f"--tasks: recall: the answers of {request.trained_on.name} stand nowhere before; leave recall out"
            )

    def measure(self, request):
        if request.trained_on is None:
            return {"of": "passages", "passage": _passage(request), "by_distance": _of_text(request)}, {}
        return {"of": request.trained_on.name, "by_distance": _of_task(request)}, {}

    def tables(self, results):
        tables = []
        for of, some in _apart(results).items():
            if of == "passages":
                headings = ["distance (tokens)", "loss", "loss without the first", "gained", "95 % interval"]
                forms = {"loss": ".4f", "without": ".4f", "gain": "+z.4f"}
            else:
                headings, forms = ["distance (tokens)", "loss", "accuracy"], {"loss": ".4f", "accuracy": ".2%"}

            def row(r, forms=forms, of=of):
                cells = [f"{r['distance']:,}", *(shown(r[key], form) for key, form in forms.items())]
                cells += [interval(r["low"], r["high"], "+z.4f")] if of == "passages" else []
                return [*cells, f"{r['tokens']:,}"]

            rows = {run: [row(r) for r in result["by_distance"]] for run, result in some.items()}
            tables.append(of_runs(f"recall of {of}", [*headings, "tokens"], rows))
        return tables

    def charts(self, results):
        charts = []
        for of, some in _apart(results).items():
            key, y = ("gain", "nats a token gained") if of == "passages" else ("accuracy", "accuracy")
            names = line_names({run: [of] for run in some})
            lines = [
                Line(names[run][0], [(r["distance"], r[key]) for r in result["by_distance"]], run)
                for run, result in some.items()
            ]
            charts.append(Chart(f"Recall of {of} by distance", "distance (tokens)", y, lines))
        return charts


def _apart(results: dict) -> dict[str, dict]:
    """Results by what was recalled."""
    found: dict[str, dict] = {}
    for run, result in results.items():
        found.setdefault(result["of"], {})[run] = result
    return found


# --- Text -------------------------------------------------------------------------------------------------------------


def _passage(request: Request) -> int:
    """Tokens."""
    return max(2, request.training_length // _SHARE)


def _of_text(request: Request) -> list[dict]:
    piece, size = request.training_length, _passage(request)
    windows = longest_windows(request, Recall.name)
    longest = windows.shape[1] - 1
    middle = (longest + 1 - size) // 2
    passages = np.roll(windows[:, middle : middle + size], 1, axis=0)  # of another document each
    distances = [distance for i in range(-2, 4) if size <= (distance := int(piece * 2.0**i)) <= longest - size]
    found = []
    for distance in request.track(distances, "recall"):
        length = -(-(distance + size) // piece) * piece
        plain = windows[:, :length].copy()
        plain[:, length - size :] = passages
        twice = plain.copy()
        twice[:, length - size - distance : length - distance] = passages
        both = np.concatenate([twice, plain])
        targets = np.roll(both, -1, axis=1)  # a row's last token has none
        weights = np.broadcast_to((np.arange(length) >= length - size) & (np.arange(length) < length - 1), both.shape)
        nats = request.reader(both, targets, weights)[0].sum(1, dtype=np.float64).reshape(2, -1)
        tokens = np.full(nats.shape[1], float(size - 1))
        again, without = (documents.Documents(of, tokens, 0 * tokens) for of in nats)
        low, high = documents.differences([again, without])[1]
        loss, other = (float(of.sum() / tokens.sum()) for of in nats)
        found.append(
            {"distance": distance, "loss": loss, "without": other, "gain": other - loss, "low": low, "high": high}
            | {"tokens": int(tokens.sum())}
        )
    return found


# --- Synthetic tasks --------------------------------------------------------------------------------------------------


def distances_back(tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray, by: int) -> np.ndarray:
    """p - q at each position p with a weight: the latest q before p that ends the same `by` tokens and has p's target
    behind it.

    Args:
      tokens, targets: int [n, T].
      weights: [n, T].

    Returns:
      int [n, T]; 0 where there is no weight or no such place.
    """
    found = np.zeros(tokens.shape, int)
    for row, p in zip(*np.nonzero(weights), strict=True):
        own = tokens[row]
        places = own[1 : p + 1] == targets[row, p]  # of q = 0 ... p - 1
        for back in range(min(by, p + 1)):
            places[back:] &= own[: p - back] == own[p - back]
            places[:back] = False
        if places.any():
            found[row, p] = p - np.flatnonzero(places)[-1]
    return found


def _rows(request: Request) -> dict[str, np.ndarray]:
    """Rows of the task, the longest that it is made of."""
    for length in reversed([n for n in request.multiples() if n <= _TASK_LENGTHS * request.training_length]):
        with contextlib.suppress(UsageError):  # a task that is not made of this many tokens
            task = synthetic.find(request.config, context_length=length)
            count = request.reader.rows * max(1, _TOKENS // (request.reader.rows * length))
            rows = dataclasses.replace(synthetic.validation_rows(task, request.config, 1), batch_size=count)
            return next(iter(rows))


def _of_task(request: Request) -> list[dict]:
    batch = _rows(request)
    tokens, targets, weights = (batch[name] for name in ("tokens", "targets", "weights"))
    distances = distances_back(tokens, targets, weights, request.trained_on.recalled_by)
    losses, right = request.reader(tokens, targets, weights)
    bins = np.where(distances > 0, np.ceil(np.log2(np.maximum(distances, 1))), -1).astype(int)
    found = []
    for i in range(bins.max() + 1):
        chosen = bins == i
        if count := int(chosen.sum()):
            means = {"loss": float(losses[chosen].mean()), "accuracy": float(right[chosen].mean())}
            found.append({"distance": 2**i} | means | {"tokens": count})
    return found
