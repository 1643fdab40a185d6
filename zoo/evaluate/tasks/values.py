"""Errors of a run with the head of values by step of the horizon, beside what the series says without a model."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from zoo import data
from zoo.evaluate.task import Request, Task, predictions
from zoo.figures import Chart, Line, of_runs


class Values(Task):
    name = "values"
    about = "errors of the horizon, in all and by step, beside the last value, the last season and a linear regression"
    head = "values"
    of_text = both_ways = True

    def measure(self, request: Request):
        horizon = request.config.model.horizon
        sums, windows, example = np.zeros((2, horizon)), 0, None
        for batch, predicted in predictions(request):
            values = batch["values"].astype(np.float64)
            error = predicted - values[:, -horizon:]
            sums += np.stack([error**2, np.abs(error)]).mean(3).sum(1)
            windows += len(values)
            if example is None:  # the first channel of the first window
                example = {"truth": values[0, :, 0].tolist(), "predicted": predicted[0, :, 0].tolist()}
        found = {"windows": windows, "model": data.baselines.errors(sums / windows)}
        return found | example | {"baselines": data.baselines.of(request.config)}, {}

    def tables(self, results):
        steps = data.baselines.chosen_steps(len(next(iter(results.values()))["model"]["mse_by_step"]))
        whole, by_step = {}, {}
        for run, errors in _errors(results).items():
            whole[run] = [[name, f"{e['mse']:.4f}", f"{e['mae']:.4f}"] for name, e in errors.items()]
            by_step[run] = [
                [name, *(f"{e['mse_by_step'][step - 1]:.4f}" for step in steps)] for name, e in errors.items()
            ]
        tables = (
            of_runs("values", ["", "mean squared error", "mean absolute error"], whole),
            of_runs("mean squared error by step", ["", *(f"step {step}" for step in steps)], by_step),
        )
        return [table._replace(texts=table.texts + 1) for table in tables]

    def charts(self, results):
        several, own = len(results) > 1, next(iter(results.values()))
        lines = [
            Line(run if several and name == "model" else name, [*_points(e["mse_by_step"])], run)
            for run, errors in _errors(results).items()
            for name, e in errors.items()
        ]
        found = [Chart("Squared error by step of the horizon", "step", "mean squared error", lines, log_x=False)]
        if not several:
            (run,), start = results, len(own["truth"]) - len(own["predicted"])
            drawn = {"truth": _points(own["truth"]), "predicted": _points(own["predicted"], start)}
            lines = [Line(name, [*points], run) for name, points in drawn.items()]
            marked = (start, "the input ends")
            found.append(Chart("The first window's first channel", "step", "value", lines, log_x=False, marked=marked))
        return found

    def figures(self, result):
        model = result["model"]
        steps = data.baselines.chosen_steps(len(model["mse_by_step"]))
        by_step = {f"mean squared error, step {step}": model["mse_by_step"][step - 1] for step in steps}
        return {"mean squared error": model["mse"], "mean absolute error": model["mae"]} | by_step


def _errors(results: Mapping[str, dict]) -> dict[str, dict[str, dict]]:
    """By run and by what predicts: each model, and of the first run the baselines, for all are of one series."""
    first = next(iter(results))
    return {
        run: {"model": result["model"]} | (result["baselines"] if run == first else {})
        for run, result in results.items()
    }


def _points(values: Sequence[float], start: int = 0) -> Iterator[tuple[float, float]]:
    return ((start + i, value) for i, value in enumerate(values, 1))
