"""The mixers that the suites run over: every family of the registry, and settings that change its algorithm."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from zoo.config import Config
from zoo.mixers import CAUSAL, MIXERS, Sizes, make_mixer

D_MODEL = 32
VARIANTS = {
    "attention": [{"qk_norm": True, "num_kv_heads": 2, "output_gate": True}, {"window": 5}],
    "forgetting_attention": [{"num_kv_heads": 2, "window": 5, "positions": "rope", "output_gate": True}],
    "longformer": [{"dilation": "1+2"}],
    "linear_attention": [
        {"feature_map": "taylor2", "key_width": 4},
        {"feature_map": "identity"},
        {"feature_map": "exp"},
        {"feature_map": "relu", "normalise": False},
    ],
    "performer": [{"kernel": "relu", "features": 12}],
    "transnormer": [{"kind": "norm"}],
    "conv_linear": [{"conv_width": 3, "dilation": 2}],
    "retnet": [{"num_heads": 2, "expand_k": 0.5}],
    "linformer": [
        {"length": 16, "mixtures": 8, "sharing": "none"},
        {"length": 14, "mixtures": 5, "sharing": "key_value", "num_heads": 2},
    ],
    "rala": [{"num_heads": 2, "conv_width": 3}],
    "lightning": [{"num_heads": 2, "head_dim": 8}],
    "gated_retention": [{"num_heads": 2, "expand_v": 2.0, "gate_temperature": 1.0}],
    "mlstm": [{"num_heads": 2, "gate_soft_cap": 0.0, "expand_k": 1.0}],
    "rwkv6": [{"num_heads": 2, "expand_k": 0.5, "mix_rank": 4, "decay_rank": 8}],
    "gla": [{"num_heads": 2, "gate_temperature": 1.0}, {"gate": "scalar"}, {"gate": "fixed"}, {"gate": "none"}],
    "s4d": [{"init": "inv", "state_dim": 6}, {"init": "real", "discretization": "bilinear", "state_dim": 4}],
    "h3": [{"head_dim": 4, "state_dim": 8, "shift_width": 3}],
    "mamba": [{"expand": 1, "state_dim": 3, "conv_width": 2, "dt_rank": 5}],
    "mamba2": [{"head_dim": 8, "state_dim": 4, "groups": 2}],
    "delta_net": [{"num_heads": 2, "expand_v": 2.0, "beta_max": 2.0, "output_gate": True}],
    "gated_delta_net": [{"num_heads": 2, "num_v_heads": 4, "expand_k": 1.0, "expand_v": 2.0, "conv_width": 2}],
    "gated_delta_product": [{"num_householder": 3, "num_heads": 2, "expand_v": 0.5, "forget_gate": False}],
    "kda": [{"num_heads": 2, "expand_v": 0.5, "gate_rank": 3}],
    "rwkv7": [{"num_heads": 2, "decay_rank": 3, "rate_rank": 4, "value_rank": 5, "gate_rank": 6}],
}
# Settings of what others published (docs/interop.md), each the same algorithm, or a part of it: slow tests.
RARE_VARIANTS = {
    "attention": [
        {
            "qk_norm": True, "qk_norm_whole": True, "num_kv_heads": 2, "biases": "q,k,v,out", "rotary_fraction": 0.5,
            "rope_scaling.kind": "yarn", "rope_scaling.factor": 4.0, "rope_scaling.original_context": 8,
        },
        {"rope_scaling.kind": "llama3", "rope_scaling.factor": 2.0, "rope_scaling.original_context": 64},
        {"positions": "none", "biases": "q"},
    ],
    "conv_linear": [{"attention": False}],
    "retnet": [{"norm_epsilon": 0.1, "biases": "q,k,v,output_gate,out"}],
    "mlstm": [{"biases": "q,k,v,output_gate,out"}],
    "mamba": [
        {"inner_norm": "rms_norm", "biases": "in_x,in_z,out"},
        {"inner_norm": "rms_norm_without_scale", "norm_epsilon": 1e-3},
    ],
    "mamba2": [{"dt_limit_min": 5e-3, "dt_limit_max": 5e-2, "biases": "in_xBC,in_z,in_dt,out"}],
}  # fmt: skip
# Outputs at one place of a linear, time-invariant family see fixed lags, whatever the tokens are: it finds no marker.
TIME_INVARIANT = ("s4d",)
CASES = {
    "-".join([name, *(f"{key}={value}" for key, value in settings.items())]): (name, settings)
    for name in MIXERS
    for settings in [{}, *VARIANTS.get(name, []), *RARE_VARIANTS.get(name, [])]
}
# Variants that `make test` runs: those that change what is called, or when. The others are with the slow tests.
QUICK_VARIANTS = ("attention", "mamba2", "gated_delta_net", "gated_delta_product")


def _is_quick(name, settings):
    return name in QUICK_VARIANTS and settings not in RARE_VARIANTS.get(name, ())


PARAMETERS = [
    pytest.param(case, marks=[pytest.mark.slow] * bool(settings and not _is_quick(name, settings)))
    for case, (name, settings) in CASES.items()
    if CAUSAL in MIXERS[name].directions
]


def config_of(case: str):
    name, settings = CASES[case]
    config = getattr(Config().model, name)
    for path, value in settings.items():
        *sections, field = path.split(".")
        setattr(functools.reduce(getattr, sections, config), field, value)
    return config


def build(case: str, dtype=jnp.float32, d_model: int = D_MODEL, seed: int = 0, **direction):
    """The mixer of a case, as the first of two layers."""
    sizes = Sizes(d_model=d_model, num_layers=2, dtype=dtype, **direction)
    family = MIXERS[CASES[case][0]]
    return make_mixer(family, config_of(case), sizes, layer_index=jnp.asarray(0), rngs=nnx.Rngs(seed))


def apply(mixer, dtype=jnp.float32):
    """The mixer as a jitted function of its parameters and arrays."""
    graphdef, parameters = nnx.split(mixer)

    @jax.jit
    def call(parameters, x, segment_ids=None, positions=None, state=None):
        return nnx.merge(graphdef, parameters)(x, segment_ids=segment_ids, positions=positions, state=state)

    return parameters, call


def applied(case: str, dtype=jnp.float32, **direction):
    """The mixer of a case, and `apply` of it: one for all tests of the case, which share what is compiled."""
    return _applied(case, dtype, **direction)  # float32, said or not, is one


@functools.cache
def _applied(case, dtype, **direction):
    mixer = build(case, dtype, **direction)
    return mixer, *apply(mixer)


def error_ratio(value, reference):
    """Root-mean-square of the difference over that of the reference."""
    value, reference = jnp.asarray(value, jnp.float32), jnp.asarray(reference, jnp.float32)
    return float(jnp.sqrt(jnp.mean((value - reference) ** 2)) / (jnp.sqrt(jnp.mean(reference**2)) + 1e-30))
