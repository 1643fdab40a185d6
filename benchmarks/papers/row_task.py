"""A source of rows (`zoo.data.rows`) as the task of a set-up."""

import dataclasses
from typing import Any

from zoo.config import Config
from zoo.data import row_batches
from zoo.data.rows import RowSource
from zoo.data.stored import MissingPackage

TESTED = 0.2  # of a series, its last part


@dataclasses.dataclass(frozen=True)
class RowTask:
    """A data.source, and how a model reads it.

    Attributes:
      source: as data.source.
      head: classes or values.
      steps: of a row's input.
      patch: steps of a position.
      horizon: steps to predict, of values.
      season: steps of the seasonal baseline, of values; 0: none.
    """

    source: str
    head: str
    steps: int
    patch: int = 1
    horizon: int = 24
    season: int = 0

    @property
    def name(self) -> str:
        return self.source.partition("?")[0]

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.steps // self.patch

    @property
    def context_length(self) -> int:
        return self.length

    @property
    def missing(self) -> str:
        """Why there are no rows: a package that is not installed; empty: there are."""
        try:
            self.rows()
        except MissingPackage as error:
            return str(error)
        return ""

    def rows(self) -> RowSource:
        config = Config()
        config.data.source, config.data.validation_fraction = self.source, TESTED
        config.model.head, config.model.patch, config.model.horizon = self.head, self.patch, self.horizon
        config.train.context_length = self.steps
        return row_batches.find(config)

    def model_settings(self) -> dict[str, Any]:
        """What the rows make of a model."""
        rows = self.rows()
        return {
            "head": self.head,
            "classes": rows.num_classes,
            "channels": rows.channels,
            "vocab_size": rows.vocab_size,
            "patch": self.patch,
            "horizon": self.horizon,
            "max_positions": self.length,
        }
