"""What was written as text: told as soon as it is certain, and ended by stop strings.

A stop string may begin in one token and end in a later one. Text is held back while it may still be the beginning of
one, so that what was told is never taken back.
"""

from collections.abc import Sequence

from zoo.data.tokenizer import Tokenizer
from zoo.errors import UsageError
from zoo.settings import shown

_NEIGHBOURS = 16  # tokens, of which how a text is spelt may depend
MAX_STOPS, MAX_STOP_LENGTH = 100, 10_000  # strings, characters


class StopStrings:
    """Looks for strings in a text that comes in pieces; where they are cut does not matter.

    The one that is complete first ends the text, of several that end together the longest; the text ends before it.

    Raises:
      UsageError: an empty string, or too much of them.
    """

    def __init__(self, stops: Sequence[str]):
        check_stops(stops)
        self._stops, self._held = tuple(stops), ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended it."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with, and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next(size for size in range(longest, -1, -1) if stop.startswith(text[len(text) - size :]))


def check_stops(stops: Sequence[str]) -> None:
    if "" in stops:
        raise UsageError("stop: got an empty string, which stands everywhere; give the text that is to end the text")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        longest = max(stops, key=len)
        raise UsageError(
            f"stop: got {len(stops)} strings, the longest {shown(longest)} of {len(longest)} characters; expected at "
            f"most {MAX_STOPS}, of at most {MAX_STOP_LENGTH:,} characters"
        )


class TextStream:
    """The text of tokens that follow a prompt.

    Attributes:
      prompt: the prompt's text; a character that begins in it and is not complete belongs to what follows.
      text: what was told of the text so far, all of it when `push` or `end` said that it is over.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = (), before: Sequence[int] = ()
    ):
        """`before`: tokens that stand before the prompt, and are not part of it."""
        self._tokenizer, self._decoder, self._stops = tokenizer, tokenizer.stream_decoder(), StopStrings(stops)
        for token in before[-_NEIGHBOURS:]:
            self._decoder.push(token)
        self._decoder.flush()
        self.prompt = "".join(map(self._decoder.push, prompt))
        self.text = ""
        self._decoded = [0]  # characters after each number of tokens

    def push(self, token: int) -> tuple[str, bool]:
        """What is certain now, and whether a stop string ended the text."""
        return self._tell(self._decoder.push(token))

    def end(self) -> tuple[str, bool]:
        """The rest, when no token comes any more, and whether it held a stop string."""
        piece, stopped = self._tell(self._decoder.flush())
        held = self._stops.flush()  # nothing if one was found
        self.text += held
        return piece + held, stopped

    def tokens(self, tokens: Sequence[int]) -> list[int]:
        """Those of `tokens`, as they were pushed, that make up the text; what a stop string cut off in the middle of
        one is encoded anew."""
        size = max(size for size in self._decoded if size <= len(self.text))
        rest = self.text[size:]
        whole = self._decoded.index(size) if rest or size < self._decoded[-1] else len(self._decoded)
        return [*tokens[:whole], *(self._tokenizer.encode(rest).tolist() if rest else ())]

    def _tell(self, decoded: str) -> tuple[str, bool]:
        self._decoded.append(self._decoded[-1] + len(decoded))
        piece, stopped = self._stops.push(decoded)
        self.text += piece
        return piece, stopped
