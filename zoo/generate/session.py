"""One text in turns: what is said and what the model writes after it, from a state that is kept between them."""

import collections
from collections.abc import Callable, Sequence

import jax

from zoo.checkpoints import Run
from zoo.generate import reading
from zoo.generate.engine import Generation, answer
from zoo.generate.reading import Context
from zoo.generate.request import Request, check, that_may_be_drawn
from zoo.generate.sampling import Sampling
from zoo.generate.text import TextStream

MOST_UNDONE = 8  # turns; each keeps a state


class Session:
    """A text that goes on.

    Attributes:
      context: what stands so far, and the state after it: exactly the text that was said and told.
    """

    def __init__(self, run: Run, context: Context | None = None):
        self._run, self._before = run, collections.deque(maxlen=MOST_UNDONE)
        self.context = context or reading.empty(run.model)
        self._turns = 0

    @property
    def state_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.context.state))

    def turn(
        self,
        said: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        *,
        stops: Sequence[str] = (),
        may_end: bool = True,
        tell: Callable[[str], None] = lambda _: None,
        echo: bool = False,
    ) -> Generation | None:
        """Read `said`, then write up to `max_tokens` tokens (0: none) until a stop string, or the document's end where
        it `may_end`. A first turn begins a document. `tell` is called with text as it is made, before it with what was
        said if that is to `echo`.

        Ctrl-C ends the turn: what was told by then stands.

        Raises:
          UsageError: more tokens than the model has positions for; nothing was read.
        """
        model, tokenizer, before = self._run.model, self._run.tokenizer, self.context
        begin = [] if before.tokens else [tokenizer.separator_id]
        check(model, [Request([*begin, *said], max(max_tokens, 1), sampling, seed)], before)
        stream, written, number = TextStream(tokenizer, said, stops, before.tokens), [], self._turns
        tell(stream.prompt if echo else "")
        self.context = reading.read(model, before, [*begin, *said])
        self._before.append(before)
        self._turns += 1

        def on_token(_: int, token: int) -> bool:
            written.append(token)
            piece, stopped = stream.push(token)
            tell(piece)
            return stopped

        result = None
        try:
            if max_tokens:
                result = answer(
                    model, [Request([], max_tokens, sampling, seed, number=number)], context=self.context,
                    stop_id=tokenizer.separator_id, allowed=that_may_be_drawn(self._run, may_end), on_token=on_token,
                )  # fmt: skip
        finally:
            rest = stream.end()[0] if result is None or result.ended != ["stop"] else ""
            self.context = reading.read(model, self.context, stream.tokens(written))
            tell(rest)
        return result

    def undo(self) -> bool:
        """Go back to before the last turn. False: it is not known any more."""
        if not self._before:
            return False
        self.context, self._turns = self._before.pop(), self._turns - 1
        return True

    def reset(self) -> None:
        """Begin a document."""
        self._before.append(self.context)
        self.context, self._turns = reading.empty(self._run.model), self._turns + 1
