"""Windows of series: `input` steps and the `horizon` after them, [input + horizon, C].

The last part of each series in time validates, the rest trains; a window lies whole in one of the two, and holds no
gap. All numbers are standardised by channel, by the mean and the deviation of the steps that train.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from zoo.data.stored import StoredRows, standardised
from zoo.data.streams import content_hash
from zoo.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Series:
    """One series.

    Attributes:
      name: for messages, "load.csv".
      values: float64 [T, C].
      columns: the name of each channel.
      gaps: the steps before which others are missing, in order.
    """

    name: str
    values: np.ndarray
    columns: tuple[str, ...]
    gaps: tuple[int, ...] = ()


class Windows(StoredRows):
    """Every window of some series.

    Args:
      name: of the source.
      length: steps of a window that are read.
      horizon: and that are predicted.
      fraction: of each series, the part that validates.

    Raises:
      UsageError: a number that is not finite, series that differ in columns, one that is too short, a part without a
        window, or a column that is constant where it trains.
    """

    head = "values"

    def __init__(self, name: str, series: Sequence[Series], length: int, horizon: int, fraction: float):
        self.name, self.length, self.input, self.horizon = name, length, length, horizon
        self.columns, self.channels = series[0].columns, len(series[0].columns)
        digest, starts, training, before = hashlib.sha256(), {"train": [], "validation": []}, [], 0
        stops = []  # of the part without a gap that a window of the validation part lies in
        for one in series:
            _check(one, series[0], length + horizon)
            total = len(one.values)
            split = total - round(fraction * total)
            training.append(one.values[:split])
            for part, start, stop in (("train", 0, split), ("validation", split, total)):
                cuts = [start, *(gap for gap in one.gaps if start < gap < stop), stop]
                for first, last in zip(cuts[:-1], cuts[1:], strict=True):
                    starts[part].append(before + np.arange(first, last - length - horizon + 1))
                    if part == "validation":
                        stops.append(np.full(len(starts[part][-1]), before + last))
            digest.update(np.ascontiguousarray(one.values).tobytes() + str(one.gaps).encode())
            before += total
        self._starts = {part: np.concatenate(found) for part, found in starts.items()}
        self._stops = np.concatenate(stops)
        self.train_rows, self.validation_rows = len(self._starts["train"]), len(self._starts["validation"])
        for part, found in self._starts.items():
            if not len(found):
                raise UsageError(
                    f"data.source: {name} has no {part} window of {length} + {horizon} steps (train.context_length + "
                    f"model.horizon) in {before:,} steps, of which data.validation_fraction = {fraction:g} validate; "
                    "use shorter ones, a longer series, or another fraction"
                )
        self.mean, self.deviation = self._moments(np.concatenate(training))
        self._values = standardised(np.concatenate([one.values for one in series]), self.mean, self.deviation)
        self.fingerprint = content_hash(name, digest.hexdigest(), self.columns, length, horizon, fraction)

    def _moments(self, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = training.mean(0), training.std(0)
        for column, value, spread in zip(self.columns, mean, deviation, strict=True):
            if not spread > 1e-12 * abs(value):
                raise UsageError(
                    f"data.source: {self.name}: column {column!r} is {value:g} at every step that trains, and cannot "
                    "be standardised; leave it out (the option columns=)"
                )
        return mean, deviation

    def take(self, part, indices):
        starts = self._starts[part][list(indices)]
        return {"values": self._values[starts[:, None] + np.arange(self.length + self.horizon)]}

    def after(self, row, steps):
        first = self._starts["validation"][row] + self.length
        return self._values[first : min(first + steps, self._stops[row])]


def _check(one: Series, first: Series, window: int) -> None:
    if one.columns != first.columns:
        raise UsageError(
            f"{one.name}: columns {', '.join(one.columns)}, and {first.name} has {', '.join(first.columns)}; expected "
            "the same, in the same order"
        )
    if not np.isfinite(one.values).all():
        row, column = np.argwhere(~np.isfinite(one.values))[0]
        raise UsageError(
            f"{one.name}: row {row + 1}, column {one.columns[column]!r}: got {one.values[row, column]}, expected a "
            "finite number; fill it in, or leave the row out (with the option time=, what is missing is a gap that no "
            "window crosses)"
        )
    if len(one.values) < window:
        raise UsageError(
            f"{one.name}: {len(one.values)} steps are fewer than one window of {window}, train.context_length + "
            "model.horizon; use shorter ones, or a longer series"
        )
