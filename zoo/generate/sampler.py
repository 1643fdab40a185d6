"""Prompts in, tokens out.

Prompts are read once, in one call that leaves a state: recurrent matrices, and keys and values where a layer is softmax
attention. Each new token is then one step from that state, never a second look at the prefix. Prompts of different
lengths form one batch, padded on the left with a segment of its own, so each continues as if it were alone.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.array_typing import Array, Float, Int
from zoo import memory
from zoo.errors import UsageError
from zoo.model import LanguageModel, State

# Tokens made on the device before the host looks: on a CPU a tiny model writes 2 to 3 times faster than with 1, and the
# text still flows.
STEPS_PER_CALL = 16
_SHORTEST_PREFILL = 32  # tokens
# Below it a temperature is 0: logits in float32 are known to about 1e-7 of themselves.
_SMALLEST_TEMPERATURE = 1e-6
_LARGEST_TEMPERATURE = 1e30  # all are equally likely, and float32 still holds it


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: tempered, cut to the top k, cut to the nucleus, in this order.

    Attributes:
      temperature: divides the logits; 0, and what is below 1e-6, takes the largest, of equals the one of lowest id.
      top_k: keep the k likeliest tokens; 0: all.
      top_p: of those, keep the fewest likeliest that hold at least this share of their probability (Holtzman et al.
        2019, arXiv:1904.09751); 1: all.

    Raises:
      UsageError: a temperature below 0, a negative top_k, or a top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UsageError(f"temperature: got {self.temperature}, expected a number of at least 0 (0: the likeliest)")
        if self.top_k < 0:
            raise UsageError(f"top_k: got {self.top_k}, expected a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: got {self.top_p}, expected a share in (0, 1]")


@dataclasses.dataclass
class Generation:
    """What was written, and what it cost."""

    tokens: list[list[int]]  # for each prompt, without it
    compile_seconds: float
    prefill_tokens: int  # of all prompts
    prefill_seconds: float
    decode_tokens: int  # steps times prompts: a row that has stopped waits for the others
    decode_seconds: float
    state_bytes: int  # of all rows


def sample(logits: Float[Array, "B vocab"], keys: Array, sampling: Sampling) -> Int[Array, "B"]:
    """Draw one token a row, each by its own key [B]."""
    if sampling.temperature < _SMALLEST_TEMPERATURE:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The likeliest is at 0, so that a small temperature makes the others -inf, and none of them inf or NaN.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / min(sampling.temperature, _LARGEST_TEMPERATURE)
    draw = jax.vmap(jax.random.categorical)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return draw(keys, logits).astype(jnp.int32)
    size = logits.shape[-1]
    logits, ids = jax.lax.top_k(logits, min(sampling.top_k or size, size))  # descending
    if sampling.top_p < 1:
        probability = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # held by likelier tokens
        in_nucleus = (before < sampling.top_p).at[:, 0].set(True)  # float32 takes a share below 1e-38 for 0
        logits = jnp.where(in_nucleus, logits, -jnp.inf)
    return jnp.take_along_axis(ids, draw(keys, logits)[:, None], axis=-1)[:, 0].astype(jnp.int32)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    seed: int = 0,
    stop_id: int | None = None,
    allowed: np.ndarray | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue each prompt by up to `max_tokens` tokens.

    Token t of row r is drawn with the key (seed, r, t): the same seed gives the same text, whatever the other rows are.

    Args:
      prompts: token ids, at least one a prompt (the separator alone begins a document).
      stop_id: ends a row when it is drawn; it is not part of the result.
      allowed: bool [model.vocab_size], the ids that may be drawn; None: all. Whatever it says, ids that no tokenizer
        knows (from `model.tokenizer_size` on) are not drawn.
      on_token: called with (row, token), a few tokens at a time, rows in turn.

    Raises:
      UsageError: no prompt, an empty one, ids outside the vocabulary, a max_tokens below 1, more tokens than the
        model's learned positions, or nothing that may be drawn.
    """
    check_request(model, prompts, max_tokens)
    rows, calls = len(prompts), -(-max_tokens // STEPS_PER_CALL)
    inputs = _pad(prompts)
    capacity = inputs[0].shape[1] + calls * STEPS_PER_CALL
    drawable = jnp.asarray(_allowed(model, allowed))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    graphdef, parameters = nnx.split(model)

    start = time.perf_counter()
    _prefill.lower(graphdef, parameters, *inputs, capacity=capacity).compile()
    compiled = time.perf_counter()
    logits, state = jax.block_until_ready(_prefill(graphdef, parameters, *inputs, capacity=capacity))
    prefilled = time.perf_counter()
    rest = {"sampling": sampling, "length": STEPS_PER_CALL}
    _decode.lower(graphdef, parameters, state, logits, drawable, keys, jnp.asarray(0), **rest).compile()
    decoding = time.perf_counter()
    result = Generation(
        tokens=[[] for _ in prompts],
        compile_seconds=compiled - start + decoding - prefilled,
        prefill_tokens=sum(map(len, prompts)),
        prefill_seconds=prefilled - compiled,
        decode_tokens=0,
        decode_seconds=0.0,
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    )

    open_rows = set(range(rows))
    for call in range(calls):
        first = call * STEPS_PER_CALL
        begin = time.perf_counter()
        state, logits, made = _decode(graphdef, parameters, state, logits, drawable, keys, jnp.asarray(first), **rest)
        made = np.asarray(made)  # [steps, B]
        result.decode_seconds += time.perf_counter() - begin
        result.decode_tokens += made.size
        for row in sorted(open_rows):
            for token in made[: max_tokens - first, row].tolist():
                if token == stop_id:
                    open_rows.remove(row)
                    break
                result.tokens[row].append(token)
                if on_token is not None:
                    on_token(row, token)
        if not open_rows:
            break
    return result


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(
    graphdef: nnx.GraphDef, parameters: nnx.State, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, *,
    capacity: int,
) -> tuple[jax.Array, State]:  # fmt: skip
    """The logits after the prompts [B, vocab], and their state, with room for `capacity` tokens."""
    model = nnx.merge(graphdef, parameters)
    state = model.init_state(tokens.shape[0], capacity)
    hidden, state = model.hidden(tokens, segment_ids=segment_ids, positions=positions, state=state)
    return model.logits(hidden[:, -1:])[:, 0], state


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "length"), donate_argnames=("state", "logits"))
def _decode(
    graphdef: nnx.GraphDef, parameters: nnx.State, state: State, logits: jax.Array, allowed: jax.Array, keys: jax.Array,
    first: jax.Array, *, sampling: Sampling, length: int,
) -> tuple[State, jax.Array, jax.Array]:  # fmt: skip
    """Tokens `first` to `first + length` of each row: [length, B]."""
    model = nnx.merge(graphdef, parameters)

    def step(carry, t):
        state, logits = carry
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        token = sample(jnp.where(allowed, logits, -jnp.inf), now, sampling)
        logits, state = model(token[:, None], state=state)
        return (state, logits[:, 0]), token

    (state, logits), tokens = jax.lax.scan(step, (state, logits), first + jnp.arange(length))
    return state, logits, tokens


