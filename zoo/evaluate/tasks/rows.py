"""A synthetic task: loss and accuracy of its answers, along what makes it harder (`Task.axis` in zoo.data.synthetic).

The needle by its depth, MQAR by its pairs, parity by the position of the answer; without such an axis, or where the
spec fixes it, by the length of rows alone. The 512 validation rows are shared among the values of the axis.
"""

import copy
import dataclasses
import math

from zoo.data import synthetic
from zoo.errors import UsageError
from zoo.evaluate.perplexity import perplexity
from zoo.evaluate.task import Request, Task
from zoo.figures import Chart, Line, line_names, of_runs, shown

_LENGTH = "context length"


class Rows(Task):
    def __init__(self, spec: str):
        self.name = spec
        self.about = f"accuracy of {spec.partition('?')[0]}"

    def check(self, request):
        for length in request.context_lengths:
            self._tasks(request, length)

    def _tasks(self, request: Request, length: int) -> tuple[str, dict[float, synthetic.Task]]:
        """The axis, and the task at its values."""
        task = synthetic.of_spec(self.name, length, setting="--tasks", length="--context_length")
        model = request.run.model
        if task.vocab_size > model.vocab_size:
            raise UsageError(
                f"--tasks: {self.name} has {task.vocab_size} token ids, and the model {model.vocab_size}; where the "
                f"task can be smaller, say so: {task.name}?vocab_size={model.vocab_size}"
            )
        if model.learned_positions and length > model.max_positions:
            raise UsageError(f"--context_length: {length} exceeds the model's {model.max_positions} learned positions")
        axis = task.axis[0]
        if not axis or axis in synthetic.options_of(self.name):
            return _LENGTH, {length: task}
        return axis, task.along_axis()

    def measure(self, request):
        points = []
        for length in request.context_lengths:
            axis, tasks = self._tasks(request, length)
            for value, task in request.track(tasks.items(), self.name):
                found = self._measure(request, task, len(tasks), axis == synthetic.POSITION)
                if axis == synthetic.POSITION:
                    values = [(b["last"], b) for b in found["by_position"]]
                else:
                    values = [(value, found)]
                points += [
                    {"context_length": length, "value": at} | {key: of[key] for key in ("loss", "accuracy", "tokens")}
                    for at, of in values
                ]
        return {"axis": axis, "points": points}, {}

    @staticmethod
    def _measure(request: Request, task: synthetic.Task, parts: int, every: bool) -> dict:
        config = copy.deepcopy(request.config)
        size = config.eval.batch_size or config.train.batch_size
        config.eval.batch_size = max(1, size * config.train.context_length // task.context_length)
        rows = dataclasses.replace(synthetic.validation_rows(task, config, 0), every=every)
        batches = max(1, len(rows) // parts)
        rows = rows.at_most(min(batches, request.batches) if request.batches else batches)
        # Tasks of a few answers more or less share a program.
        labels = min(task.context_length, max(16, 1 << math.ceil(math.log2(rows.labels))))
        found = perplexity(request.run.model, rows, labels)
        return found | {"by_position": found["loss_by_position"]}

    def tables(self, results):
        axis = next(iter(results.values()))["axis"]
        headings = [_LENGTH, *([axis] if axis != _LENGTH else []), "loss (nats)", "accuracy", "answers"]
        rows = {
            run: [
                [
                    f"{p['context_length']:,}",
                    *([f"{p['value']:g}"] if axis != _LENGTH else []),
                    shown(p["loss"], ".4f"),
                    shown(p["accuracy"], ".2%"),
                    f"{p['tokens']:,}",
                ]
                for p in result["points"]
            ]
            for run, result in results.items()
        }
        return [of_runs(self.name, headings, rows)]

    def charts(self, results):
        by_line: dict[str, dict[str, list]] = {}
        for run, result in results.items():
            for p in result["points"]:
                name = "" if result["axis"] == _LENGTH else f"context {p['context_length']}"
                by_line.setdefault(run, {}).setdefault(name, []).append((p["value"], p["accuracy"]))
        axis = next(iter(results.values()))["axis"]
        if max(len(points) for lines in by_line.values() for points in lines.values()) < 2:
            return []
        names = line_names({run: [name or self.name for name in lines] for run, lines in by_line.items()})
        lines = [
            Line(name, points, run)
            for run, found in by_line.items()
            for name, points in zip(names[run], found.values(), strict=True)
        ]
        return [Chart(f"Accuracy of {self.name}", axis, "accuracy", lines, log_x=axis != "depth")]
