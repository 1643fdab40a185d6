"""The families whose reference is a layer of transformers."""

import torch
from family import EPSILON, HEADS, LAYERS, D, Family, K, matrices, same


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
