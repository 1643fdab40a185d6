"""Text from a trained model. `python -m zoo.generate` is the command."""

from zoo.generate.sampler import Generation, Sampling, generate, sample

__all__ = ["Generation", "Sampling", "generate", "sample"]
