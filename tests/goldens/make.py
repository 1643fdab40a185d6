"""Makes the golden files of tests/zoo/test_goldens.py from the reference models. Run by hand:

    pip install torch triton transformers flash-linear-attention     (once, in an environment of its own, CPU is enough)
    python tests/goldens/make.py [family ...]

Each file holds a model of two layers: weights, tokens, logits, the gradient of every parameter, the final states. The
mixers (and RWKV's channel mixing) are the reference packages' own layers; embedding, norms, MLP, residuals and head
around them are the lines of `Model`. flash-linear-attention's layers call Triton kernels: on a CPU its own `naive`
functions, or the torch function of the same name, take their places. Logits and gradients come from a full pass;
states, and the check that decoding gives the same logits, from a prefill and single tokens through the package's cache.
"""

import dataclasses
import json
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

warnings.simplefilter("ignore")
VOCAB, D, HEADS, LAYERS, D_FF, TIME, PREFILL, EPSILON = 48, 16, 2, 2, 24, 24, 20, 1e-5
K = D // HEADS


# --- What stands in for Triton ----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, elementwise_affine=True, eps=EPSILON, **_):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None
        self.bias, self.eps = None, eps

    def forward(self, x, gate=None):
        x = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return x if gate is None else x * F.silu(gate)


class GroupNorm(nn.Module):
    def __init__(self, num_groups, hidden_size, eps, **_):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(hidden_size)), nn.Parameter(torch.zeros(hidden_size))
        self.groups, self.eps = num_groups, eps

    def forward(self, x):
        return F.group_norm(x.flatten(0, 1), self.groups, self.weight, self.bias, self.eps).view(x.shape)


def patch_fla():
    import fla.layers.gla
    import fla.layers.hgrn2
    import fla.layers.linear_attn
    import fla.layers.multiscale_retention
    import fla.layers.rwkv6
    import fla.layers.yoco
    import fla.models.rwkv6.modeling_rwkv6 as rwkv6_model
    import fla.modules.rotary.ops
    from fla.modules.rotary.ops import rotary_embedding_ref
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    state = ("initial_state", "output_final_state")

    def only(kwargs, *names):
        return {name: kwargs[name] for name in (*names, *state) if name in kwargs}

    def gla(q, k, v, g=None, gk=None, **kwargs):
        return naive_recurrent_gla(q, k, v, g if gk is None else gk, **only(kwargs))

    def simple_gla(q, k, v, g, **kwargs):
        return naive_recurrent_simple_gla(q, k, v, g, **only(kwargs, "scale"))

    def retention(q, k, v, **kwargs):
        heads = q.shape[2]
        g = torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads)))).expand(q.shape[:3])
        o, last = naive_recurrent_simple_gla(q, k, v, g, **only(kwargs))
        if kwargs.get("initial_state") is None:
            torch.testing.assert_close(o, naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))
        return o, last

    def linear(q, k, v, **kwargs):
        return naive_recurrent_linear_attn(q, k, v, **only(kwargs, "scale", "normalize"))

    def rwkv6(r, k, v, w, u, scale, **kwargs):
        o, last = naive_recurrent_rwkv6(*(x.transpose(1, 2) for x in (r, k, v, w)), u, scale=scale, **only(kwargs))
        return o.transpose(1, 2), last

    def rotary(x, cos, sin, interleaved=False, seqlen_offsets=0, **_):
        there = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return rotary_embedding_ref(x, cos[there], sin[there], interleaved=interleaved)

    def rms_norm_linear(x, norm_weight, norm_bias, weight, bias, eps=EPSILON):
        return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps), weight, bias)

    activations = {"swish": F.silu, "silu": F.silu, "sqrelu": lambda x: F.relu(x) ** 2}
    for module in (fla.layers.gla, fla.layers.multiscale_retention, fla.layers.yoco):
        module.FusedRMSNormGated = RMSNorm
    for module in (fla.layers.linear_attn, fla.layers.hgrn2):
        module.RMSNorm = RMSNorm
    for module in (fla.layers.gla, fla.layers.rwkv6, rwkv6_model):
        module.ACT2FN = activations
    for module in (fla.layers.gla, fla.layers.hgrn2):
        module.chunk_gla = module.fused_recurrent_gla = gla
    fla.layers.hgrn2.swish, fla.layers.hgrn2.rms_norm_linear = F.silu, rms_norm_linear
    fla.layers.linear_attn.chunk_linear_attn = fla.layers.linear_attn.fused_recurrent_linear_attn = linear
    fla.layers.multiscale_retention.chunk_retention = retention
    fla.layers.multiscale_retention.fused_recurrent_retention = retention
    fla.layers.yoco.chunk_simple_gla = fla.layers.yoco.fused_recurrent_simple_gla = simple_gla
    fla.layers.yoco.rotary_embedding = fla.modules.rotary.ops.rotary_embedding = rotary
    fla.layers.rwkv6.GroupNorm, fla.layers.rwkv6.token_shift = GroupNorm, token_shift_ref
    fla.layers.rwkv6.chunk_rwkv6 = fla.layers.rwkv6.fused_recurrent_rwkv6 = rwkv6
    rwkv6_model.token_shift = token_shift_ref
    for module in (rwkv6_model, fla.layers.rwkv6):
        for name in ("LerpLinear", "DDLerpLinear"):
            if hasattr(module, name):
                getattr(module, name).forward.__globals__["token_shift"] = token_shift_ref


