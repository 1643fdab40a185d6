"""Linear and hybrid models from trained softmax ones: docs/linearize.md."""

from zoo.linearize.transfer import Transfer, same_parameters, settled_width

__all__ = ["Transfer", "same_parameters", "settled_width"]
