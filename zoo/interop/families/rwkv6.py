"""RWKV-6 (fla's `rwkv6`): layers of time mixing and channel mixing, LayerNorms with a bias, one on the embedding.

    model.layers.N.attn.{x_bias, x_proj.0, x_proj.2, r_proj, k_proj, v_proj, g_proj, w_proj, bonus, g_norm, o_proj},
    .ffn.{key, receptance, value}, .attn_norm, .ffn_norm; model.layers.0.pre_norm

Refused: norms without a bias.
"""

from typing import Any

from zoo.config import ModelConfig
from zoo.interop.families import fla
from zoo.interop.family import Field, Only
from zoo.interop.table import TRANSPOSED, Rule, Transform, linears, rule, same
from zoo.mixers.linear.rwkv6 import MIXTURES

FFN = fla.BLOCK + "ffn."
AROUND = [
    rule("model.embeddings.weight", "embed.embedding"),
    rule("lm_head.weight", "head.kernel", TRANSPOSED),
    *fla.layer_norm("model.norm.", "norm."),
    *fla.layer_norm("model.layers.0.pre_norm.", "embed_norm."),
    *fla.layer_norm(fla.BLOCK + "attn_norm.", "mixer_norm."),
    *fla.layer_norm(fla.BLOCK + "ffn_norm.", "mlp_norm."),
]
FIELDS = {"norm_first": Field("embedding_norm", True), "norm_bias": Only(True), "hidden_act": Only("sqrelu")}


def _mix_up(rank: int) -> Transform:
    """[D, mixtures * rank] there, [rank, mixtures * D] here."""

    def read(x):
        return (x.reshape(-1, MIXTURES, rank).transpose(2, 1, 0).reshape(rank, -1),)

    def write(x):
        return (x.reshape(rank, MIXTURES, -1).transpose(2, 1, 0).reshape(-1, MIXTURES * rank),)

    return Transform(read, write)


def _rules(model: ModelConfig) -> list[Rule]:
    projections = {f"{x}_proj.linear": ours for x, ours in zip("rkvg", ("r", "k", "v", "output_gate"), strict=True)}
    narrow = {"x_proj.0.linear": "mix_down", "w_proj.linear.lora.0": "decay_down"}
    vectors = {
        "x_bias": "mix",
        "x_proj.0.mu": "shared_mix",
        "bonus": "bonus",
        "w_proj.linear.lora.2.bias": "decay_bias",
    }
    return [
        *AROUND,
        *linears(fla.MIXER, "mixer.", projections | narrow | {"o_proj": "out"}),
        rule(fla.MIXER + "w_proj.linear.lora.2.weight", "mixer.decay_up.kernel", TRANSPOSED),
        rule(fla.MIXER + "x_proj.2.weight", "mixer.mix_up.kernel", _mix_up(model.rwkv6.mix_rank)),
        *same(fla.MIXER, "mixer.", vectors),
        *fla.layer_norm(fla.MIXER + "g_norm.", "mixer.norm."),
        *linears(FFN, "mlp.", {"key.linear": "key", "receptance.linear": "receptance", "value": "value"}),
        *same(FFN, "mlp.", {"key.mu": "key_mix", "receptance.mu": "receptance_mix"}),
    ]


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_heads"] = mixer.heads


FAMILIES = [
    fla.family(
        "rwkv6",
        "RWKV6ForCausalLM",
        mixer="rwkv6",
        has_attention=False,
        fields=FIELDS
        | {
            "norm_eps": Field("norm_epsilon", 1e-5),
            "num_heads": Field("rwkv6.num_heads", 4),
            "expand_k": Field("rwkv6.expand_k", 0.5),
            "expand_v": Field("rwkv6.expand_v", 1.0),
            "proj_low_rank_dim": Field("rwkv6.mix_rank", 32),
            "gate_low_rank_dim": Field("rwkv6.decay_rank", 64),
        },
        settings={"mlp": "channel_mixing", "norm": "layer_norm"},
        rules=_rules,
        write=_write,
        width=lambda d, ratio: -(-int(d * (3.5 if ratio is None else ratio)) // 32) * 32,
    )
]
