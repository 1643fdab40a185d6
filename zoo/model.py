"""The model: embedding, blocks of a mixer and an MLP, norm, and a head (`zoo.heads`); of tokens, a language model.

The pattern of `model.mixer` is the repeating unit. Its parameters are stacked over the depth and the unit is scanned,
and so are layers of the unit that follow each other and are alike, so that compile time does not grow with depth.
Training, prefill and decoding are one call: with a state it continues, for any number of tokens.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from zoo import heads, ops, sharding
from zoo.blocks import Unit, norm_of
from zoo.config import (
    MLP_LAYER,
    ModelConfig,
    pattern,
    refuse,
    unsettled,
    validate_model,
)
from zoo.errors import UsageError
from zoo.heads.base import Batch
from zoo.layers import dropout, embedding, linear
from zoo.mixers import CAUSAL, MIXERS, Sizes
from zoo.mixers.shared_settings import NO_STATE
from zoo.states import State
from zoo.taken import Segments, last

# With a state, so many tokens are bound by what is read: units run one by one, so that each state is updated in place.
FEW_TOKENS = 32
Units = list[tuple[nnx.State, jax.Array, list[jax.Array | None]]]  # of each: parameters, index, `over_depth`


class LanguageModel(nnx.Module):
    """A language model over `config.vocab_size` tokens, causal or, by `config.direction`, bidirectional.

    A bidirectional one has no state, and its logits are those of the token itself, which its input masks. Under another
    head (`config.head`) the same body reads a row for its label, or a series for its next steps: `predict`.

    Attributes:
      tokenizer_size: how many ids the tokenizer has, where the vocabulary is rounded up; `zoo.generate` draws no
        others. `zoo.load_run` sets it; until then it is vocab_size.

    Raises:
      UsageError: settings that make no model; `config.vocab_size`, `classes` and `channels` must be known, as far as
        the head needs them.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        validate_model(config)
        refuse(unsettled(config))
        layers = pattern(config)
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.tokenizer_size = config.vocab_size
        self.causal = config.direction == CAUSAL
        self.dropout, self.learned_positions = config.dropout, config.positions == "learned"
        self.remat, self.unrolled = config.remat, config.unrolled
        families = [layer for layer in dict.fromkeys(layers) if layer != MLP_LAYER]
        self.saved_names = tuple(name for family in families for name in MIXERS[family].saved_names)
        self.pattern, self.num_units = tuple(layers), config.num_layers // len(layers)
        dtype = jnp.dtype(config.dtype)
        # Each layer adds two branches to the residual stream: start with a sum of variance about one (GPT-2).
        branches = 2 * config.num_layers
        sizes = Sizes(
            d_model=config.d_model,
            num_layers=config.num_layers,
            rope=config.positions == "rope",
            norm_epsilon=config.norm_epsilon,
            dtype=dtype,
            output_scale=branches**-0.5,
            direction=config.direction,
            direction_shared=config.direction_shared,
        )
        self.embed: nnx.Module
        if config.channels:
            step = config.patch * config.channels
            self.embed = linear(step, config.d_model, ("patch", "embed"), bias=True, dtype=dtype, rngs=rngs)
        else:
            self.embed = embedding(config.vocab_size, config.d_model, ("vocab", "embed"), dtype=dtype, rngs=rngs)
        if self.learned_positions:
            shape = (config.max_positions, config.d_model)
            self.position_embed = embedding(*shape, ("positions", "embed"), dtype=dtype, rngs=rngs)
        self.embed_norm = norm_of(config, dtype, rngs) if config.embedding_norm else None

        @nnx.split_rngs(splits=self.num_units)
        @nnx.vmap(in_axes=(0, 0), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make_units(rngs, unit_index):
            return Unit(config, sizes, unit_index=unit_index, rngs=rngs)

        self.units = make_units(rngs, jnp.arange(self.num_units))
        self.norm = norm_of(config, dtype, rngs)
        self.head = heads.of(config)(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
        lengths: Int[Array, "B"] | None = None,
        dropout_key: jax.Array | None = None,
        units: Units | None = None,
    ) -> tuple[Float[Array, "B T vocab"], State | None]:
        """The logits of the next token, in float32, and the state after the last.

        Args:
          tokens: ids in [0, vocab_size). Another id makes its logits NaN, and those of tokens beside it: padding is an
            id of the vocabulary too.
          segment_ids: documents of packed rows; a token whose id differs from its left neighbour's starts anew. Prompts
            of different lengths are padded on the left: 0 on the padding, 1 on the prompt.
          positions: of each token in its document; default: counted from the segment's start, or from the state.
          state: of `init_state` or an earlier call. None: from zero, and None comes back.
          lengths: with a state, how many of each row's tokens it takes in, default all. The logits are of all tokens:
            rows of different lengths may be padded on the right, and of a draft that was scored a later call takes in
            what is kept. The next call goes on behind the tokens taken in.
          dropout_key: switches dropout on.
          units: of `units_apart`, with a state.

        Raises:
          ValueError: lengths or units without a state; see `init_state`.
        """
        given = {"segment_ids": segment_ids, "positions": positions, "lengths": lengths, "units": units}
        hidden, state = self.hidden(tokens, **given, state=state, dropout_key=dropout_key)
        return self.logits(hidden), state

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """The head: logits of the next token, float32, from what `hidden` returns (or some of its tokens)."""
        return self._of_tokens().logits(hidden, self.embed)

    def predict(self, batch: Batch) -> jax.Array:
        """What the head says of each row: logits of its classes [B, classes], or the horizon [B, horizon, channels]."""
        return self.head.predict(self._read(batch), batch)

    def batch_losses(
        self,
        batch: Batch,
        *,
        dropout_key: jax.Array | None = None,
        step: Int[Array, ""] | None = None,
        labels: int | None = None,
    ) -> jax.Array:
        """weights * loss of a batch as the head has them (`zoo.heads`); other arguments as in `token_losses`."""
        hidden = self._read(batch, dropout_key=dropout_key, step=step)
        return self.head.losses(hidden, batch, embed=self.embed, labels=labels)

    def batch_scores(self, batch: Batch, *, labels: int | None = None) -> dict[str, jax.Array]:
        """The sums of an evaluation's batch: `zoo.heads`."""
        return self.head.scores(self._read(batch), batch, embed=self.embed, labels=labels)

    def _read(self, batch: Batch, **given: Any) -> jax.Array:
        inputs, segment_ids = self.head.inputs(batch)
        return self.hidden(inputs, segment_ids=segment_ids, **given)[0]

    def token_losses(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        dropout_key: jax.Array | None = None,
        step: Int[Array, ""] | None = None,
        labels: int | None = None,
    ) -> Float[Array, "B T"]:
        """weights * (negative log-likelihood of the targets, in nats); [B * T, vocab] never exists.

        `labels`: no row has more weights above 0; where they are few, the head reads those tokens alone
        (`zoo.labelled`). `step`: of training, for what is drawn anew in its course.
        """
        given = {"positions": positions, "dropout_key": dropout_key, "step": step}
        hidden, _ = self.hidden(tokens, segment_ids=segment_ids, **given)
        of_tokens = {"targets": targets, "weights": weights}
        return self._of_tokens().losses(hidden, of_tokens, embed=self.embed, labels=labels)

    def token_scores(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        labels: int | None = None,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """`token_losses`, and weights * (whether the target is the likeliest token). The logits of `labels` exist."""
        hidden, _ = self.hidden(tokens, segment_ids=segment_ids)
        return self._of_tokens().at_tokens(hidden, targets, weights, self.embed, labels)

    def losses(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """The head: weights * (negative log-likelihood of the targets, in nats), from what `hidden` returns."""
        return self._of_tokens().nats(hidden, targets, weights, self.embed)

    def _of_tokens(self) -> heads.Tokens:
        if not isinstance(self.head, heads.Tokens):
            raise UsageError(f"model.head={self.head.name}: the model predicts no tokens; expected model.head=tokens")
        return self.head

    def hidden(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T patch_C"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
        lengths: Int[Array, "B"] | None = None,
        dropout_key: jax.Array | None = None,
        step: Int[Array, ""] | None = None,
        units: Units | None = None,
    ) -> tuple[Float[Array, "B T D"], State | None]:
        """What the head reads: the last block's output, normed. Arguments as in `__call__` and `token_losses`; a model
        of numbers takes patches of them for `tokens`."""
        if state is not None and not self.causal:
            raise UsageError(NO_STATE)
        if positions is None:
            positions = positions_of(tokens.shape[:2], segment_ids, None if state is None else state["position"])
        new_position = positions[:, -1] + 1
        if state is None and units is not None:
            raise ValueError("units: given without a state; without one, tokens are no loop's")
        if lengths is not None:
            if state is None:
                raise ValueError("lengths: given without a state; it says which tokens a state takes in")
            segment_ids = Segments.of(segment_ids, lengths, tokens.shape[:2])
            new_position = last(positions + 1, segment_ids, state["position"])
        x = self.embedded(tokens, positions)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = sharding.constrain(dropout(x, self.dropout, keys[0]), "batch", "time", None)

        graphdef, first = nnx.graphdef(self.units), None if units is None else units[0][0]
        of_input, input_state = self.on_input(x, segment_ids, None if state is None else state["input"], first)

        def unit(x, per_unit):
            parameters, index, depths, states = per_unit
            key = None if keys[1] is None else jax.random.fold_in(keys[1], index)
            given = {"segment_ids": segment_ids, "positions": positions, "depths": depths, "of_input": of_input}
            how = {"rematerialised": self.rematerialised, "is_unrolled": self._is_unrolled}
            return nnx.merge(graphdef, parameters)(x, states=states, dropout_key=key, **given, **how)

        unrolled = self._is_unrolled(self.num_units)
        scan = functools.partial(jax.lax.scan, unit, unroll=self.num_units if unrolled else 1)
        if state is None:
            x, _ = scan(x, (*self._per_unit(step), [None] * len(self.units.blocks)))
            return self.norm(x), None
        if units is None and not unrolled and tokens.shape[1] > FEW_TOKENS:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *state["layers"])
            x, stacked = scan(x, (*self._per_unit(step), stacked))
            layer_states = [_row(stacked, i) for i in range(self.num_units)]
        else:
            layer_states = []
            for of_unit, states in zip(units or self._apart(step), state["layers"], strict=True):
                x, after = unit(x, (*of_unit, states))
                layer_states.append(after)
        new_state = {"position": new_position, "layers": layer_states, "input": input_state}
        return self.norm(x), new_state

    def units_apart(self) -> Units | None:
        """What whoever calls for one token after another takes first, and gives to each call as `units`.

        On a CPU each unit's part of the stacked parameters, a copy: else XLA makes it in the loop, at every token. On
        others None.
        """
        return self._apart(None) if dispatch.device().platform == "cpu" else None

    def _apart(self, step: Int[Array, ""] | None) -> Units:
        per_unit = self._per_unit(step)
        return [_row(per_unit, i) for i in range(self.num_units)]

    def _per_unit(self, step: Int[Array, ""] | None) -> tuple[nnx.State, jax.Array, list[jax.Array | None]]:
        return nnx.state(self.units), jnp.arange(self.num_units), self.over_depth(step)

    def embedded(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The input of the first block, without dropout."""
        x = self.embed(tokens)
        if self.learned_positions:
            x = x + self.position_embed(positions)
        return x if self.embed_norm is None else self.embed_norm(x)

    def init_state(self, batch_size: int, max_length: int) -> State:
        """The state before the first token.

        `max_length` (tokens of all calls, with padding) bounds the caches of softmax attention: beyond it logits are
        NaN, and a single call of more tokens is a ValueError. A bidirectional model has none: UsageError.
        """
        if not self.causal:
            raise UsageError(NO_STATE)
        dtype = self.embed.dtype
        blocks = self.units.blocks
        layers = [[block.init_state(batch_size, max_length, dtype) for block in blocks] for _ in range(self.num_units)]
        of_input = {
            family: self.units.blocks[i].mixer.init_input_state(batch_size, dtype)
            for family, i in self._readers_of_input().items()
        }
        return {"position": jnp.zeros((batch_size,), jnp.int32), "layers": layers, "input": of_input}

    def _readers_of_input(self) -> dict[str, int]:
        """The families whose layers read the model's input, and the place of the first of them."""
        families = [family for family in dict.fromkeys(self.pattern) if family != MLP_LAYER]
        return {family: self.pattern.index(family) for family in families if MIXERS[family].reads_input}

    def on_input(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        states: Mapping[str, Any] | None,
        first: nnx.State | None = None,
    ) -> tuple[list[jax.Array | None], dict[str, Any]]:
        """What each block gets of the model's input, and the states that it leaves: see `Mixer.on_input`.

        `first`: parameters of the first unit, where they are not to be taken from the stack.
        """
        first = _row(nnx.state(self.units), 0) if first is None else first
        found, after = [None] * len(self.pattern), {}
        for family, i in self._readers_of_input().items():
            block = nnx.merge(nnx.graphdef(self.units.blocks[i]), first["blocks"][i])
            value, after[family] = block.mixer.on_input(
                block.mixer_input(x), segment_ids=segment_ids, state=None if states is None else states[family]
            )
            found = [value if layer == family else other for layer, other in zip(self.pattern, found, strict=True)]
        return found, after

    def over_depth(self, step: jax.Array | None = None) -> list[jax.Array | None]:
        """What the layers of each block get of the whole depth, [units, ...]: see `Mixer.over_depth`."""
        found = [None] * len(self.pattern)
        for family in dict.fromkeys(self.pattern):
            if family == MLP_LAYER:
                continue
            places = [i for i, layer in enumerate(self.pattern) if layer == family]
            layer_index = jnp.arange(self.num_units)[:, None] * len(self.pattern) + jnp.asarray(places)
            mixers = [self.units.blocks[i].mixer for i in places]
            values = mixers[0].over_depth(mixers, layer_index, self.num_units * len(self.pattern), step)
            for place, i in enumerate(places):
                found[i] = None if values is None else values[:, place]
        return found

    def _is_unrolled(self, layers: int) -> bool:
        """Whether so many units, or layers of one that are alike, run one by one. A scan stores what the backward pass
        needs in arrays over all that it scans; what layers compute again, the compiler would find already computed, and
        keep, if they were not scanned."""
        return layers <= self.unrolled and self.remat == "none"

    def rematerialised(self, layer: Callable) -> Callable:
        """`layer`, of which the backward pass keeps what `model.remat` says."""
        policies = jax.checkpoint_policies
        policy = {
            "minimal": _products_saveable,
            "full": policies.nothing_saveable,
            "family": policies.save_only_these_names(*self.saved_names),
        }
        if self.remat == "none":
            return layer
        # The body of a scan needs no barrier; a scan of one unit is no scan once it is compiled.
        return jax.checkpoint(layer, policy=policy[self.remat], prevent_cse=self.num_units == 1)


def _row(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _products_saveable(primitive: Any, *operands, **params) -> bool:
    """A policy of `jax.checkpoint`: keep what projections, fused attention and linear attention made.

    What is left to compute again is elementwise. `jax.checkpoint_policies.dots_with_no_batch_dims_saveable` alone would
    keep nothing here: a function with a gradient of its own, as `zoo.layers.linear` is, comes as one `custom_vjp_call`.
    cuDNN's attention is a primitive, and the results of kernels for Mosaic GPU have a name.
    """
    if primitive.name == "custom_vjp_call":
        return "dot_general" in str(params["call_jaxpr"])
    return (
        primitive.name.startswith("dot_product_attention_fwd")
        or (primitive.name == "name" and params["name"] == dispatch.KERNEL_RESULT)
        or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params)
    )


def positions_of(shape: tuple[int, int], segment_ids: jax.Array | None, start: jax.Array | None) -> jax.Array:
    """Positions of tokens in their segments [B, T]; the first segment goes on at `start` [B], later ones begin at 0."""
    steps = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    start = jnp.zeros(shape[:1], jnp.int32) if start is None else start
    return start[:, None] + steps if segment_ids is None else ops.tokens_since_start(segment_ids, start)