# --- The families -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Family:
    """One reference layer.

    Attributes:
      config: our settings: of the model, and of the family's section under its name.
      layer: index -> the reference module.
      call: (module, x, cache, index) -> y; `cache` None for a full pass.
      names: our parameter -> (the reference's, what turns it into ours). A constant stands for one it lacks.
      cache: makes the cache.
      states: (cache, index) -> our state, by its name.
      mlp: index -> the reference's MLP, called as (x, cache); None for SwiGLU.
      mlp_names: as names.
    """

    config: dict
    layer: Callable[[int], nn.Module]
    call: Callable
    names: dict[str, Any]
    cache: Callable
    states: Callable
    mlp: Callable[[int], nn.Module] | None = None
    mlp_names: dict[str, Any] = dataclasses.field(default_factory=dict)


def transpose(weight):
    return weight.T


def same(x):
    return x


def matrices(**names):
    return {f"{ours}.kernel": (f"{theirs}.weight", transpose) for ours, theirs in names.items()}


def fla_call(module, x, cache, index):
    return module(x, past_key_values=cache, use_cache=cache is not None)[0]


def fla_cache():
    from fla.models.utils import Cache

    return Cache()


def recurrent_state(cache, index):
    return {"mixer": cache[index]["recurrent_state"]}


def linear_attention():
    from fla.layers import LinearAttention

    def states(cache, index):
        kv, z = cache[index]["recurrent_state"]
        return {"mixer.S": kv, "mixer.z": z.flatten(1)}

    return Family(
        {"linear_attention": {"num_heads": HEADS}},
        lambda i: LinearAttention(
            hidden_size=D,
            num_heads=HEADS,
            feature_map="elu",
            output_norm="identity",
            do_feature_map_norm=True,
            layer_idx=i,
        ),
        fla_call,
        matrices(q="q_proj", k="k_proj", v="v_proj", out="o_proj"),
        fla_cache,
        states,
    )


def linear_attention_identity():
    from fla.layers import LinearAttention

    return Family(
        {"linear_attention": {"num_heads": HEADS, "feature_map": "identity"}},
        lambda i: LinearAttention(hidden_size=D, num_heads=HEADS, feature_map="identity", layer_idx=i),
        fla_call,
        matrices(q="q_proj", k="k_proj", v="v_proj", out="o_proj") | {"norm.scale": ("norm.weight", same)},
        fla_cache,
        lambda cache, i: {"mixer.S": cache[i]["recurrent_state"]},
    )


def retnet():
    from fla.layers import MultiScaleRetention

    return Family(
        {"retnet": {"num_heads": HEADS}},
        lambda i: MultiScaleRetention(hidden_size=D, num_heads=HEADS, layer_idx=i),
        fla_call,
        matrices(q="q_proj", k="k_proj", v="v_proj", output_gate="g_proj", out="o_proj")
        | {"norm.scale": ("g_norm_swish_gate.weight", same)},
        fla_cache,
        recurrent_state,
    )


