"""The families whose reference is a layer of flash-linear-attention."""

import dataclasses

import torch
from family import D_FF, EPSILON, HEADS, LAYERS, D, Family, K, matrices, same
from torch import nn


def fla_call(module, x, cache, index):
    return module(x, past_key_values=cache, use_cache=cache is not None)[0]


def fla_cache():
    from fla.models.utils import Cache

    return Cache()


def recurrent_state(cache, index):
    return {"mixer": cache[index]["recurrent_state"]}


def forgetting_attention():
    """The layer decodes by a kernel alone: here a cache holds the tokens of all calls, which are computed again."""
    from fla.layers.forgetting_attn import ForgettingAttention

    def call(module, x, cache, index):
        if cache is None:
            return module(x)[0]
        cache[index] = torch.cat([cache[index], x], 1) if index in cache else x
        cache["module", index] = module
        return module(cache[index])[0][:, -x.shape[1] :]

    def states(cache, index):
        module, x = cache["module", index], cache[index]
        return {f"mixer.{name}": getattr(module, f"{name}_proj")(x) for name in "kv"}

    return Family(
        {"forgetting_attention": {"num_heads": HEADS, "output_gate": True}},
        lambda i: ForgettingAttention(hidden_size=D, num_heads=HEADS, use_output_gate=True, layer_idx=i),
        call,
        matrices(q="q_proj", k="k_proj", v="v_proj", forget="f_proj", output_gate="g_proj", out="o_proj")
        | {"forget.bias": ("f_proj.bias", same)},
        dict,
        states,
    )


def linear_attention(feature_map="elu"):
    from fla.layers import LinearAttention

    def states(cache, index):
        kv, z = cache[index]["recurrent_state"]
        return {"mixer.S": kv, "mixer.z": z.flatten(1)}

    return Family(
        {"linear_attention": {"num_heads": HEADS}},
        lambda i: LinearAttention(
            hidden_size=D,
            num_heads=HEADS,
            feature_map=feature_map,
            output_norm="identity",
            do_feature_map_norm=True,
            layer_idx=i,
        ),
        fla_call,
        matrices(q="q_proj", k="k_proj", v="v_proj", out="o_proj"),
        fla_cache,
        states,
    )


def linear_attention_relu():
    family = linear_attention("relu")
    family.config["linear_attention"]["feature_map"] = "relu"
    return family


