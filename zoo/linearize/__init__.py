"""Linear and hybrid models from trained softmax ones: docs/linearize.md."""

from zoo.linearize.distill import Distillation, new_parameters, trainable_names
from zoo.linearize.transfer import Transfer, same_parameters, settled_width

__all__ = ["Distillation", "Transfer", "new_parameters", "same_parameters", "settled_width", "trainable_names"]
