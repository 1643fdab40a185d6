"""A config as JSON, as it is saved beside checkpoints, and what differs between two."""

import dataclasses
import json
import pathlib
from typing import Any

from zoo import files
from zoo.config.sections import Config
from zoo.errors import UsageError
from zoo.settings import nearest, shown

MAX_JSON = 1 << 20  # bytes of a config.json


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found.update(leaves(value, name + ".") if dataclasses.is_dataclass(value) else {name: value})
    return found


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def read_json(path: pathlib.Path) -> Config:
    """`from_json` of a file.

    Raises:
      OSError: as `files.read_bytes`, of more than MAX_JSON bytes too.
      UsageError: as `from_json`, naming the file.
    """
    content = files.read_bytes(path, MAX_JSON)
    try:
        return from_json(content.decode())
    except (UsageError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no config of a run: {error}") from error


def from_json(text: str) -> Config:
    """The config of `to_json`. Settings that the text lacks keep their defaults; `validate` is left to the caller.

    Raises:
      UsageError: not JSON, an unknown setting, or a value of another type.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise UsageError("not valid JSON (brackets without end)") from error
    except ValueError as error:  # and a number of thousands of digits
        raise UsageError(f"not valid JSON ({error})") from error
    config = Config()
    _fill(config, values, "")
    return config


def _fill(config: Any, values: Any, prefix: str) -> None:
    if not isinstance(values, dict):
        raise UsageError(f"{prefix.rstrip('.') or 'the whole'} is {shown(values)}, expected an object of settings")
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name, value in values.items():
        if name not in fields:
            known = nearest(name, fields, 5)
            raise UsageError(f"unknown setting {shown(prefix + name)}; known, nearest first: {known}")
        declared = fields[name].metadata.get("setting")
        if declared is None:
            _fill(getattr(config, name), value, f"{prefix}{name}.")
            continue
        value = declared.convert(value)
        if type(value) is not declared.kind:
            raise UsageError(f"{prefix}{name}: {declared.problem(value)}")
        setattr(config, name, value)


def difference(old: Config, new: Config) -> list[str]:
    """The settings that differ, each as "model.d_model: 128 -> 256"."""
    before, after = leaves(old), leaves(new)
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
