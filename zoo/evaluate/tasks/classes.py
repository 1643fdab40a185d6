"""Accuracy of a run with the head of classes on its validation rows, and which labels it takes for which."""

import math

import numpy as np

from zoo.evaluate.task import Request, Task, predictions
from zoo.figures import Table, interval, of_runs, shown

_MOST = 20  # labels of a table


class Classes(Task):
    name = "classes"
    about = "accuracy of the labels, with its 95 % interval (Wilson's, over rows), and which are taken for which"
    head = "classes"
    of_text = both_ways = True

    def measure(self, request: Request):
        count, nats = request.config.model.classes, 0.0
        confusion = np.zeros((count, count), np.int64)
        for batch, logits in predictions(request):
            label = batch["label"]
            np.add.at(confusion, (label, logits.argmax(1)), 1)
            nats -= _log_softmax(logits)[np.arange(len(label)), label].sum()
        rows, right = int(confusion.sum()), int(np.trace(confusion))
        low, high = wilson(right, rows)
        found = {"rows": rows, "loss": float(nats / rows), "accuracy": right / rows, "low": low, "high": high}
        return found | {"confusion": confusion.tolist()}, {}

    def tables(self, results):
        rows = {
            run: [
                [
                    shown(r["accuracy"], ".2%"),
                    interval(r["low"], r["high"], ".2%"),
                    shown(r["loss"], ".4f"),
                    f"{r['rows']:,}",
                ]
            ]
            for run, r in results.items()
        }
        headings = ["accuracy", "95 % interval", "loss (nats per row)", "rows"]
        return [of_runs("classes", headings, rows), *self._confusion(results)]

    @staticmethod
    def _confusion(results) -> list[Table]:
        """Of a single run."""
        confusion = next(iter(results.values()))["confusion"]
        if len(results) > 1 or len(confusion) > _MOST:
            return []
        rows = [[f"{label}", *(f"{n:,}" if n else "" for n in row)] for label, row in enumerate(confusion)]
        return [Table("rows of each label, by what was predicted", ["label", *map(str, range(len(confusion)))], rows)]

    def charts(self, results):
        return []

    def figures(self, result):
        return {"accuracy": result["accuracy"], "loss (nats per row)": result["loss"]}


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share, of `right` out of `rows` (Wilson 1927)."""
    z, share = 1.959964, right / rows
    middle, half = share + z**2 / (2 * rows), z * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return (middle - half) / (1 + z**2 / rows), (middle + half) / (1 + z**2 / rows)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
