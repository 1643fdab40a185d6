"""Sources of rows: labelled sequences and windows of series, for the heads `classes` and `values` (`zoo.heads`).

`zoo.data.row_batches` makes of a source what a run reads.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import grain
import numpy as np

if TYPE_CHECKING:
    from zoo.config import Config

Batch = dict[str, np.ndarray]


class RowSource:
    """Rows of a training and of a validation part.

    Attributes:
      head: what the rows are for: "classes" or "values".
      name: as in data.source.
      fingerprint: of the rows; a resumed run is held to it.
      length: steps of a row's input, train.context_length.
      num_classes: labels, of classes.
      vocab_size: token ids; 0 where inputs are numbers.
      channels: numbers of a step; 0 where inputs are tokens.
      horizon: steps after the input, model.horizon, of values.
      train_rows: of the training part; 0: drawn anew for ever.
      validation_rows: of the validation part.
      columns: the name of each channel, of values; (): they have none.
      mean, deviation: of each channel, by which values were standardised.
    """

    head: str
    name: str
    fingerprint: str
    length: int
    num_classes: int = 0
    vocab_size: int = 0
    channels: int = 0
    horizon: int = 0
    train_rows: int = 0
    validation_rows: int
    columns: tuple[str, ...] = ()
    mean: np.ndarray | float = 0.0
    deviation: np.ndarray | float = 1.0

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The whole batch of a step.

        Returns:
          Of classes: tokens int32 [B, T], or values float32 [B, T, C]; lengths int32 [B], 1 to T; label int32 [B]. Of
          values: values float32 [B, T + horizon, C], standardised.
        """
        raise NotImplementedError

    def validation_batch(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` of the validation part, in fixed order."""
        raise NotImplementedError

    def after(self, row: int, steps: int) -> np.ndarray:
        """Of values, what follows a validation row's input, [at most `steps`, C]: as far as it is known."""
        return self.validation_batch(row, row + 1)["values"][0, self.length :][:steps]


SOURCES: dict[str, Callable[["Config", str], RowSource]] = {}  # by name; made of the config and what follows "?"


def is_source(spec: str) -> bool:
    """Whether data.source names a source of rows, with options or without."""
    return spec.strip().partition("?")[0] in SOURCES


def find(config: "Config", source: str | None = None) -> RowSource | None:
    """The source of rows that data.source (or `source`) names; None: it names none."""
    name, _, options = (config.data.source if source is None else source).strip().partition("?")
    return SOURCES[name](config, options) if name in SOURCES else None


def row_order(num_rows: int, seed: int) -> grain.MapDataset:
    """The rows of a training part in shuffled order, another each epoch, for ever: order[i] is a row's number."""
    return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()