def _pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segment ids and positions [B, T], padded on the left to one of few lengths, for few programs.

    It is one call however long the prompts are: a prompt must not start at the first token of a later call, which
    would continue the padding's state.
    """
    longest = max(map(len, prompts))
    power = max(_SHORTEST_PREFILL, 1 << (longest - 1).bit_length())
    length = power if power <= 512 else -(-longest // 512) * 512
    tokens, segment_ids, positions = np.zeros((3, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
        positions[row, length - len(prompt) :] = np.arange(len(prompt))  # padding stays at 0, which every table has
    return tokens, segment_ids, positions


def _allowed(model: LanguageModel, allowed: np.ndarray | None) -> np.ndarray:
    known = np.arange(model.vocab_size) < model.tokenizer_size
    if allowed is None:
        return known
    if np.shape(allowed) != known.shape:
        raise UsageError(f"allowed: got the shape {np.shape(allowed)}, expected ({model.vocab_size},): one bool an id")
    if not (known & allowed).any():
        raise UsageError("allowed: no id that the tokenizer knows is left; allow at least one")
    return known & np.asarray(allowed, bool)


def check_request(model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """UsageError if `model` cannot continue `prompts` by `max_tokens` tokens."""
    if max_tokens < 1:
        raise UsageError(f"max_tokens: got {max_tokens}, expected at least 1")
    if not prompts:
        raise UsageError("prompt: got none, expected at least one")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UsageError(f"prompt {row}: no tokens; the separator alone begins a document")
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise UsageError(
                f"prompt {row}: token ids from {min(prompt)} to {max(prompt)}, expected 0 to {model.vocab_size - 1}; "
                "use the model's own tokenizer"
            )
        if model.learned_positions and len(prompt) + max_tokens > model.max_positions:
            raise UsageError(
                f"prompt {row}: its {len(prompt)} tokens and max_tokens = {max_tokens} exceed the model's "
                f"{model.max_positions} learned positions; shorten the prompt, or lower max_tokens"
            )
    memory.check_state(model, len(prompts), max(map(len, prompts)) + max_tokens)
