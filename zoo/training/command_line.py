"""Flags to a config: --config=NAME:SIZE, FILE.py:SIZE or FILE.json, and --config.SECTION.FIELD=VALUE on top of it.

Whatever a user can get wrong here is said in one line, with exit code 2.
"""

import difflib
import re
import sys
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from zoo import config as zoo_config
from zoo import config_files
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
    parser = config_files.load_config
    config_flags.DEFINE_config_dataclass("config", Config(), "", flag_values, sys_argv=argv, parse_fn=parser)
    try:
        return flag_values(argv)
    except flags.Error as error:
        # absl wraps what a parser raises: "flag --config=X: message"
        raise UsageError(str(error)) from error


def listing() -> str:
    """Mixers, sizes, config files and every setting with its default."""
    lines = ["Mixers (--config.model.mixer=NAME, or a pattern such as gla,gla,attention):"]
    for name, mixer in MIXERS.items():
        lines.append(f"  {name:18} {sys.modules[mixer.__module__].__doc__.splitlines()[0]}")
    lines += ["", "Sizes (--config=gla:SIZE):"]
    for name, size in zoo_config.SIZES.items():
        lines.append(
            f"  {name:18} {size.num_layers} layers of width {size.d_model}, "
            f"{size.batch_size} x {size.context_length} tokens a step"
        )
    lines += [
        "",
        f"Configs: {', '.join(config_files.shipped())}",
        "",
        "Settings (--config.NAME=VALUE) and their defaults:",
    ]
    lines += [f"  {name:40} {value!r}" for name, value in zoo_config.leaves(Config()).items()]
    return "\n".join(lines)


def _unknown_field(field: str, known: list[str]) -> NoReturn:
    near = difflib.get_close_matches(field, known, 3, 0.75)
    near += [name for name in known if name.endswith("." + field.rsplit(".", 1)[-1]) and name not in near]
    hint = f"did you mean {' or '.join(near[:4])}?" if near else "--list shows them all"
    raise UsageError(f"unknown config field {field!r}; {hint}")
