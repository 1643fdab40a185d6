"""What can be asked for: a prompt, and what is to follow it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from zoo.checkpoints import Run
from zoo.errors import UsageError
from zoo.generate.reading import Context
from zoo.generate.sampling import Sampling
from zoo.model import LanguageModel
from zoo.settings import declarations, declare

_OF_A_TEXT = {
    "max_tokens": declare(200, "tokens to write at most, a text", unit="token"),
    "samples": declare(1, "texts to write, a prompt; it is read once"),
    "seed": declare(0, "of the draws", at_least=0, at_most=2**32 - 1),
}
SETTINGS = _OF_A_TEXT | dict(declarations(Sampling))  # of flags, and of each line of a file of prompts
PLAIN = Sampling()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and what is to follow it.

    Attributes:
      prompt: token ids, at least one (the separator alone begins a document); none if a context stands before it.
      max_tokens: of each text.
      samples: how many texts; the prompt is read once.
      seed: token t of sample s of prompt p is drawn with the key (seed, p, s, t), all counted from 0.
      number: p; None: its place among the requests.

    Raises:
      UsageError: a number outside its range.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = PLAIN
    seed: int = 0
    samples: int = 1
    number: int | None = None

    def __post_init__(self):
        for name, declared in _OF_A_TEXT.items():
            if problem := declared.problem(getattr(self, name)):
                raise UsageError(f"{name}: {problem}")


def check(
    model: LanguageModel,
    requests: Sequence[Request],
    context: Context | None = None,
    batch_size: int | None = None,
    logprobs: int | None = None,
) -> None:
    """UsageError if `model` cannot do what is asked for."""
    if not requests:
        raise UsageError("prompt: got none, expected at least one")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size: got {batch_size}, expected at least 1 text")
    if logprobs is not None and not 0 <= logprobs <= model.vocab_size:
        raise UsageError(f"logprobs: got {logprobs}, expected a number of tokens from 0 to {model.vocab_size}, or None")
    before = len(context.tokens) if context is not None else 0
    for number, request in enumerate(requests):
        prompt, tokens = request.prompt, before + len(request.prompt)
        if tokens == 0:
            raise UsageError(f"prompt {number}: no tokens; the separator alone begins a document")
        if len(prompt) and (min(prompt) < 0 or max(prompt) >= model.vocab_size):
            raise UsageError(
                f"prompt {number}: token ids from {min(prompt)} to {max(prompt)}, expected 0 to "
                f"{model.vocab_size - 1}; use the model's own tokenizer"
            )
        if model.learned_positions and tokens + request.max_tokens > model.max_positions:
            raise UsageError(
                f"prompt {number}: its {tokens} tokens and max_tokens = {request.max_tokens} exceed the model's "
                f"{model.max_positions} learned positions; shorten the prompt, or lower max_tokens"
            )


def drawable(model: LanguageModel, allowed: np.ndarray | None) -> np.ndarray:
    """Bool [model.vocab_size]: the ids that may be drawn, which are allowed and known to the tokenizer."""
    known = np.arange(model.vocab_size) < model.tokenizer_size
    if allowed is None:
        return known
    if np.shape(allowed) != known.shape:
        raise UsageError(f"allowed: got the shape {np.shape(allowed)}, expected ({model.vocab_size},): one bool an id")
    if not (known & allowed).any():
        raise UsageError("allowed: no id that the tokenizer knows is left; allow at least one")
    return known & np.asarray(allowed, bool)


def that_may_be_drawn(run: Run, may_end: bool) -> np.ndarray:
    """Bool [model.vocab_size]: all ids, the separator only where a text may end."""
    ids = np.ones(run.model.vocab_size, bool)
    ids[run.tokenizer.separator_id] = may_end
    return ids
