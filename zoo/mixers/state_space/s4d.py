"""S4D: a time-invariant diagonal state-space model (Gu et al. 2022, arXiv:2206.11893).

    h_t = exp(dt A) h_{t-1} + b x_t        y_t = W_o gelu(2 Re(c . h_t) + D x_t)

Each channel has a diagonal complex A, a step dt and a read-out c of its own, the same at every token, so that a whole
sequence is a convolution and a step a recurrence. `zoo.layers.diagonal_ssm` has the initial values and discretizations.
State: h, complex64 [batch, d_model, N/2].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo.layers import DiagonalSSM, DiagonalSSMConfig, linear, rounded_once
from zoo.mixers.base import Mixer, MixerConfig, Sizes
from zoo.mixers.from_softmax import Taken, check_biases, constant


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

    def from_softmax(self, softmax):
        """What softmax attention is where all tokens near by weigh alike: W_v W_o of the mean over the reach.

        One mode of each channel, which does not turn, is that mean; the others are read by 0. A mean is small, where
        gelu(x) is about x / 2.
        """
        check_biases(softmax, {"v": ("out", self.out), "out": ("out", self.out)})
        ssm, read = self.ssm, jnp.einsum("mhv,hvd->md", softmax.v, softmax.out)
        rate = jnp.exp(ssm.of_channels(ssm.log_rate[...])[:, 0])
        first = jnp.zeros_like(ssm.c_real[...]).at[:, 0].set(rate / 2)
        found = {
            "ssm.log_dt": Taken(-jnp.log(softmax.reach * rate), softmax.forgets),
            "ssm.c_real": Taken(first, "the mean over the reach"),
            "ssm.D": constant(ssm.D, 0.0, "0: nothing passes the state by"),
            "out.kernel": Taken(2 * read[:-1], "2 v out, added over heads"),
        }
        if ssm.is_complex:
            still = ssm.frequency[...].at[:, 0].set(0.0)
            found["ssm.frequency"] = Taken(still, "0: the mean's does not turn")
            found["ssm.c_imag"] = constant(ssm.c_imag, 0.0, "0")
        if self.out.bias is not None:
            bias = read[-1] + (0 if softmax.out_bias is None else softmax.out_bias)
            found["out.bias"] = Taken(bias, "v's bias out, and out's bias")
        return found

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