def linear_attention_taylor2():
    """The Taylor map in LinearAttention, which has a cache; a full pass is compared with BasedLinearAttention."""
    from fla.layers import BasedLinearAttention
    from fla.modules.feature_map import TaylorFeatureMap

    plain = linear_attention("identity")

    def layer(index):
        module = plain.layer(index)
        module.feature_map_q = module.feature_map_k = TaylorFeatureMap(K)
        return module

    def call(module, x, cache, index):
        y = plain.call(module, x, cache, index)
        if cache is None:
            based = BasedLinearAttention(D, feature_dim=K, num_key_value_heads=HEADS, num_heads=HEADS)
            based.load_state_dict(module.state_dict())
            torch.testing.assert_close(y, based.forward_reference(x))
        return y

    # Ours has the products x_i x_j by rows; there all with i < j come after all squares.
    pairs = [(i, j) for i in range(K) for j in range(i, K)]
    theirs = [(i, i) for i in range(K)] + [(i, j) for i, j in pairs if i < j]
    order = [*range(K + 1), *(K + 1 + theirs.index(pair) for pair in pairs)]

    def states(cache, index):
        kv, z = cache[index]["recurrent_state"]
        return {"mixer.S": kv[:, :, order], "mixer.z": z[..., order].flatten(1)}

    return dataclasses.replace(
        plain,
        config={"linear_attention": {"num_heads": HEADS, "feature_map": "taylor2"}},
        layer=layer,
        call=call,
        states=states,
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


def convolved(order=None):
    """q, k, v and their convolutions; `order`: by name, of a projection's outputs here."""

    def turned(name):
        at = (order or {}).get(name, slice(None))
        return lambda weight: weight[at].T, lambda weight: weight[at][:, 0]

    projections = {f"qkv.{name}.kernel": (f"{name}_proj.weight", turned(name)[0]) for name in "qkv"}
    return projections | {f"qkv.{name}_conv.weight": (f"{name}_conv1d.weight", turned(name)[1]) for name in "qkv"}


def delta_states(order=None):
    def states(cache, index):
        found = {"mixer.S": cache[index]["recurrent_state"]}
        for name, inputs in zip("qkv", cache[index]["conv_state"], strict=True):
            inputs = inputs[:, (order or {}).get(name, slice(None)), 1:]
            found[f"mixer.conv.{name}"] = inputs.transpose(1, 2)
        return found

    return states


def delta_net(**settings):
    from fla.layers import DeltaNet

    return Family(
        {"delta_net": {"num_heads": HEADS}},
        lambda i: DeltaNet(hidden_size=D, num_heads=HEADS, layer_idx=i, **settings),
        fla_call,
        convolved() | matrices(beta="b_proj", out="o_proj") | {"norm.scale": ("o_norm.weight", same)},
        fla_cache,
        delta_states(),
    )


def delta_net_gated():
    """With an output gate and beta up to 2."""
    family = delta_net(use_gate=True, allow_neg_eigval=True)
    family.config["delta_net"] |= {"output_gate": True, "beta_max": 2.0}
    family.names |= matrices(output_gate="g_proj")
    return family


GATED = matrices(beta="b_proj", decay="a_proj", output_gate="g_proj", out="o_proj") | {
    "decay_bias": ("dt_bias", same),
    "A_log": ("A_log", same),
    "norm.scale": ("o_norm.weight", same),
}


def gated_delta_net():
    from fla.layers import GatedDeltaNet

    return Family(
        {"gated_delta_net": {"num_heads": HEADS, "expand_k": 0.75, "expand_v": 1.5}},
        lambda i: GatedDeltaNet(hidden_size=D, num_heads=HEADS, head_dim=3 * K // 4, layer_idx=i),
        fla_call,
        convolved() | GATED,
        fla_cache,
        delta_states(),
    )


def gated_delta_product():
    from fla.layers import GatedDeltaProduct

    steps, key_width = 2, 3 * K // 4

    def by_heads(width):  # rows there are by step, then by head
        return torch.arange(steps * HEADS * width).view(steps, HEADS, width).transpose(0, 1).flatten()

    order = {"k": by_heads(key_width), "v": by_heads(2 * key_width)}
    return Family(
        {"gated_delta_product": {"num_householder": steps, "num_heads": HEADS, "expand_k": 0.75, "expand_v": 1.5}},
        lambda i: GatedDeltaProduct(
            hidden_size=D, num_heads=HEADS, head_dim=key_width, num_householder=steps, layer_idx=i
        ),
        fla_call,
        convolved(order) | GATED,
        fla_cache,
        delta_states(order),
    )


def kda():
    from fla.layers import KimiDeltaAttention

    return Family(
        {"kda": {"num_heads": HEADS}},
        lambda i: KimiDeltaAttention(hidden_size=D, num_heads=HEADS, head_dim=K, layer_idx=i),
        fla_call,
        convolved()
        | matrices(decay_down="f_proj.0", decay_up="f_proj.1", gate_down="g_proj.0", gate_up="g_proj.1")
        | matrices(beta="b_proj", out="o_proj")
        | {"gate_up.bias": ("g_proj.1.bias", same), "decay_bias": ("dt_bias", same), "A_log": ("A_log", same)}
        | {"norm.scale": ("o_norm.weight", same)},
        fla_cache,
        delta_states(),
    )


def rwkv7():
    from fla.layers.rwkv7 import LoRA, RWKV7Attention
    from fla.models.rwkv7.modeling_rwkv7 import RWKV7FeedForward

    ranks = {"decay_low_rank_dim": 3, "a_low_rank_dim": 4, "v_low_rank_dim": 5, "gate_low_rank_dim": 6}
    first = {}

    def layer(index):
        module = RWKV7Attention(
            hidden_size=D,
            head_dim=K,
            norm_eps=EPSILON,
            layer_idx=index,
            num_hidden_layers=LAYERS,
            fuse_norm=True,
            **ranks,
        )
        if index == 0:  # which has none, and ours one whose gradient is 0
            module.v_lora = LoRA(D, D, low_rank_dim=5, activation=None)
        return module

    def call(module, x, cache, index):
        y, _, _, first["v"] = module(x, past_key_values=cache, use_cache=cache is not None, v_first=first.get("v"))
        return y + sum(0 * p.sum() for p in module.v_lora.parameters()) if index == 0 else y

    class FeedForward(RWKV7FeedForward):
        def forward(self, x, cache):
            if cache is not None and "ffn_state" not in cache[self.layer_idx]:
                cache[self.layer_idx]["ffn_state"] = None
            return super().forward(x, state=cache)[0]

    def states(cache, i):
        entry = cache[i]
        return {"mixer.S": entry["recurrent_state"], "mixer.last": entry["conv_state"], "mlp": entry["ffn_state"]}

    narrow = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}
    return Family(
        {
            "mlp": "channel_mixing_ungated",
            "rwkv7": {"num_heads": HEADS, "decay_rank": 3, "rate_rank": 4, "value_rank": 5, "gate_rank": 6},
        },
        layer,
        call,
        matrices(r="r_proj", k="k_proj", v="v_proj", out="o_proj")
        | matrices(**{f"{ours}_down": f"{theirs}_lora.lora.0" for ours, theirs in narrow.items()})
        | matrices(**{f"{ours}_up": f"{theirs}_lora.lora.2" for ours, theirs in narrow.items()})
        | {f"{ours}_bias": (f"{narrow[ours]}_lora.lora.2.bias", same) for ours in ("decay", "rate", "value")}
        | {
            "mix": ([f"x_{z}" for z in "rwkvag"], lambda *mixes: torch.cat(mixes).flatten(1)),
            "correction_scale": ("k_k", same),
            "key_rate": ("k_a", same),
            "bonus": ("r_k", same),
            "norm.scale": ("g_norm.weight", same),
            "norm.bias": ("g_norm.bias", same),
        },
        fla_cache,
        states,
        lambda i: FeedForward(D, intermediate_size=D_FF, layer_idx=i, num_hidden_layers=LAYERS),
        matrices(key="key", value="value") | {"key_mix": ("x_k", same)},
    )
