"""Tokens in, a state out: what is to be continued is read once, and never again.

Prompts of different lengths form one batch, padded on the left with a segment of its own, so each continues as if it
were alone. What goes on from a state is read in pieces of few lengths instead: padding would come between.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.array_typing import Array, Float
from zoo import memory
from zoo.model import LanguageModel
from zoo.states import State, put_rows, take_rows

_SHORTEST_PREFILL, _SMALLEST_ROOM = 32, 256  # tokens
_PIECES = (4096, 512, 64, 8, 1)  # tokens; a program each, and at most 7 calls of one but the first


class Context(NamedTuple):
    """One text that goes on: what was read of it, and the state after that."""

    tokens: tuple[int, ...]
    state: State  # of one row
    logits: Float[Array, "1 vocab"]  # of the next token
    capacity: int  # tokens that its caches have room for


def empty(model: LanguageModel, capacity: int = 1) -> Context:
    """Nothing was read yet. Its logits are no one's: `read` something before a token is drawn."""
    return Context((), model.init_state(1, capacity), jnp.zeros((1, model.vocab_size), jnp.float32), capacity)


def read(model: LanguageModel, context: Context, tokens: Sequence[int]) -> Context:
    """`context` and `tokens` after it; the given one stays what it was."""
    needed = len(context.tokens) + len(tokens)
    if needed > context.capacity:
        memory.check_state(model, 1, room_for(needed))
        context = resized(model, context, room_for(needed))
    graphdef, parameters = nnx.split(model)
    state, logits, first = context.state, context.logits, 0
    for piece in _pieces(len(tokens)):
        part = np.asarray(tokens[first : first + piece], np.int32)[None]
        logits, state = _read(graphdef, parameters, state, part)
        first += piece
    return Context((*context.tokens, *tokens), state, logits, context.capacity)


def compile_read(model: LanguageModel, context: Context, length: int) -> None:
    """The programs by which `read` reads so many tokens into the room that `context` has."""
    graphdef, parameters = nnx.split(model)
    for piece in set(_pieces(length)):
        _read.lower(graphdef, parameters, context.state, np.zeros((1, piece), np.int32)).compile()


def _pieces(length: int) -> Iterator[int]:
    for piece in _PIECES:
        yield from [piece] * (length // piece)
        length %= piece


def room_for(tokens: int) -> int:
    """A capacity of at least so many tokens, one of few: programs are made for a capacity."""
    return max(_SMALLEST_ROOM, 1 << (tokens - 1).bit_length())


def resized(model: LanguageModel, context: Context, capacity: int) -> Context:
    """`context` with caches of `capacity` tokens; what they hold stands at their beginning, in order."""
    wanted = jax.eval_shape(lambda: model.init_state(1, capacity))

    def fitted(leaf, like):
        kept = leaf[tuple(slice(size) for size in like.shape)]
        return jnp.pad(kept, [(0, new - old) for new, old in zip(like.shape, kept.shape, strict=True)])

    return context._replace(state=jax.tree.map(fitted, context.state, wanted), capacity=capacity)


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segment ids and positions [B, T], padded on the left to one of few lengths, for few programs.

    It is one call however long the prompts are: a prompt must not start at the first token of a later call, which
    would continue the padding's state.
    """
    length = padded_length(max(map(len, prompts)))
    tokens, segment_ids, positions = np.zeros((3, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
        positions[row, length - len(prompt) :] = np.arange(len(prompt))  # padding stays at 0, which every table has
    return tokens, segment_ids, positions


def padded_length(longest: int) -> int:
    """Of prompts of at most `longest` tokens."""
    power = max(_SHORTEST_PREFILL, 1 << (longest - 1).bit_length())
    return power if power <= 512 else -(-longest // 512) * 512


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def prefill(
    graphdef: nnx.GraphDef, parameters: nnx.State, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, *,
    capacity: int,
) -> tuple[jax.Array, State]:  # fmt: skip
    """The logits after the prompts [B, vocab], and their state, with room for `capacity` tokens."""
    model = nnx.merge(graphdef, parameters)
    state = model.init_state(tokens.shape[0], capacity)
    hidden, state = model.hidden(tokens, segment_ids=segment_ids, positions=positions, state=state)
    return model.logits(hidden[:, -1:])[:, 0], state


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _read(graphdef: nnx.GraphDef, parameters: nnx.State, state: State, tokens: jax.Array) -> tuple[jax.Array, State]:
    model = nnx.merge(graphdef, parameters)
    hidden, state = model.hidden(tokens, state=state)
    return model.logits(hidden[:, -1:])[:, 0], state


@functools.partial(jax.jit, donate_argnames=("state", "logits"))
def put(
    state: State, logits: jax.Array, from_logits: jax.Array, from_state: State, row: jax.Array, from_row: jax.Array
) -> tuple[State, jax.Array]:
    """A batch whose `row` becomes `from_row` of another."""
    state = put_rows(state, row[None], take_rows(from_state, from_row[None]))
    return state, logits.at[row].set(from_logits[from_row])
