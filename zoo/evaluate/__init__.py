"""How good a model is. `python -m zoo.evaluate` is the command; `tasks` lists what it can measure."""

from zoo.evaluate.perplexity import perplexity

__all__ = ["perplexity"]
