"""S4D: a time-invariant diagonal state-space model (Gu et al. 2022, arXiv:2206.11893).

    h_t = exp(dt A) h_{t-1} + b x_t        y_t = W_o gelu(2 Re(c . h_t) + D x_t)

Each channel has a diagonal complex A, a step dt and a read-out c of its own, the same at every token, so that a whole
sequence is a convolution and a step a recurrence. `zoo.layers.diagonal_ssm` has the initial values and discretizations.
State: h, complex64 [batch, d_model, N/2].
"""

import dataclasses

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo.layers import DiagonalSSM, DiagonalSSMConfig, linear, rounded_once
from zoo.mixers.base import Mixer, MixerConfig, Sizes


@dataclasses.dataclass
class S4DConfig(MixerConfig, DiagonalSSMConfig):
    pass


class S4D(Mixer):
    config_class = S4DConfig
    saved_names = ("s4d_y",)

    def __init__(self, config: S4DConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d = sizes.d_model
        self.ssm = DiagonalSSM(d, config, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=sizes.dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        y, final_state = self.ssm(x, segment_ids=segment_ids, state=state)
        y = self.out(rounded_once(jax.nn.gelu, checkpoint_name(y, "s4d_y")))
        return y, None if state is None else final_state

    def init_state(self, batch_size, max_length, dtype):
        return self.ssm.init_state(batch_size)

    @staticmethod
    def check(config, d_model):
        return DiagonalSSM.check(d_model, config)

    @staticmethod
    def num_parameters(config, d_model):
        return d_model**2 + DiagonalSSM.num_parameters(d_model, config)

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        return 2 * d_model**2 + DiagonalSSM.flops_per_token(d_model, config)
