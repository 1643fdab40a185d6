"""Flags to a config: --config=FILE.py:SIZE or FILE.json, and --config.SECTION.FIELD=VALUE on top of it.

Whatever a user can get wrong here is said in one line, with exit code 2.
"""

import copy
import difflib
import importlib.util
import pathlib
import re
import sys
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from zoo import config as zoo_config
from zoo.config import Config
from zoo.errors import UsageError
from zoo.mixers import MIXERS


def define_and_parse(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Define --config and its overrides, parse all flags, and return what is left of `argv`.

    Raises:
      UsageError: an unknown flag or field, a value of the wrong type, a config file that cannot be used.
    """
    known = list(zoo_config.leaves(Config()))
    for argument in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            if match[1] not in known:
                _unknown_field(match[1], known)
    config_flags.DEFINE_config_dataclass("config", Config(), "", flag_values, sys_argv=argv, parse_fn=load)
    try:
        return flag_values(argv)
    except flags.Error as error:
        # absl wraps what a parser raises: "flag --config=X: message"
        raise UsageError(str(error)) from error


def load(spec: str) -> Config:
    """The config of FILE.py, FILE.py:SIZE or FILE.json (a run's config.json)."""
    path, _, size = spec.partition(":")
    file = pathlib.Path(path)
    if file.suffix not in (".py", ".json"):
        raise UsageError(f"expected FILE.py, FILE.py:SIZE or FILE.json; {_known_files()}")
    if not file.is_file():
        raise UsageError(f"no such file; {_known_files()}")
    if file.suffix == ".json":
        return zoo_config.from_json(file.read_text())
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError("the file has no function get_config(size)")
    return copy.deepcopy(module.get_config(size) if size else module.get_config())


def listing() -> str:
    """Mixers, sizes, config files and every setting with its default."""
    lines = ["Mixers (--config.model.mixer=NAME, or a pattern such as gla,gla,attention):"]
    for name, mixer in MIXERS.items():
        lines.append(f"  {name:18} {sys.modules[mixer.__module__].__doc__.splitlines()[0]}")
    lines += ["", "Sizes (--config=configs/gla.py:SIZE):"]
    for name, size in zoo_config.SIZES.items():
        lines.append(
            f"  {name:18} {size.num_layers} layers of width {size.d_model}, "
            f"{size.batch_size} x {size.context_length} tokens a step"
        )
    lines += [
        "",
        f"Config files: {', '.join(_config_files())}",
        "",
        "Settings (--config.NAME=VALUE) and their defaults:",
    ]
    lines += [f"  {name:40} {value!r}" for name, value in zoo_config.leaves(Config()).items()]
    return "\n".join(lines)


def _config_files() -> list[str]:
    folder = pathlib.Path(__file__).parents[2] / "configs"
    return [f"configs/{file.name}" for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]


def _known_files() -> str:
    return f"known configs: {', '.join(_config_files())}"


def _unknown_field(field: str, known: list[str]) -> NoReturn:
    near = difflib.get_close_matches(field, known, 3, 0.75)
    near += [name for name in known if name.endswith("." + field.rsplit(".", 1)[-1]) and name not in near]
    hint = f"did you mean {' or '.join(near[:4])}?" if near else "train.py --list shows them all"
    raise UsageError(f"unknown config field {field!r}; {hint}")
