"""The whole config, typed: `sections` has every setting, its unit, its default and its check.

`configs/<name>.py` fill it, flags (`--config.model.mixer=retnet`) override it, `validate` checks it as a whole before
anything is allocated, and `to_json` saves it beside the checkpoints. The section of each family comes from the mixer
registry, and every section is always there, so that any config can swap to any mixer by a flag.
"""

from zoo.config.checks import refuse, unsettled, validate, validate_model
from zoo.config.saved import difference, from_json, leaves, read_json, to_json
from zoo.config.sections import (
    HEAD_CHOICES,
    HOW,
    OPTIMIZERS,
    Config,
    DistillConfig,
    MaskConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
)
from zoo.config.sizes import SIZES, Size, preset
from zoo.config.unit import MLP_LAYER, Place, mlp_class, mlp_width, pattern, places, positions

__all__ = [
    "Config",
    "DistillConfig",
    "HEAD_CHOICES",
    "HOW",
    "MLP_LAYER",
    "MaskConfig",
    "MetricsConfig",
    "ModelConfig",
    "OPTIMIZERS",
    "OptimizerConfig",
    "Place",
    "SIZES",
    "Size",
    "difference",
    "from_json",
    "leaves",
    "mlp_class",
    "mlp_width",
    "pattern",
    "places",
    "positions",
    "preset",
    "read_json",
    "refuse",
    "to_json",
    "unsettled",
    "validate",
    "validate_model",
]
