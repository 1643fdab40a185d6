"""Text from a trained model, or a series rolled forward. `python -m zoo.generate` is the command.

In the order of their imports:

    sampling     how a token is drawn
    reading      tokens in, a state out
    decoding     the program that writes
    request      what can be asked for
    engine       prompts in, tokens out: a batch, and a queue for its rows
    text         tokens as text, told once it is certain; stop strings
    prompts      prompts of a command line, and of files
    output       where texts go
    batch        prompts answered as text
    session      one text in turns, its state kept
    state_file   that state in a file
    interactive  turns typed at a terminal
    series       a series that goes on from its state
"""

from zoo.generate.engine import Chance, Generation, answer, generate
from zoo.generate.request import Request
from zoo.generate.sampling import Sampling, sample
from zoo.generate.series import forecast
from zoo.generate.session import Session
from zoo.generate.text import TextStream

__all__ = [
    "Chance",
    "Generation",
    "Request",
    "Sampling",
    "Session",
    "TextStream",
    "answer",
    "forecast",
    "generate",
    "sample",
]
