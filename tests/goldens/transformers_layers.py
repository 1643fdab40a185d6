"""The families whose reference is a layer of transformers."""

import inspect

import torch
from family import EPSILON, HEADS, LAYERS, D, Family, K, RMSNorm, matrices, same


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

    # The norm of a head takes away what the input gate's bias does, but for its epsilon: one as large as the variances
    # makes the bias matter, where 1e-5 leaves its gradient to rounding.
    epsilon = 0.1
    config = xLSTMConfig(
        hidden_size=D,
        num_heads=HEADS,
        norm_eps=epsilon,
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
        epsilon=epsilon,
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


def gated_delta_net_qwen3_next():
    """Heads of v in groups that share q and k: rows of the projections there are by group, of all that it has."""
    from transformers import DynamicCache
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"):
        setattr(qwen3_next, name, inspect.unwrap(getattr(qwen3_next, name)))  # not the kernels of another package
    v_heads = 2 * HEADS
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=v_heads,
        linear_key_head_dim=K,
        linear_value_head_dim=K,
        rms_norm_eps=EPSILON,
    )

    def of_groups(start, stop):  # of a group's q, k, two v, two z
        return lambda weight: weight.view(HEADS, 6 * K, D)[:, start * K : stop * K].reshape(-1, D).T

    def gates(i):
        return lambda weight: weight.view(HEADS, 2, 2, D)[:, i].reshape(v_heads, D).T

    def taps(start, stop):
        return lambda weight: weight[start * D : stop * D, 0]

    places = {"q": (0, 1), "k": (1, 2), "v": (2, 4)}

    def states(cache, index):
        conv, recurrent = cache.get_conv_state(index, state_idx=0), cache.get_recurrent_state(index, state_idx=0)
        found = {f"mixer.conv.{name}": conv[:, a * D : b * D, -3:].transpose(1, 2) for name, (a, b) in places.items()}
        return found | {"mixer.S": recurrent}

    return Family(
        {"gated_delta_net": {"num_heads": HEADS, "num_v_heads": v_heads, "expand_k": 1.0, "expand_v": 2.0}},
        lambda i: qwen3_next.Qwen3NextGatedDeltaNet(config, i),
        lambda module, x, cache, index: module(x, cache),
        {f"qkv.{name}.kernel": ("in_proj_qkvz.weight", of_groups(*place)) for name, place in places.items()}
        | {f"qkv.{name}_conv.weight": ("conv1d.weight", taps(*place)) for name, place in places.items()}
        | {"output_gate.kernel": ("in_proj_qkvz.weight", of_groups(4, 6))}
        | {f"{name}.kernel": ("in_proj_ba.weight", gates(i)) for i, name in enumerate(("beta", "decay"))}
        | {"decay_bias": ("dt_bias", same), "A_log": ("A_log", same), "norm.scale": ("norm.weight", same)}
        | matrices(out="out_proj"),
        lambda: DynamicCache(config=config),
        states,
    )


def attention_qwen3_next():
    """With norms on q and k and an output gate, without positions."""
    from transformers import DynamicCache
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    config = qwen3_next.Qwen3NextConfig(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        head_dim=K,
        rms_norm_eps=EPSILON,
    )
    config._attn_implementation = "eager"

    def layer(index):
        module = qwen3_next.Qwen3NextAttention(config, index)
        module.q_norm, module.k_norm = RMSNorm(K), RMSNorm(K)  # theirs hold the scale less 1
        return module

    def call(module, x, cache, index):
        start = 0 if cache is None else cache.get_seq_length(index)
        places = torch.arange(start + x.shape[1])
        mask = torch.where(places[None] <= places[start:, None], 0.0, -torch.inf)[None, None]
        still = torch.ones(1, x.shape[1], K), torch.zeros(1, x.shape[1], K)  # cosines and sines of no turn
        return module(x, position_embeddings=still, attention_mask=mask, cache=cache)[0]

    def half(i):  # of each head: q, then its gate
        return lambda weight: weight.view(HEADS, 2, K, D)[:, i].reshape(HEADS * K, D).T

    return Family(
        {
            "positions": "none",
            "attention": {"num_heads": HEADS, "num_kv_heads": 1, "qk_norm": True, "output_gate": True},
        },
        layer,
        call,
        {"q.kernel": ("q_proj.weight", half(0)), "output_gate.kernel": ("q_proj.weight", half(1))}
        | {f"{name}_norm.scale": (f"{name}_norm.weight", same) for name in "qk"}
        | matrices(k="k_proj", v="v_proj", out="o_proj"),
        lambda: DynamicCache(config=config),
        lambda cache, index: {},
    )
