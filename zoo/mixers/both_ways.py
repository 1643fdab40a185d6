"""Both ways with mixers that run one way (Schuster and Paliwal 1997; with state-space models arXiv:2401.09417).

    y = f(x) + R g(R x)

R reverses the time, and with it the documents and positions of tokens. g is a mixer of f's family with parameters of
its own, or f itself; then nothing but positions tells a text from its mirror image. The output projections start at
1 / sqrt(2) of their scale, so that the sum starts at the scale of one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import ops
from zoo.errors import UsageError
from zoo.mixers.base import BIDIRECTIONAL, CAUSAL, Mixer, Sizes, positions_or_default
from zoo.mixers.shared_settings import NO_STATE


class BothWays(nnx.Module):
    """Two mixers of a family, in the place of one; see `Mixer` for the methods. It has no state."""

    def __init__(self, family: type[Mixer], config: Any, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        sizes_of_one = dataclasses.replace(sizes, direction=CAUSAL, output_scale=sizes.output_scale * 2**-0.5)
        self.forward = family(config, sizes_of_one, layer_index=layer_index, rngs=rngs)
        self.shared = sizes.direction_shared
        if not self.shared:
            self.backward = family(config, sizes_of_one, layer_index=layer_index, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None, **of_model):
        if state is not None:
            raise UsageError(NO_STATE)
        # Of the model each way gets its own: a pair of `on_input`, and of `over_depth` a pair, or shared one.
        first, last = ({name: value[way] for name, value in of_model.items()} for way in (0, -1))
        positions = positions_or_default(positions, x)
        y, _ = self.forward(x, segment_ids=segment_ids, positions=positions, **first)
        z, _ = self._in_reverse()(
            ops.reversed_time(x), segment_ids=_reversed(segment_ids), positions=_reversed(positions), **last
        )
        return y + ops.reversed_time(z), None

    def _in_reverse(self) -> Mixer:
        return self.forward if self.shared else self.backward

    @staticmethod
    def over_depth(mixers, layer_index, num_layers, step=None):
        ways = [[mixer.forward for mixer in mixers]]
        ways += [] if mixers[0].shared else [[mixer.backward for mixer in mixers]]
        values = [way[0].over_depth(way, layer_index, num_layers, step) for way in ways]
        return None if values[0] is None else jnp.stack(values, axis=2)

    def on_input(self, x, *, segment_ids=None, state=None):
        if state is not None:
            raise UsageError(NO_STATE)
        forward, _ = self.forward.on_input(x, segment_ids=segment_ids)
        backward, _ = self._in_reverse().on_input(ops.reversed_time(x), segment_ids=_reversed(segment_ids))
        return (forward, backward), None

    def init_state(self, batch_size, max_length, dtype):
        raise UsageError(NO_STATE)

    def spread_over_tensor(self):
        return self.forward.spread_over_tensor()


def make_mixer(
    family: type[Mixer], config: Any, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs
) -> Mixer | BothWays:
    """The mixer of a family that sees as `sizes.direction` says."""
    twice = passes(family, sizes.direction) == 2
    make = functools.partial(BothWays, family) if twice else family
    return make(config, sizes, layer_index=layer_index, rngs=rngs)


def _reversed(of_tokens: jax.Array | None) -> jax.Array | None:
    return None if of_tokens is None else ops.reversed_time(of_tokens)


def passes(family: type[Mixer], direction: str) -> int:
    """How often a layer of the family runs over the time."""
    return 2 if direction == BIDIRECTIONAL and family.runs_twice else 1
