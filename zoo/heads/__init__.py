"""Heads by name: what a model predicts, one file each. `base` says what a head is.

`model.head` chooses. The body, from embedding to last norm, is the same under each, so that a language model's serves
the others (`--init_from`).
"""

from zoo.config import ModelConfig
from zoo.errors import UsageError
from zoo.heads.base import Head
from zoo.heads.classes import Classes
from zoo.heads.tokens import Tokens
from zoo.heads.values import Values

HEADS: dict[str, type[Head]] = {"tokens": Tokens, "classes": Classes, "values": Values}


def of(model: ModelConfig) -> type[Head]:
    """The head that `model.head` names."""
    return HEADS[model.head]


def require_tokens(model: ModelConfig, what: str) -> None:
    """UsageError where `what` needs a model of tokens, and this one has another head."""
    if model.head != "tokens":
        raise UsageError(f"{what}: needs model.head=tokens, and the run has model.head={model.head}")


__all__ = ["HEADS", "Head", "Tokens", "of", "require_tokens"]
