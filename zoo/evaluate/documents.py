"""Losses by document, kept beside an evaluation, and what they say of a difference between runs: its interval.

A run's loss on a text depends on which documents the text happens to have. Runs on the same text are compared document
by document: documents are drawn with replacement, the same for all runs, and the difference is computed again (the
paired bootstrap; Efron & Tibshirani 1993, Koehn 2004). What all runs find hard cancels.
"""

import io
import math
import os
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from zoo import files
from zoo.errors import UsageError

RESAMPLES, SEED = 2000, 0
LOW, HIGH = 2.5, 97.5  # percentiles
_GROUPS = 4096  # more documents are drawn in groups, made at random
_LARGEST = 1 << 30  # bytes of a file
_AT_ONCE = 100  # draws


class Documents(NamedTuple):
    """Sums over each document of a text, float64 [documents]; 0 where nothing of one was read."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @classmethod
    def none(cls, count: int) -> "Documents":
        return cls(*np.zeros((3, count)))

    def add(self, document: np.ndarray, losses: np.ndarray, weights: np.ndarray, num_bytes: np.ndarray) -> None:
        """The targets of a batch, each array [b, T]; `document` is -1 where there is none."""
        there = document >= 0
        for sums, values in zip(self, (losses, weights, num_bytes), strict=True):
            sums += np.bincount(document[there], values[there].astype(np.float64), len(sums))

    @property
    def units(self) -> np.ndarray:
        """What a loss is divided by: bits per byte where the text has bytes, else nats per token."""
        return math.log(2) * self.bytes if self.bytes.any() else self.tokens


def alike(run: Documents, other: Documents) -> bool:
    """Whether the same parts of the same documents were read of both."""
    return run.nats.shape == other.nats.shape and np.allclose(run.units, other.units, rtol=1e-3, atol=0.5)


def differences(runs: list[Documents]) -> list[tuple[float, float]]:
    """95 % intervals of each run's loss less the first's, in the unit of `Documents.units`.

    Raises:
      ValueError: what was read of the documents differs, or there are fewer than two of them.
    """
    drawn = _drawn(runs)
    return [tuple(np.percentile(of_run - drawn[:, 0], (LOW, HIGH)).tolist()) for of_run in drawn.T]


def interval(run: Documents) -> tuple[float, float] | None:
    """The 95 % interval of a run's own loss; None of a single document."""
    if (run.units > 0).sum() < 2:
        return None
    return tuple(np.percentile(_drawn([run])[:, 0], (LOW, HIGH)).tolist())


def _drawn(runs: list[Documents]) -> np.ndarray:
    """The losses of `runs` on RESAMPLES draws of the documents, [RESAMPLES, runs]."""
    if not all(alike(run, runs[0]) for run in runs[1:]):
        raise ValueError("not the same parts of the text were read")
    units = np.stack([run.units for run in runs])
    nats, read = np.stack([run.nats for run in runs]), units[0] > 0
    nats, units = nats[:, read], units[:, read]
    if nats.shape[1] < 2:
        raise ValueError("fewer than two documents were read")
    rng = np.random.default_rng(SEED)
    if nats.shape[1] > _GROUPS:
        group = rng.permutation(nats.shape[1]) % _GROUPS
        nats, units = (np.stack([np.bincount(group, row, _GROUPS) for row in sums]) for sums in (nats, units))
    count, found = nats.shape[1], []
    for _ in range(RESAMPLES // _AT_ONCE):
        times = rng.multinomial(count, np.full(count, 1 / count), _AT_ONCE).astype(np.float64)
        found.append((times @ nats.T) / np.maximum(times @ units.T, 1e-30))
    return np.concatenate(found)


# --- Kept -------------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What the documents were read in: which runs on one text compare. Rows of a task are made batch by batch."""

    context_length: int
    batch_size: int = 0  # of a task; 0: text

    def __str__(self) -> str:
        return f"{self.context_length}x{self.batch_size}"


def to_arrays(read_in: Read, run: Documents) -> dict[str, np.ndarray]:
    """For a file, float32."""
    return {f"{read_in}/{name}": array.astype(np.float32) for name, array in run._asdict().items()}


def write(path: str | os.PathLike, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, fingerprint=np.array(fingerprint), **arrays)


def read(path: str | os.PathLike) -> tuple[str, dict[Read, Documents]]:
    """The text's fingerprint, and what was measured. Empty where there is no file.

    Raises:
      UsageError: it is not what `zoo.evaluate` writes.
    """
    try:
        content = io.BytesIO(files.read_bytes(path, _LARGEST))
        if sum(entry.file_size for entry in zipfile.ZipFile(content).infolist()) > _LARGEST:
            raise ValueError(f"it unpacks to more than {_LARGEST:,} bytes")
        with np.load(content, allow_pickle=False) as arrays:
            names = {name.split("/")[0] for name in arrays if name != "fingerprint"}
            kinds = [Read(*map(int, name.split("x"))) for name in names]
            found = {n: Documents(*(_sums(arrays[f"{n}/{name}"]) for name in Documents._fields)) for n in kinds}
            return str(arrays["fingerprint"]), found
    except FileNotFoundError:
        return "", {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise UsageError(f"{path} is not what zoo.evaluate writes ({error}); evaluate the run again") from error


def _sums(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or array.dtype != np.float32 or not np.isfinite(array).all():
        raise ValueError("expected finite float32 numbers, one a document")
    return array.astype(np.float64)
