"""What sources of rows share (`zoo.data.rows`): their options, rows that are kept in memory, files and packages."""

import dataclasses
import functools
import importlib.util
import pathlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo import files
from zoo.data import options, rows
from zoo.errors import UsageError
from zoo.settings import problems

if TYPE_CHECKING:
    from zoo.config import Config

PATHS = ("path", "validation", "labels")  # options that name files


@dataclasses.dataclass
class NoOptions:
    """Of a source that has none."""


def source(name: str, declared: type = NoOptions) -> Callable[[Callable], Callable]:
    """Make a function known as the source `name`.

    Args:
      declared: a dataclass of settings (`zoo.settings`), the source's options. The function takes the config and one of
        these, and returns a `rows.RowSource`; of a config it may use the section `data`, train.context_length and
        model.horizon. A run asks for its source several times, and gets the one that was made last.
    """

    def register(make: Callable[["Config", Any], rows.RowSource]) -> Callable:
        last: dict[str, rows.RowSource] = {}

        @functools.wraps(make)
        def from_text(config: "Config", text: str) -> rows.RowSource:
            used = repr((text, config.data, config.train.context_length, config.model.horizon))
            if used in last:
                return last[used]
            known = {field.name: field.metadata["setting"] for field in dataclasses.fields(declared)}
            try:
                asked = declared(**options.read(name, text, known))
                if found := problems(asked):
                    raise UsageError(f"{name}: {found[0]}")
            except UsageError as error:
                raise UsageError(f"data.source: {error}") from None
            last.clear()
            last[used] = make(config, asked)
            return last[used]

        rows.SOURCES[name] = from_text
        return make

    return register


class StoredRows(rows.RowSource):
    """Rows that can be had by their numbers, in each part 0, 1, ..."""

    def take(self, part: str, indices: Sequence[int]) -> rows.Batch:
        """These rows of the part `train` or `validation`."""
        raise NotImplementedError

    def train_batch(self, seed, step, batch_size):
        order = rows.row_order(self.train_rows, seed)
        return self.take("train", [order[step * batch_size + i] for i in range(batch_size)])

    def validation_batch(self, start, stop):
        return self.take("validation", range(start, stop))


def standardised(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """float32 (values - mean) / deviation."""
    return ((values.astype(np.float64) - mean) / deviation).astype(np.float32)


class MissingPackage(UsageError):
    """A source needs a package that is not installed."""


def folder_of_package(module: str, package: str, source_name: str) -> pathlib.Path:
    """Where an installed package lies; it is not imported.

    Args:
      package: as pip knows it. The extra of ours that brings it is `source_name`.

    Raises:
      MissingPackage: it is not installed.
    """
    found = importlib.util.find_spec(module)
    if found is None:
        raise MissingPackage(
            f"data.source: {source_name} needs the package {package}: pip install 'sequence-zoo[{source_name}]'"
        )
    return pathlib.Path(found.origin).parent


def with_absolute_path(spec: str) -> str:
    """The same source with the options that name files made absolute, for whoever opens it from another folder."""
    name, mark, query = spec.strip().partition("?")
    entries = [entry.partition("=") for entry in query.split("&")]
    made = []
    for option, equals, text in entries:
        if option in PATHS and text:
            path = pathlib.Path(files.expand(urllib.parse.unquote(text))).absolute()
            text = str(path).replace("%", "%25").replace("&", "%26")
        made.append(f"{option}{equals}{text}")
    return name + mark + "&".join(made)
