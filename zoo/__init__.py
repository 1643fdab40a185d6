"""Sequence Zoo: language models whose token mixer is picked by a flag.

As a library (docs/library.md):

    LanguageModel, ModelConfig    a model, and what it is made of
    MIXERS, Sizes                 the mixers by name, as layers of one's own modules
    Config, load_config           a whole run's settings, from a config that comes with the package or from a file
    load_run                      a trained model with its tokenizer
    UsageError                    what was asked for cannot be done; the message says what to do

zoo.generate continues prompts, zoo.training trains. `import zoo` itself is fast: what is named here is imported when
it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels import __version__ as __version__
    from zoo.checkpoints import load_run as load_run
    from zoo.config import Config as Config
    from zoo.config import ModelConfig as ModelConfig
    from zoo.config_files import load_config as load_config
    from zoo.errors import UsageError as UsageError
    from zoo.mixers import MIXERS as MIXERS
    from zoo.mixers import Sizes as Sizes
    from zoo.model import LanguageModel as LanguageModel

_HOME = {
    "LanguageModel": "zoo.model",
    "ModelConfig": "zoo.config",
    "MIXERS": "zoo.mixers",
    "Sizes": "zoo.mixers",
    "Config": "zoo.config",
    "load_config": "zoo.config_files",
    "load_run": "zoo.checkpoints",
    "UsageError": "zoo.errors",
    "__version__": "kernels",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
