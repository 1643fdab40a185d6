"""Prompts in, tokens out: a batch of texts that are written at once, and a queue of those that wait for a place in it.

Each new token is one step from the state that reading left, never a second look at the prefix. A text that ends leaves
its row of the batch to the next one; what a row draws depends on its own key, state and settings alone, so that a text
is the same whatever stands beside it and whenever its turn comes.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo import memory
from zoo.generate import reading
from zoo.generate.decoding import decode, keys, units_apart
from zoo.generate.reading import Context
from zoo.generate.request import PLAIN, Request, check, drawable
from zoo.generate.sampling import Sampling, plan, rows
from zoo.model import LanguageModel
from zoo.states import State

# Tokens made on the device before the host looks: on a CPU a tiny model writes 2 to 3 times faster than with 1, and the
# text still flows.
STEPS_PER_CALL = 16


class Chance(NamedTuple):
    """Log-probabilities of a token, in nats, by the model itself: before penalty, temperature and cuts."""

    chosen: float
    likeliest: tuple[tuple[int, float], ...]  # ids with theirs, the likeliest first


@dataclasses.dataclass
class Generation:
    """What was written, and what it cost. Texts are those of the first prompt, sample by sample, then of the next."""

    tokens: list[list[int]]  # of each text, without its prompt
    ended: list[str]  # how: "separator" (the stop_id), "stop" (on_token said so) or "length"
    chances: list[list[Chance]]  # of each of its tokens, if logprobs were asked for
    compile_seconds: float
    prefill_tokens: int  # of all prompts
    prefill_seconds: float
    decode_tokens: int  # steps times rows: a row that has ended waits for the others of its call
    decode_seconds: float
    state_bytes: int  # of all rows


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = PLAIN,
    *,
    seed: int = 0,
    samples: int = 1,
    **rest: Any,
) -> Generation:
    """Continue each prompt by up to `max_tokens` tokens, `samples` times. `rest` is what `answer` takes.

    The same seed gives the same text, whatever the other prompts are.

    Raises:
      UsageError: as `answer`.
    """
    return answer(model, [Request(prompt, max_tokens, sampling, seed, samples) for prompt in prompts], **rest)


def answer(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    context: Context | None = None,
    batch_size: int | None = None,
    stop_id: int | None = None,
    allowed: np.ndarray | None = None,
    logprobs: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_end: Callable[[int, str, list[int], list[Chance]], None] | None = None,
    skip: Callable[[int], bool] | None = None,
) -> Generation:
    """Write what `requests` ask for.

    Args:
      context: what stands before each prompt, read already.
      batch_size: texts written at once; the others wait for a place. None: all.
      stop_id: ends a text when it is drawn; it is not part of the result.
      allowed: bool [model.vocab_size], the ids that may be drawn; None: all. Whatever it says, ids that no tokenizer
        knows (from `model.tokenizer_size` on) are not drawn.
      logprobs: keep of each token its log-probability, and of so many likeliest ones; None: of none.
      on_token: called with (text, token), a few tokens at a time, texts in turn; True ends that text after this token.
      on_end: called with (text, how, tokens, chances) when a text ends, as `Generation` has them.
      skip: told the number of a text, whether it is left out: nothing is read or drawn for it.

    Raises:
      UsageError: no prompt, an empty one, ids outside the vocabulary, a number outside its range, more tokens than the
        model's learned positions, or nothing that may be drawn.
    """
    check(model, requests, context, batch_size, logprobs)
    return _Batch(model, requests, context, batch_size, stop_id, allowed, logprobs, on_token, on_end, skip).run()


class _Text(NamedTuple):
    """One text that is to be written."""

    number: int
    prompt: int  # the number of its request
    sample: int
    request: Request

    @property
    def place(self) -> int:
        return self.prompt if self.request.number is None else self.request.number


class _Read(NamedTuple):
    """A prompt that was read: a row of what one call left."""

    logits: jax.Array
    state: State
    row: int


class _Batch:
    """Rows of a state, and the texts that have them."""

    def __init__(self, model, requests, context, batch_size, stop_id, allowed, logprobs, on_token, on_end, skip):
        self.model, self.context, self.stop_id = model, context, stop_id
        self.on_token, self.on_end = on_token or (lambda *_: None), on_end or (lambda *_: None)
        texts = [(prompt, sample, r) for prompt, r in enumerate(requests) for sample in range(r.samples)]
        texts = [_Text(number, *text) for number, text in enumerate(texts)]
        self.waiting = collections.deque(text for text in texts if not (skip and skip(text.number)))
        self.rows: list[_Text | None] = [None] * min(batch_size or len(texts), len(self.waiting))
        self.written = np.zeros(len(self.rows), np.int32)  # tokens of each row's text
        self.capacity = _capacity(requests, context)
        self.graphdef, self.parameters = nnx.split(model)
        held = self.parameters, jax.eval_shape(lambda: units_apart(self.graphdef, self.parameters))
        memory.check_state(model, len(self.rows), self.capacity, beside=held)
        self.units = units_apart(self.graphdef, self.parameters)
        self.drawable = jnp.asarray(drawable(model, allowed))
        self.plan = plan((text.request.sampling for text in self.waiting), model.vocab_size)
        self.logprobs = logprobs
        self.read: dict[int, _Read] = {}  # by prompt, while samples of it wait
        self.state = self.logits = self.seen = self.settings = self.keys = None
        self.result = Generation([[] for _ in texts], [""] * len(texts), [[] for _ in texts], 0.0, 0, 0.0, 0, 0.0, 0)

    def run(self) -> Generation:
        if self.context is not None:
            self.context = reading.resized(self.model, self.context, self.capacity)
        while self._fill():
            self._hand_out(self._decode())
        return self.result

    # --- Who comes ----------------------------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Give free rows to texts that wait. False: there is nothing left to write."""
        free = [row for row, text in enumerate(self.rows) if text is None]
        coming = {row: self.waiting.popleft() for row in free[: len(self.waiting)]}
        if coming:
            self._read_prompts({text.prompt: text.request.prompt for text in coming.values()})
            sources = {row: self.read[text.prompt] for row, text in coming.items()}
            wanted = {text.prompt for text in self.waiting}
            self.read = {prompt: read for prompt, read in self.read.items() if prompt in wanted}
            self._place(sources)
            for row, text in coming.items():
                self.rows[row], self.written[row] = text, 0
            self._set_up(coming)
        return any(self.rows)

    def _read_prompts(self, prompts: dict[int, Sequence[int]]) -> None:
        unread = [prompt for prompt in prompts if prompt not in self.read]
        # The first ones are read in one call; those that come later one by one, for few programs.
        together = [unread] if self.state is None and self.context is None else [[prompt] for prompt in unread]
        for group in together:
            logits, state = self._prefill([prompts[prompt] for prompt in group])
            self.read |= {prompt: _Read(logits, state, row) for row, prompt in enumerate(group)}

    def _prefill(self, prompts: list[Sequence[int]]) -> tuple[jax.Array, State]:
        start = time.perf_counter()
        if self.context is None:
            inputs = self.graphdef, self.parameters, *reading.pad(prompts)
            self.result.compile_seconds += _compile(reading.prefill, *inputs, capacity=self.capacity)
            start = time.perf_counter()
            logits, state = jax.block_until_ready(reading.prefill(*inputs, capacity=self.capacity))
        else:
            (prompt,) = prompts
            reading.compile_read(self.model, self.context, len(prompt))
            self.result.compile_seconds += time.perf_counter() - start
            start = time.perf_counter()
            _, state, logits, _ = jax.block_until_ready(reading.read(self.model, self.context, prompt))
        self.result.prefill_tokens += sum(map(len, prompts))
        self.result.prefill_seconds += time.perf_counter() - start
        return logits, state

    def _place(self, sources: dict[int, _Read]) -> None:
        """Put what was read into its rows."""
        is_as_read = [source.row for source in sources.values()] == [*range(len(self.rows))]
        if self.state is None and self.context is None and not self.read and is_as_read:
            self.logits, self.state, _ = sources[0]  # no second copy
            return
        if self.state is None:
            self.state = self.model.init_state(len(self.rows), self.capacity)
            self.logits = jnp.zeros((len(self.rows), self.model.vocab_size), jnp.float32)
        for row, (logits, state, from_row) in sources.items():
            rows = np.int32(row), np.int32(from_row)
            self.state, self.logits = reading.put(self.state, self.logits, logits, state, *rows)

    def _set_up(self, coming: dict[int, _Text]) -> None:
        """Settings, keys, and the ids of prompts where the penalty must know them."""
        vocab_size, texts = self.model.vocab_size, [text or coming[min(coming)] for text in self.rows]
        self.settings = jax.device_put(rows([text.request.sampling for text in texts], vocab_size))
        numbers = np.array([(t.request.seed, t.place, t.sample) for t in texts], np.uint32)
        self.keys = keys(*numbers.T)
        self.result.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        if self.plan.penalty:
            before = self.context.tokens if self.context is not None else ()
            seen = np.zeros((len(texts), vocab_size), bool) if self.seen is None else np.array(self.seen)
            for row, text in coming.items():
                seen[row] = False
                seen[row, [*before, *text.request.prompt]] = True
            if self.stop_id is not None:
                seen[:, self.stop_id] = False
            self.seen = jnp.asarray(seen)

    # --- Tokens -------------------------------------------------------------------------------------------------------

    def _decode(self) -> dict[str, np.ndarray]:
        """The next tokens of every row, [steps, B], and what else was asked for."""
        inputs = self.graphdef, self.parameters, self.units, self.state, self.logits, self.seen
        inputs += (self.drawable, self.settings, self.keys, self.written)
        static = {"plan": self.plan, "logprobs": self.logprobs, "length": STEPS_PER_CALL}
        if not self.result.decode_tokens:
            self.result.compile_seconds += _compile(decode, *inputs, **static)
        start = time.perf_counter()
        self.state, self.logits, self.seen, made = decode(*inputs, **static)
        made = jax.tree.map(np.asarray, made)
        self.result.decode_seconds += time.perf_counter() - start
        self.result.decode_tokens += made["token"].size
        return made

    def _hand_out(self, made: dict[str, np.ndarray]) -> None:
        for row, text in enumerate(self.rows):
            if text is None:
                continue
            ended = self._hand_out_row(text, text.request.max_tokens - self.written[row], made, row)
            if ended:
                self.rows[row], self.result.ended[text.number] = None, ended
                self.on_end(text.number, ended, self.result.tokens[text.number], self.result.chances[text.number])
        self.written += STEPS_PER_CALL

    def _hand_out_row(self, text: _Text, left: int, made: dict[str, np.ndarray], row: int) -> str:
        """How the text ended; "" if it goes on."""
        for step, token in enumerate(made["token"][:left, row].tolist()):
            if token == self.stop_id:
                return "separator"
            self.result.tokens[text.number].append(token)
            if self.logprobs is not None:
                ids, values = (made[name][step, row].tolist() for name in ("ids", "values"))
                chance = Chance(float(made["chosen"][step, row]), tuple(zip(ids, values, strict=True)))
                self.result.chances[text.number].append(chance)
            if self.on_token(text.number, token):
                return "stop"
        return "length" if left <= STEPS_PER_CALL else ""


def _compile(program: Any, *inputs: Any, **static: Any) -> float:
    """The seconds that it took, before the program's call."""
    start = time.perf_counter()
    program.lower(*inputs, **static).compile()
    return time.perf_counter() - start


def _capacity(requests: Sequence[Request], context: Context | None) -> int:
    """Tokens, with padding, that a row may come to hold."""
    longest = max(len(request.prompt) for request in requests)
    calls = -(-max(request.max_tokens for request in requests) // STEPS_PER_CALL)
    if context is None:
        return reading.padded_length(longest) + calls * STEPS_PER_CALL
    return reading.room_for(len(context.tokens) + longest + calls * STEPS_PER_CALL)
