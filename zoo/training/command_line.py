"""Flags to a config: --config=NAME:SIZE, FILE.py:SIZE or FILE.json, and --config.SECTION.FIELD=VALUE on top of it.

Whatever a user can get wrong here is said in one line, with exit code 2.
"""

import re
import sys

import jax
from absl import flags
from ml_collections import config_flags

from zoo import config as zoo_config
from zoo import config_files, data, flops, memory
from zoo.config import Config, pattern
from zoo.errors import UsageError
from zoo.mixers import MIXERS
from zoo.settings import Setting, declarations, shown, suggestions
from zoo.training import aot, placement
from zoo.training.workdir import settle_vocabulary


def define_and_parse(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Define --config and its overrides, parse all flags, and return what is left of `argv`.

    Raises:
      UsageError: an unknown flag or field, a value of the wrong type, a config file that cannot be used.
    """
    argv, parser = _read_overrides(argv), config_files.load_config
    config_flags.DEFINE_config_dataclass("config", Config(), "", flag_values, sys_argv=argv, parse_fn=parser)
    try:
        return flag_values(argv)
    except flags.Error as error:
        # absl wraps what a parser raises: "flag --config=X: message"
        raise UsageError(str(error)) from error


def _read_overrides(argv: list[str]) -> list[str]:
    """`argv` with each --config.NAME=VALUE as its declaration reads it (1e3 steps are 1000), after all other flags."""
    known, others, overrides = dict(declarations(Config)), [], []
    end = argv.index("--") if "--" in argv else len(argv)
    left = argv[:end]
    while left:
        argument = left.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            others.append(argument)
            continue
        no, name, value = match.groups()
        if name not in known:
            raise UsageError(_unknown(name, known))
        setting = known[name]
        if setting.kind is bool and value is None:
            value = "False" if no else "True"
        elif no:
            raise UsageError(f"{shown(argument)}: only a setting that is True or False takes `no`, and no value")
        elif value is None and (not left or left[0].startswith("--")):
            raise UsageError(f"--config.{name}: the value is missing; {setting.describe()}")
        elif value is None:
            value = left.pop(0)
        try:
            overrides.append(f"--config.{name}={setting.read(value)}")
        except ValueError as error:
            raise UsageError(f"--config.{name}: {error}") from error
    return others + overrides + argv[end:]


def listing() -> str:
    """Mixers, sizes, config files and every setting."""
    lines = ["Mixers (--config.model.mixer=NAME, or a pattern such as gla,gla,attention), and model.direction of each:"]
    for name, mixer in MIXERS.items():
        directions = "both" if len(mixer.directions) == 2 else mixer.directions[0]
        lines.append(f"  {name:20} {directions:13} {sys.modules[mixer.__module__].__doc__.splitlines()[0]}")
    lines += ["", "Sizes (--config=gla:SIZE):"]
    for name, size in zoo_config.SIZES.items():
        lines.append(
            f"  {name:18} {size.num_layers} layers of width {size.d_model}, "
            f"{size.batch_size} x {size.context_length} tokens a step"
        )
    lines += ["", f"Configs: {', '.join(config_files.shipped())}", "", settings_listing()]
    return "\n".join(lines)


def settings_listing() -> str:
    """Every setting: its default, what it is, its unit, its range or choices."""
    lines = ["Settings (--config.NAME=VALUE), their defaults, and what they are:"]
    return "\n".join(lines + [_row(name, declared.default, declared) for name, declared in declarations(Config)])


def config_listing(config: Config, workdir: str = "") -> str:
    """What a config is and costs: its parameters, memory and FLOPs, and its settings beside the defaults.

    `workdir`: of the run whose tokenizer counts, if it stands there.

    Raises:
      UsageError: a setting that is wrong, a tokenizer that cannot be read.
    """
    zoo_config.validate(config)
    config = settle_vocabulary(config, workdir or None)
    model, length = config.model, config.train.context_length
    labels = data.labels(config, training=True)
    forward, train = (f(model, length, labels) for f in (flops.forward_flops_per_token, flops.train_flops_per_token))
    needed = memory.training(config)
    lines = [
        f"model       {model.mixer}, {model.num_layers} layers of width {model.d_model}, vocabulary {model.vocab_size}",
        f"parameters  {flops.num_parameters(model):,}",
        f"memory      {memory.amount(sum(needed))} to train, at least: {needed}",
        f"FLOPs       {train:.3g} a token to train, {forward:.3g} forward, in contexts of {length} tokens",
        f"run         {config.train.steps:,} steps of {config.train.batch_size * length:,} tokens",
        "",
        "Settings (* not the default), and what they are; of families, those of the pattern:",
    ]
    values, other = zoo_config.leaves(config), {f"model.{name}." for name in MIXERS if name not in pattern(model)}
    return "\n".join(
        lines
        + [
            _row(name, values[name], declared)
            for name, declared in declarations(Config)
            if not name.startswith(tuple(other))
        ]
    )


def dry_run(config: Config, workdir: str = "", devices: int = 0) -> str:
    """How a run lies on its mesh: `zoo.training.placement.dry_run`. `workdir`: as in `config_listing`."""
    zoo_config.validate(config)
    return placement.dry_run(settle_vocabulary(config, workdir or None), devices)


def ahead_of_time(config: Config, workdir: str, topology: str) -> tuple[str, str]:
    """The report of `zoo.training.aot`, and what is wrong where it does not fit. `workdir`: as in `config_listing`.

    Raises:
      UsageError: a setting that is wrong, a topology that is not known, a mesh that does not fit it.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and an accelerator that is there may be in use
    zoo_config.validate(config)
    config = settle_vocabulary(config, workdir or None)
    report = aot.compile_step(config, topology)
    return aot.describe(config, report), "" if report.fits else f"{topology}: {aot.statement(report)}"


def _row(name: str, value: object, declared: Setting) -> str:
    return f"{' ' if value == declared.default else '*'} {name:36} {shown(value, 200):12} {declared.describe()}"


def _unknown(name: str, known: dict[str, Setting]) -> str:
    inside = [field for field in known if field.startswith(name + ".")]
    near = suggestions(name, known)
    if inside:
        hint = f"it is a section, of {', '.join(inside[:4])}" + (", ..." if len(inside) > 4 else "")
    else:
        hint = f"did you mean {' or '.join(near)}?" if near else "--list shows them all"
    return f"unknown config field {shown(name)}; {hint}"
