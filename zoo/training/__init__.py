"""The trainer: `train(config, workdir)`."""

from zoo.training.loop import train

__all__ = ["train"]
