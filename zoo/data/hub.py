"""Text of the Hugging Face hub: `hf:NAME`, read as it comes, one row at a time, by the package `datasets`.

    hf:NAME?config=sample-10BT&split=train&revision=main&take=100000

NAME is a data set's, such as HuggingFaceFW/fineweb-edu; all after the question mark may be left out. Rows are
documents, their text the column data.text_field. A revision is a branch, a tag or a commit; whichever, the commit that
it means is part of what a run is known by. `take` stops after so many rows.

No code of a data set is executed. Where the hub cannot be reached (or HF_HUB_OFFLINE=1), a snapshot in the hub's own
cache folder is read in its place.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pyarrow

from zoo.errors import UsageError
from zoo.settings import nearest, shown
from zoo.terminal import one_line

PREFIX = "hf:"
_NAME = re.compile(r"(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_EXAMPLE = "hf:HuggingFaceFW/fineweb-edu?config=sample-10BT&split=train"


@dataclasses.dataclass(frozen=True)
class HubText:
    """The rows that one `hf:` source means."""

    name: str
    config: str | None
    split: str
    revision: str  # a commit
    take: int | None

    def rows(self, column: str) -> Iterator[str]:
        """The text of each row, in the data set's order.

        Raises:
          UsageError: the hub cannot be reached, there is no such split or column, or a row of it is no text.
        """
        import datasets

        with errors(self.name, datasets.exceptions.DatasetsError):
            table = self._open()
            if table.column_names is not None and column not in table.column_names:
                listed = ", ".join(one_line(name[:40]) for name in sorted(table.column_names)[:10])
                raise UsageError(f"{PREFIX}{self.name}: no column {column!r} (it has: {listed}); set data.text_field")
            for number, row in enumerate(itertools.islice(table, self.take)):
                text = row.get(column)
                if not isinstance(text, str):
                    kind = "null" if text is None else type(text).__name__
                    raise UsageError(f"{PREFIX}{self.name}: row {number}: {column!r} is not a string but {kind}")
                yield text

    def _open(self) -> Any:
        import datasets

        where, options = self.name, {"revision": self.revision}
        if _commit_on_hub(self.name, self.revision) is None:
            where, options = _snapshot(self.name, self.revision), {}
        known = datasets.get_dataset_config_names(where, **options)
        if self.config not in (None, *known):
            near = nearest(self.config, known, 5)
            raise UsageError(f"{PREFIX}{self.name}: no config {shown(self.config)}; nearest: {near}")
        known = datasets.get_dataset_split_names(where, self.config, **options)
        if self.split not in known:
            raise UsageError(f"{PREFIX}{self.name}: no split {shown(self.split)}; it has {', '.join(known)}")
        return datasets.load_dataset(where, self.config, split=self.split, streaming=True, **options)


def parse(spec: str, setting: str, known: tuple[str, ...], example: str) -> tuple[str, dict[str, str]]:
    """Of `hf:NAME?key=value&...`: the name, and the values of the keys that are given.

    Raises:
      UsageError: a spec of another form, or a key that is not known.
    """
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    fields = [field.partition("=") for field in query.split("&")] if query else []
    given = {key: urllib.parse.unquote(value) for key, _, value in fields}
    if not _NAME.fullmatch(name):
        raise UsageError(f"{setting}: got {shown(spec)}, expected {PREFIX} and a name of the hub, as in {example}")
    for key in given:
        if key not in known:
            near = nearest(key, known)
            raise UsageError(f"{setting}: {shown(spec)}: unknown {shown(key)}; known, nearest first: {near}")
    if len(given) < len(fields) or not all(given.values()):
        raise UsageError(f"{setting}: got {shown(spec)}, expected each of {', '.join(known)} once, with a value")
    return name, given


def find(spec: str, setting: str) -> HubText:
    """The text that `spec` means, its revision settled.

    Raises:
      UsageError: as `parse`, the package `datasets` is missing, or there is no such data set.
    """
    name, given = parse(spec, setting, ("config", "split", "revision", "take"), _EXAMPLE)
    take = given.get("take")
    if take is not None and not (take.isascii() and take.isdecimal() and 0 < int(take[:20]) < 2**63):
        raise UsageError(f"{setting}: {shown(spec)}: take: got {shown(take)}, expected a number of rows, at least 1")
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(
            f"{setting}: {shown(spec)} needs the package datasets: pip install 'sequence-zoo[hf]'; or download the "
            f"data set as jsonl or parquet files and give their path, such as {setting}='data/*.parquet'"
        )
    revision = given.get("revision", "main")
    if not _COMMIT.fullmatch(revision):
        revision = _commit_on_hub(name, revision) or pathlib.PurePath(_snapshot(name, revision)).name
    return HubText(name, given.get("config"), given.get("split", "train"), revision, take and int(take))


@functools.lru_cache(maxsize=256)  # a process sees one commit of a branch, however often it looks
def _commit_on_hub(name: str, revision: str) -> str | None:
    """None: the hub cannot be reached."""
    import huggingface_hub

    try:
        with errors(name):
            return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except _Unreachable:
        return None


def _snapshot(name: str, revision: str) -> str:
    """The folder of a commit in the hub's cache."""
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    except OSError as error:
        raise UsageError(
            f"{PREFIX}{name}: the hub cannot be reached, and its cache has no {revision} of it; text that was "
            "tokenized before is found without the hub, if the source names its commit: ?revision= and 40 digits"
        ) from error


class _Unreachable(UsageError):
    pass


@contextlib.contextmanager
def errors(name: str, *unreadable: type[Exception]) -> Iterator[None]:
    """What the hub's packages raise, as UsageError; `unreadable`: what else they raise of content."""
    import huggingface_hub

    try:
        yield
    except UsageError:
        raise
    except huggingface_hub.errors.HfHubHTTPError as error:
        said = one_line(str(error).splitlines()[0])
        raise UsageError(
            f"{PREFIX}{name}: the hub has none of that name or revision, or not for you ({said}); check the name, or "
            "log in (hf auth login, HF_TOKEN)"
        ) from error
    except (ValueError, pyarrow.ArrowException, *unreadable) as error:
        raise UsageError(f"{PREFIX}{name}: cannot be read: {one_line(error)}") from error
    except (OSError, huggingface_hub.errors.HTTPError) as error:
        raise _Unreachable(f"{PREFIX}{name}: the hub does not answer: {one_line(error)}; start again") from error