def gla():
    from fla.layers import GatedLinearAttention

    return Family(
        {"gla": {"num_heads": HEADS, "gate_rank": 4}},
        lambda i: GatedLinearAttention(hidden_size=D, num_heads=HEADS, gate_low_rank_dim=4, layer_idx=i),
        fla_call,
        matrices(q="q_proj", k="k_proj", v="v_proj", output_gate="g_proj", out="o_proj")
        | matrices(gate_down="gk_proj.0", gate_up="gk_proj.1")
        | {"gate_up.bias": ("gk_proj.1.bias", same), "norm.scale": ("g_norm_swish_gate.weight", same)},
        fla_cache,
        recurrent_state,
    )


def gated_retention():
    from fla.layers.yoco import YOCOGatedRetention

    def halves(weight):  # pairs of rotary: neighbours there, halves of a head here
        return weight.view(HEADS, K // 2, 2, D).transpose(1, 2).reshape(D, D).T

    def states(cache, index):  # [B, H, K, V]
        state = cache[index]["recurrent_state"]
        return {"mixer": state.view(-1, HEADS, K // 2, 2, K).transpose(2, 3).reshape(state.shape)}

    return Family(
        {"gated_retention": {"num_heads": HEADS}},
        lambda i: YOCOGatedRetention(hidden_size=D, num_heads=HEADS, norm_eps=EPSILON, layer_idx=i),
        fla_call,
        matrices(v="v_proj", gate="gk_proj", output_gate="g_proj", out="o_proj")
        | {"q.kernel": ("q_proj.weight", halves), "k.kernel": ("k_proj.weight", halves), "norm.scale": torch.ones(K)},
        fla_cache,
        states,
    )


def hgrn2():
    from fla.layers.hgrn2 import HGRN2Attention

    bounds = nn.ParameterList([torch.zeros(D) for _ in range(LAYERS)])  # the model's, a row a layer

    class Layer(HGRN2Attention):
        def __init__(self, index):
            super().__init__(hidden_size=D, expand_ratio=K, layer_idx=index)
            self.lower_bound = bounds[index]

    def call(module, x, cache, index):
        shares = torch.stack(list(bounds)).softmax(0)
        bound = (shares.cumsum(0) - shares[0])[index]
        return module(x, past_key_values=cache, use_cache=cache is not None, lower_bound=bound)[0]

    return Family(
        {"hgrn2": {"num_heads": HEADS}},
        Layer,
        call,
        matrices(q="q_proj", forget="f_proj", v="i_proj", out="o_proj")
        | {"norm.scale": ("g_norm.weight", same), "bound": ("lower_bound", same)},
        fla_cache,
        recurrent_state,
    )


def rwkv6():
    from fla.layers.rwkv6 import RWKV6Attention
    from fla.models.rwkv6.modeling_rwkv6 import RWKV6FeedForward

    rank, mixtures = 4, 5

    class FeedForward(RWKV6FeedForward):
        def forward(self, x, cache):
            if cache is not None and "ffn_state" not in cache[self.layer_idx]:
                cache[self.layer_idx]["ffn_state"] = None
            return super().forward(x, state=cache)[0]

    def mix_up(weight):  # [D, 5 * rank] -> [rank, 5 * D]
        return weight.view(D, mixtures, rank).permute(2, 1, 0).reshape(rank, mixtures * D)

    def states(cache, i):
        entry = cache[i]
        return {"mixer.S": entry["recurrent_state"], "mixer.last": entry["conv_state"], "mlp": entry["ffn_state"]}

    return Family(
        {"mlp": "channel_mixing", "rwkv6": {"num_heads": HEADS, "expand_k": 0.5, "mix_rank": rank, "decay_rank": 8}},
        lambda i: RWKV6Attention(
            hidden_size=D, num_heads=HEADS, proj_low_rank_dim=rank, gate_low_rank_dim=8, norm_eps=EPSILON, layer_idx=i
        ),
        fla_call,
        matrices(r="r_proj.linear", k="k_proj.linear", v="v_proj.linear", output_gate="g_proj.linear", out="o_proj")
        | matrices(mix_down="x_proj.0.linear", decay_down="w_proj.linear.lora.0", decay_up="w_proj.linear.lora.2")
        | {
            "mix_up.kernel": ("x_proj.2.weight", mix_up),
            "shared_mix": ("x_proj.0.mu", same),
            "mix": ("x_bias", same),
            "decay_bias": ("w_proj.linear.lora.2.bias", same),
            "bonus": ("bonus", same),
            "norm.scale": ("g_norm.weight", same),
            "norm.bias": ("g_norm.bias", same),
        },
        fla_cache,
        states,
        lambda i: FeedForward(D, intermediate_size=D_FF, layer_idx=i),
        matrices(key="key.linear", receptance="receptance.linear", value="value")
        | {"key_mix": ("key.mu", same), "receptance_mix": ("receptance.mu", same)},
    )


class PlainCache(dict):
    def get_linear_cache(self, index):
        return self.get(index)

    def set_linear_cache(self, index, state):
        self[index] = state


def lightning():
    from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=D,
        num_attention_heads=HEADS,
        head_dim=K,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
        block_size=8,
    )

    def layer(index):
        module = MiniMaxLightningAttention(config, index)
        module.norm.variance_epsilon = EPSILON
        return module

    def part(i):
        return lambda weight: weight.view(HEADS, 3, K, D)[:, i].reshape(D, D).T

    return Family(
        {"lightning": {"num_heads": HEADS}},
        layer,
        lambda module, x, cache, index: module(x, None, None, past_key_values=cache)[0],
        {f"{name}.kernel": ("qkv_proj.weight", part(i)) for i, name in enumerate("qkv")}
        | matrices(output_gate="output_gate", out="out_proj")
        | {"norm.scale": ("norm.weight", same)},
        PlainCache,
        lambda cache, index: {"mixer": cache[index]},
    )


def mlstm():
    from transformers.models.xlstm.modeling_xlstm import xLSTMConfig, xLSTMLayer

    config = xLSTMConfig(
        hidden_size=D,
        num_heads=HEADS,
        norm_eps=EPSILON,
        autocast_kernel_dtype="float32",
        inference_state_dtype="float32",
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode="inference",
        weight_mode="single",
        chunk_size=16,
    )

    def call(module, x, cache, index):
        y, state = module(x, None if cache is None else cache.get(index))
        if cache is not None:
            cache[index] = state
        return y

    def states(cache, index):
        c, n, m = cache[index]
        return {"mixer.S": c, "mixer.n": n.flatten(1), "mixer.m": m.flatten(1)}

    return Family(
        {"mlstm": {"num_heads": HEADS}},
        lambda i: xLSTMLayer(config),
        call,
        matrices(q="q", k="k", v="v", output_gate="ogate_preact", out="out_proj")
        | matrices(input_gate="igate_preact", forget_gate="fgate_preact")
        | {
            "input_bias": ("igate_preact.bias", same),
            "forget_bias": ("fgate_preact.bias", same),
            "norm.scale": ("multihead_norm.weight", same),
        },
        PlainCache,
        states,
    )


def attention():
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=1, num_hidden_layers=LAYERS, head_dim=K
    )
    config._attn_implementation = "eager"
    rotary = LlamaRotaryEmbedding(config)

    def call(module, x, cache, index):
        start = 0 if cache is None else cache.get_seq_length(index)
        positions = torch.arange(start, start + x.shape[1])[None]
        visible = torch.arange(start + x.shape[1])[None] <= positions[0][:, None]
        mask = torch.where(visible, 0.0, -torch.inf)[None, None]
        return module(x, position_embeddings=rotary(x, positions), attention_mask=mask, past_key_values=cache)[0]

    return Family(
        {"attention": {"num_heads": HEADS, "num_kv_heads": 1}},
        lambda i: LlamaAttention(config, i),
        call,
        matrices(q="q_proj", k="k_proj", v="v_proj", out="o_proj"),
        lambda: DynamicCache(config=config),
        lambda cache, index: {},
    )


FAMILIES = {
    function.__name__: function
    for function in (
        attention,
        linear_attention,
        linear_attention_identity,
        retnet,
        lightning,
        gated_retention,
        mlstm,
        gla,
        hgrn2,
        rwkv6,
    )
}


# --- The model around them --------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((D, D_FF), (D, D_FF), (D_FF, D)))

    def forward(self, x, cache):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self, family: Family):
        super().__init__()
        self.family = family
        self.embed = nn.Embedding(VOCAB, D)
        self.mixers = nn.ModuleList(family.layer(i) for i in range(LAYERS))
        self.mixer_norms = nn.ModuleList(RMSNorm(D) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(family.mlp(i) if family.mlp else SwiGLU() for i in range(LAYERS))
        self.mlp_norms = nn.ModuleList(RMSNorm(D) for _ in range(LAYERS))
        self.norm = RMSNorm(D)
        self.head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, tokens, cache=None):
        x = self.embed(tokens)
        for i in range(LAYERS):
            x = x + self.family.call(self.mixers[i], self.mixer_norms[i](x), cache, i)
            x = x + self.mlps[i](self.mlp_norms[i](x), cache)
        return self.head(self.norm(x))


