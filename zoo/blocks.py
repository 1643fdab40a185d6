"""What is repeated over the depth: a block of a mixer and an MLP, and the unit of blocks that the pattern says."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import sharding
from zoo.config import MLP_LAYER, ModelConfig, Place, mlp_class, mlp_width, places
from zoo.layers import NORMS, dropout
from zoo.mixers import MIXERS, Sizes, make_mixer
from zoo.mixers.shared_settings import add_bias, projections


def norm_of(config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    return NORMS[config.norm](config.d_model, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); a layer named `mlp`, or a model without MLPs, has one of the two.

    `model.norm_position` may put the norms after the mixer and the MLP (arXiv:2501.00656), or on both sides
    (2408.00118).
    """

    def __init__(self, place: Place, config: ModelConfig, sizes: Sizes, *, layer_index: jax.Array, rngs: nnx.Rngs):
        self.dropout = config.dropout
        d_ff = mlp_width(config, place)
        self.has_mixer, self.has_mlp = place.family != MLP_LAYER, d_ff > 0
        self.norm_before, self.norm_after = config.norm_position != "after", config.norm_position != "before"
        norm = functools.partial(norm_of, config, sizes.dtype, rngs)
        if self.has_mixer:
            self.mixer_norm = norm() if self.norm_before else None
            family = MIXERS[place.family]
            self.mixer = make_mixer(family, place.settings, sizes, layer_index=layer_index, rngs=rngs)
            self.mixer_post_norm = norm() if self.norm_after else None
        if self.has_mlp:
            self.mlp_norm = norm() if self.norm_before else None
            scale = {"init_scale": sizes.output_scale, "dtype": sizes.dtype, "rngs": rngs}
            self.mlp = mlp_class(config)(config.d_model, d_ff, **scale)
            for projection in projections(self.mlp).values() if config.mlp_bias else ():
                add_bias(projection)
            self.mlp_post_norm = norm() if self.norm_after else None

    def __call__(self, x, *, segment_ids, positions, state, dropout_key, depth, of_input):
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        before = {"mixer": None, "mlp": None} if state is None else state
        after = dict(before)
        if self.has_mixer:
            given = {"segment_ids": segment_ids, "positions": positions, "depth": depth, "of_input": of_input}
            y, after["mixer"] = self.mixed(x, state=before["mixer"], **given)
            x = x + dropout(y, self.dropout, keys[0])
        if self.has_mlp:
            y, after["mlp"] = self.transformed(x, segment_ids=segment_ids, state=before["mlp"])
            x = x + dropout(y, self.dropout, keys[1])
        return sharding.constrain(x, "batch", "time", None), None if state is None else after

    def mixed(self, x, *, segment_ids=None, positions=None, state=None, depth=None, of_input=None):
        """What the mixer adds to x, and its state."""
        of_model = {"depth": depth, "of_input": of_input}
        of_model = {name: value for name, value in of_model.items() if value is not None}
        y, state = self.mixer(
            self.mixer_input(x), segment_ids=segment_ids, positions=positions, state=state, **of_model
        )
        return self.mixer_post_norm(y) if self.norm_after else y, state

    def transformed(self, x, *, segment_ids=None, state=None):
        """What the MLP adds to x, and its state."""
        y, state = self.mlp(self.mlp_norm(x) if self.norm_before else x, segment_ids=segment_ids, state=state)
        return self.mlp_post_norm(y) if self.norm_after else y, state

    def mixer_input(self, x: jax.Array) -> jax.Array:
        return self.mixer_norm(x) if self.norm_before else x

    def init_state(self, batch_size, max_length, dtype):
        return {
            "mixer": self.mixer.init_state(batch_size, max_length, dtype) if self.has_mixer else None,
            "mlp": self.mlp.init_state(batch_size, dtype) if self.has_mlp else None,
        }


class Unit(nnx.Module):
    """The layers of the pattern, once."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, unit_index: jax.Array, rngs: nnx.Rngs):
        layers = places(config)
        self.blocks = nnx.List(
            Block(place, config, sizes, layer_index=unit_index * len(layers) + i, rngs=rngs)
            for i, place in enumerate(layers)
        )

    def __call__(self, x, *, states, dropout_key, depths, of_input, rematerialised, is_unrolled, **given):
        """`rematerialised` goes around each layer. Without states, layers that follow each other and are alike but for
        their parameters are scanned, unless `is_unrolled` says of their number that they are not."""
        new_states, split = [], [nnx.split(block) for block in self.blocks]
        for run in _alike([graphdef for graphdef, _ in split]):
            graphdef = split[run[0]][0]

            def layer(x, per_layer, graphdef=graphdef, of_input=of_input[run[0]]):
                parameters, i, depth, state = per_layer
                key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
                block = nnx.merge(graphdef, parameters)
                return block(x, state=state, dropout_key=key, depth=depth, of_input=of_input, **given)

            layer = rematerialised(layer)
            of_layers = [(split[i][1], i, depths[i], states[i]) for i in run]
            if len(run) == 1 or states[run[0]] is not None or is_unrolled(len(run)):
                for of_layer in of_layers:
                    x, state = layer(x, of_layer)
                    new_states.append(state)
            else:
                x, _ = jax.lax.scan(layer, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_layers))
                new_states += [None] * len(run)
        return x, new_states


def _alike(layers: list[nnx.GraphDef]) -> list[list[int]]:
    """The places of the layers, those together that follow each other and are alike."""
    runs: list[list[int]] = []
    for i, layer in enumerate(layers):
        if runs and layer == layers[runs[-1][0]]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs
