"""How a token is drawn from logits.

A batch may hold texts of different settings: their numbers are arrays of a row each, and only what has to be computed
at all (`Plan`) makes another program. Noise is drawn for each id of the vocabulary by the row's own key, so that what a
row draws depends on its key, its logits and its settings alone.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.array_typing import Array, Bool, Float, Int
from zoo.errors import UsageError
from zoo.settings import problems, setting

# Below it a temperature is 0: logits in float32 are known to about 1e-7 of themselves.
_SMALLEST_TEMPERATURE = 1e-6
_LARGEST_TEMPERATURE = 1e30  # all are equally likely, and float32 holds its inverse


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Penalised, tempered, cut to the top k, cut to the nucleus, cut to min_p, in this order; then drawn.

    temperature divides the logits; 0, and what is below 1e-6, takes the largest, of equals the one of lowest id. top_k
    keeps the k likeliest tokens. top_p keeps of those the fewest likeliest that hold at least this share of their
    probability (Holtzman et al. 2019, arXiv:1904.09751). min_p keeps tokens at least this many times as probable as the
    likeliest (Nguyen et al. 2024, arXiv:2407.01082). repetition_penalty divides the logit of every id that stands in
    prompt or text, however often, where it is above 0, and multiplies it below 0 (Keskar et al. 2019, arXiv:1909.05858,
    which divides alone; as it is used, for logits of either sign); below 1 it is a reward. The id that ends a text is
    spared, or the separator that begins a prompt would put the end off.

    Raises:
      UsageError: a number outside its range.
    """

    temperature: float = setting(1.0, "divides the logits; 0: always the likeliest token", at_least=0)
    top_k: int = setting(0, "draw from the k likeliest tokens", zero="all")
    top_p: float = setting(1.0, "draw from the likeliest that hold this share of probability", above=0, at_most=1)
    min_p: float = setting(0.0, "draw no token below this share of the likeliest's probability", at_least=0, at_most=1)
    repetition_penalty: float = setting(
        1.0, "divides logits above 0, and multiplies those below, of ids in prompt and text; 1: none",
        at_least=1e-6, at_most=1e6,
    )  # fmt: skip

    def __post_init__(self):
        if found := problems(self):
            raise UsageError(found[0])

    @property
    def greedy(self) -> bool:
        return self.temperature < _SMALLEST_TEMPERATURE


class Plan(NamedTuple):
    """What a program must compute for some of its rows; what none needs is left out."""

    draws: bool  # not all rows are greedy
    candidates: int  # how many of the likeliest tokens are ranked; 0: no row cuts by rank
    nucleus: bool
    min_p: bool
    penalty: bool


class Rows(NamedTuple):
    """The settings of each row, [B]."""

    temperature: Float[Array, "B"]  # 0: greedy
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    log_min_p: Float[Array, "B"]
    penalty: Float[Array, "B"]


def plan(samplings: Iterable[Sampling], vocab_size: int) -> Plan:
    """What suffices for all of `samplings`."""
    samplings = list(samplings)
    drawn = [s for s in samplings if not s.greedy]
    ranks = max((s.top_k or vocab_size for s in drawn), default=0)
    return Plan(
        draws=bool(drawn),
        candidates=min(ranks, vocab_size) if any(s.top_k or s.top_p < 1 for s in drawn) else 0,
        nucleus=any(s.top_p < 1 for s in drawn),
        min_p=any(s.min_p > 0 for s in drawn),
        penalty=any(s.repetition_penalty != 1 for s in samplings),
    )


def rows(samplings: Sequence[Sampling], vocab_size: int) -> Rows:
    def of_each(number, dtype):
        return np.array([number(s) for s in samplings], dtype)

    return Rows(
        temperature=of_each(lambda s: 0 if s.greedy else min(s.temperature, _LARGEST_TEMPERATURE), np.float32),
        top_k=of_each(lambda s: min(s.top_k or vocab_size, vocab_size), np.int32),
        top_p=of_each(lambda s: s.top_p, np.float32),
        log_min_p=of_each(lambda s: math.log(s.min_p) if s.min_p > 0 else -math.inf, np.float32),
        penalty=of_each(lambda s: s.repetition_penalty, np.float32),
    )


def sample(logits: Float[Array, "B vocab"], keys: Array, sampling: Sampling) -> Int[Array, "B"]:
    """Draw one token a row, each by its own key [B]. The penalty is `penalise`, which needs to know the text."""
    size = logits.shape[-1]
    return draw(logits, keys, rows([sampling] * len(logits), size), plan([sampling], size))


def penalise(
    logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"], penalty: Float[Array, "B"]
) -> Float[Array, "B vocab"]:
    """The logits with `Sampling.repetition_penalty` on the ids that were `seen`."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Float[Array, "B vocab"], keys: Array, rows: Rows, plan: Plan) -> Int[Array, "B"]:
    """One token a row, from logits that are penalised already."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not plan.draws:
        return likeliest
    greedy = rows.temperature == 0
    # The likeliest is at 0, so that a small temperature makes the others -inf, and none of them inf or NaN.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.where(greedy, 1.0, rows.temperature)[:, None]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    ids = None
    if plan.candidates:
        logits, ids = jax.lax.top_k(logits, plan.candidates)  # descending
        noise = jnp.take_along_axis(noise, ids, axis=-1)
        logits = jnp.where(jnp.arange(plan.candidates) < rows.top_k[:, None], logits, -jnp.inf)
    if plan.nucleus:
        probability = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # held by likelier tokens
        top_p = rows.top_p[:, None]
        in_nucleus = ((before < top_p) | (top_p == 1)).at[:, 0].set(True)  # float32 takes a share below 1e-38 for 0
        logits = jnp.where(in_nucleus, logits, -jnp.inf)
    if plan.min_p:
        logits = jnp.where(logits >= rows.log_min_p[:, None], logits, -jnp.inf)
    token = jnp.argmax(logits + noise, axis=-1)
    if ids is not None:
        token = jnp.take_along_axis(ids, token[:, None], axis=-1)[:, 0]
    return jnp.where(greedy, likeliest, token.astype(jnp.int32))