def ours(model: Model, of: Callable) -> dict[str, torch.Tensor]:
    """Parameters (or their gradients: of(parameter)) by the names and in the shapes of our model."""
    found = {"embed.embedding": of(model.embed.weight), "norm.scale": of(model.norm.weight)}
    found["head.kernel"] = of(model.head.weight).T
    mlp_names = model.family.mlp_names or matrices(gate="gate", up="up", down="down")
    parts = {"mixer": (model.mixers, model.family.names), "mlp": (model.mlps, mlp_names)}
    parts |= {
        f"{name}_norm": (getattr(model, f"{name}_norms"), {"scale": ("weight", same)}) for name in ("mixer", "mlp")
    }
    for part, (modules, names) in parts.items():
        for name, source in names.items():
            if isinstance(source, tuple):
                theirs, turn = source
                rows = [turn(of(module.get_parameter(theirs))) for module in modules]
            elif of(model.norm.weight) is model.norm.weight:
                rows = [source] * LAYERS
            else:
                continue  # a constant has no gradient
            found[f"units.blocks.0.{part}.{name}"] = torch.stack(rows)
    return found


def narrow(value: torch.Tensor) -> np.ndarray:
    return value.detach().to(torch.float32 if value.is_floating_point() else torch.int32).numpy()


def make(name: str, folder: pathlib.Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    family = FAMILIES[name]()
    model = Model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32))
            if parameter.ndim > 1:
                parameter.copy_(draw * (1.0 if parameter is model.embed.weight else parameter.shape[-1] ** -0.5))
            else:
                parameter.add_(0.3 * draw)
    tokens = torch.from_numpy(rng.permutation(VOCAB).reshape(-1, TIME))  # each token once: d embed is d input
    cotangent = torch.from_numpy(rng.standard_normal((*tokens.shape, VOCAB)).astype(np.float32))
    logits = model(tokens)
    (logits * cotangent).sum().backward()
    with torch.no_grad():
        cache = family.cache()
        pieces = [model(tokens[:, :PREFILL], cache)]
        pieces += [model(tokens[:, t : t + 1], cache) for t in range(PREFILL, TIME)]
        torch.testing.assert_close(torch.cat(pieces, 1), logits, rtol=1e-4, atol=1e-4)
        states = [family.states(cache, i) for i in range(LAYERS)]
    config = {"mixer": name if name in family.config else next(k for k in family.config if name.startswith(k))}
    config |= {"num_layers": LAYERS, "d_model": D, "d_ff": D_FF, "vocab_size": VOCAB, "norm_epsilon": EPSILON}
    arrays = {"tokens": tokens, "cotangent": cotangent, "logits": logits}
    arrays |= {f"parameter:{key}": value for key, value in ours(model, lambda p: p).items()}
    arrays |= {f"gradient:{key}": value for key, value in ours(model, lambda p: p.grad).items()}
    arrays |= {f"state:{key}": torch.stack([state[key] for state in states]) for key in states[0]}
    settings = json.dumps(config | {"tie_embeddings": False} | family.config)
    path = folder / f"{name}.npz"
    np.savez_compressed(path, config=settings, **{key: narrow(value) for key, value in arrays.items()})
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB, logits up to {logits.abs().max():.1f}")


if __name__ == "__main__":
    patch_fla()
    for name in sys.argv[1:] or FAMILIES:
        make(name, pathlib.Path(__file__).parent)
