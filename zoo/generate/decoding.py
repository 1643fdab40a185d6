"""The program that writes: a few tokens of each row of a batch, one step after the other."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.generate.sampling import Plan, Rows, draw, penalise
from zoo.model import Units
from zoo.states import State


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "plan", "logprobs", "length"),
    donate_argnames=("state", "logits", "seen"),
)
def decode(
    graphdef: nnx.GraphDef, parameters: nnx.State, units: Units | None, state: State, logits: jax.Array,
    seen: jax.Array | None,
    drawable: jax.Array, settings: Rows, row_keys: jax.Array, written: jax.Array, *,
    plan: Plan, logprobs: int | None, length: int,
) -> tuple[State, jax.Array, jax.Array | None, dict[str, jax.Array]]:  # fmt: skip
    """`length` further tokens of each row, which has `written` [B] of them.

    Args:
      units: of `units_apart`.
      logits: [B, vocab], of the next token.
      seen: bool [B, vocab], the ids in prompt and text that a penalty is for; None where `plan` has none.
      drawable: bool [vocab].
      row_keys: [B], of `keys`.
      logprobs: how many of the likeliest tokens are told beside the chosen one; None: no log-probabilities.

    Returns:
      state, logits and seen after them, and each token, all [length, B, ...].
    """
    model = nnx.merge(graphdef, parameters)
    every = jnp.arange(row_keys.shape[0])

    def step(carry, t):
        state, logits, seen = carry
        now = jax.vmap(jax.random.fold_in)(row_keys, written + t)
        adjusted = penalise(logits, seen, settings.penalty) if plan.penalty else logits
        token = draw(jnp.where(drawable, adjusted, -jnp.inf), now, settings, plan)
        made = {"token": token}
        if logprobs is not None:
            by_model = jax.nn.log_softmax(logits, axis=-1)
            made["chosen"] = by_model[every, token]
            made["values"], made["ids"] = jax.lax.top_k(by_model, logprobs)
        if plan.penalty:
            seen = seen.at[every, token].set(True)
        logits, state = model(token[:, None], state=state, units=units)
        return (state, logits[:, 0], seen), made

    (state, logits, seen), made = jax.lax.scan(step, (state, logits, seen), jnp.arange(length))
    return state, logits, seen, made


@functools.partial(jax.jit, static_argnames="graphdef")
def units_apart(graphdef: nnx.GraphDef, parameters: nnx.State) -> Units | None:
    """`LanguageModel.units_apart`."""
    return nnx.merge(graphdef, parameters).units_apart()


@jax.jit
def keys(seeds: jax.Array, prompts: jax.Array, samples: jax.Array) -> jax.Array:
    """Of rows, from numbers in uint32 [B]; the first sample's is that of a prompt that has one sample."""

    def key(seed, prompt, sample):
        first = jax.random.fold_in(jax.random.key(seed), prompt)
        other = jax.random.fold_in(first, -sample)  # counted down from 2^32, where no token's number is
        return jax.lax.cond(sample == 0, lambda: first, lambda: other)

    return jax.vmap(key)(seeds, prompts, samples)
