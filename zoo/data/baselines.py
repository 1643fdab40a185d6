"""What a series says without a model: the last value, the last season, and a linear regression of the input.

    last value          prediction_h = x_T
    seasonal            prediction_h = x_(T - s + h mod s), s = data.season steps, where there is one
    linear regression   prediction_h = x_T + sum_t a_(h,t) (x_t - x_T) + b_h, by least squares on windows of the
                        training part; one regression a step of the horizon, the same for all channels (NLinear,
                        arXiv:2205.13504, solved instead of trained)

A model that does not beat them has learned nothing that it is for.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from zoo.data import row_batches
from zoo.data.row_batches import ValidationBatches
from zoo.data.rows import RowSource
from zoo.errors import UsageError

if TYPE_CHECKING:
    from zoo.config import Config

FITTED_ON = 8192  # windows, or as many as there are
_ROWS = 256  # of a batch
_SEED = 0

Errors = dict[str, dict[str, float | list[float]]]


def check(source: RowSource, season: int) -> None:
    """UsageError for a season that the input does not hold."""
    if season > source.length:
        raise UsageError(
            f"data.season: {season} steps are more than the input's {source.length} (train.context_length); use at "
            "most that, or 0 for none"
        )


def of(config: "Config") -> Errors:
    """`measure` of the series that data.source names."""
    return measure(row_batches.find(config), config.data.season)


def measure(source: RowSource, season: int = 0) -> Errors:
    """By name, of the whole validation part: mse, mae, and both by step of the horizon, mse_by_step and mae_by_step."""
    length = source.length
    weight, bias = _fit(source)

    def linear(values: np.ndarray) -> np.ndarray:
        last = values[:, length - 1 : length]
        return last + np.einsum("btc,th->bhc", values[:, :length] - last, weight) + bias[:, None]

    predictors = {"linear regression": linear, "last value": lambda values: values[:, length - 1 : length]}
    if season:
        steps = length - season + np.arange(source.horizon) % season
        predictors["seasonal"] = lambda values: values[:, steps]
    found = {name: np.zeros((2, source.horizon)) for name in predictors}
    for values in _validation(source):
        for name, predict in predictors.items():
            error = predict(values) - values[:, length:]
            found[name] += np.stack([error**2, np.abs(error)]).mean(3).sum(1)
    return {name: errors(sums / source.validation_rows) for name, sums in found.items()}


def errors(by_step: np.ndarray) -> dict[str, float | list[float]]:
    """Of mean squared and mean absolute errors [2, horizon]."""
    (mse, mae), (mses, maes) = by_step.mean(1).tolist(), by_step.tolist()
    return {"mse": mse, "mae": mae, "mse_by_step": mses, "mae_by_step": maes}


def chosen_steps(horizon: int) -> list[int]:
    """Of a horizon, for a table: 1, 2, 4, ... and the last."""
    return sorted({horizon, *(1 << i for i in range(horizon.bit_length()))})


def _fit(source: RowSource) -> tuple[np.ndarray, np.ndarray]:
    """Weights [T, horizon] and biases [horizon], by the normal equations: windows are seen once, a batch at a time."""
    length = source.length
    size = length + 1
    squares, products = np.zeros((size, size)), np.zeros((size, source.horizon))
    for values in _training(source):
        rows = np.swapaxes(values, 1, 2).reshape(-1, values.shape[1])  # each channel of each window
        rows = rows - rows[:, length - 1 : length]
        inputs = np.concatenate([rows[:, :length], np.ones((len(rows), 1))], axis=1)
        squares += inputs.T @ inputs
        products += inputs.T @ rows[:, length:]
    # The last input is 0 in every window, and inputs of a smooth series nearly depend on one another.
    solved = np.linalg.lstsq(squares, products, rcond=1e-9)[0]
    return solved[:length], solved[length]


def _training(source: RowSource) -> Iterable[np.ndarray]:
    windows = min(FITTED_ON, source.train_rows or FITTED_ON)
    batch_size = min(_ROWS, windows)
    for step in range(windows // batch_size):
        yield source.train_batch(_SEED, step, batch_size)["values"].astype(np.float64)


def _validation(source: RowSource) -> Iterator[np.ndarray]:
    for batch in ValidationBatches(source, min(_ROWS, source.validation_rows)):
        yield batch["values"][batch["weights"] > 0].astype(np.float64)
