"""xLSTM (transformers' `xlstm`, NX-AI's 7B): layers of mLSTM and gated MLPs, soft caps on gates and logits.

    backbone.blocks.N.norm_mlstm, .mlstm_layer.{q, k, v, ogate_preact, igate_preact, fgate_preact, multihead_norm,
    out_proj}, .norm_ffn, .ffn.{proj_up_gate, proj_up, proj_down}; backbone.out_norm

Refused: biases, fused weights, no norm before the head.
"""

from typing import Any

from zoo.interop.family import Family, Field, Fields, Only, ratio
from zoo.interop.table import TRANSPOSED, linears, rule, same

BLOCK = "backbone.blocks.{N}."
MIXER = BLOCK + "mlstm_layer."
GATES = {"igate_preact": "input", "fgate_preact": "forget"}


def _read(fields: Fields, found: dict[str, Any]) -> None:
    width = fields.take("hidden_size", fields.take("embedding_dim", 4096))
    layers = fields.take("num_hidden_layers", fields.take("num_blocks", 32))
    if fields.take("embedding_dim", width) != width or fields.take("num_blocks", layers) != layers:
        fields.refuse("embedding_dim", "it or num_blocks differs from hidden_size or num_hidden_layers")
    multiple = fields.take("ffn_round_up_to_multiple_of", 64)
    if width < 1 or multiple < 1:
        fields.refuse("hidden_size", f"{width}, rounded to multiples of {multiple}; expected at least 1")
        width, multiple = max(1, width), max(1, multiple)
    inner = fields.take("ffn_proj_factor", 2.667) * width
    found |= {"d_model": width, "num_layers": layers, "d_ff": int((inner + multiple - 1) // multiple * multiple)}
    found["mlstm.expand_k"] = ratio(int(fields.take("qk_dim_factor", 0.5) * width), width)
    found["mlstm.expand_v"] = ratio(int(fields.take("v_dim_factor", 1.0) * width), width)
    for name in ("gate_soft_cap", "output_logit_soft_cap"):
        if fields.values.get(name, 1.0) is None:
            fields.refuse(name, "no cap cannot be expressed")


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    width, mixer = settings["d_model"], mixers[0]
    fields |= {"hidden_size": width, "embedding_dim": width}
    fields |= {"num_hidden_layers": settings["num_layers"], "num_blocks": settings["num_layers"]}
    fields["num_heads"] = mixer.heads
    fields["qk_dim_factor"] = mixer.heads * mixer.key_width / width
    fields["v_dim_factor"] = mixer.heads * mixer.value_width / width
    fields["ffn_proj_factor"], fields["ffn_round_up_to_multiple_of"] = settings["d_ff"] / width, 1


FAMILIES = [
    Family(
        name="xlstm",
        architecture="xLSTMForCausalLM",
        fields={
            "vocab_size": Field("vocab_size", 50304),
            "num_heads": Field("mlstm.num_heads", 8),
            "norm_eps": Field("norm_epsilon", 1e-6),
            "gate_soft_cap": Field("mlstm.gate_soft_cap", 15.0),
            "output_logit_soft_cap": Field("logit_softcap", 30.0),
            "tie_word_embeddings": Only(False),  # the package has no code that ties them
            "use_bias": Only(False),
            "add_out_norm": Only(True),
            "weight_mode": Only("single"),
            "eps": Only(1e-6),
        },
        settings={"mixer": "mlstm", "mlp": "swiglu", "positions": "none", "tie_embeddings": False},
        fixed={"autocast_kernel_dtype": "float32"},
        rules=[
            rule("backbone.embeddings.weight", "embed.embedding"),
            rule("backbone.out_norm.weight", "norm.scale"),
            rule("lm_head.weight", "head.kernel", TRANSPOSED),
            *same(BLOCK, "", {"norm_mlstm.weight": "mixer_norm.scale", "norm_ffn.weight": "mlp_norm.scale"}),
            *linears(BLOCK + "ffn.", "mlp.", {"proj_up_gate": "gate", "proj_up": "up", "proj_down": "down"}),
            *linears(MIXER, "mixer.", {"q": "q", "k": "k", "v": "v", "ogate_preact": "output_gate", "out_proj": "out"}),
            *(rule(f"{MIXER}{gate}.weight", f"mixer.{name}_gate.kernel", TRANSPOSED) for gate, name in GATES.items()),
            *(rule(f"{MIXER}{gate}.bias", f"mixer.{name}_bias") for gate, name in GATES.items()),
            *same(MIXER, "mixer.", {"multihead_norm.weight": "norm.scale"}),
        ],
        read=_read,
        write=_write,
        harmless=(
            "norm_reduction_force_float32", "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode",
            "return_last_states", "autocast_kernel_dtype", "inference_state_dtype", "max_inference_chunksize",
        ),
    )
]  # fmt: skip
