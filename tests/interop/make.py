"""Makes goldens/*.npz from the reference packages: config.json as they save it, tokens, logits, gradients. Run by hand:

    python tests/interop/make.py [case ...]        in the environment of tests/goldens/make.py, on a CPU

A case is a whole model of a package with the weights of values.py under the names of its own file, so that a golden
holds none: logits, and of each tensor's gradient of the mean loss its length and a few projections. Layers of
flash-linear-attention call Triton kernels; on a CPU its own naive functions take their places (goldens/fla_on_cpu.py).
"""

import functools
import importlib
import inspect
import json
import pathlib
import sys
import tempfile
import warnings

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "goldens")]

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from values import draw, projections  # noqa: E402

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
VOCAB, TIME = 40, 24
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
WIDE = SIZES | {"intermediate_size": 24}
HEADS = WIDE | {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = SIZES | {"state_size": 8}
MAMBA2 = SIZES | {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1}
HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
GRANITE = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 24,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
}
NEMOTRON = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
    "head_dim": 6,
    "mamba_num_heads": 3,
    "mamba_head_dim": 8,
    "n_groups": 3,
    "ssm_state_size": 8,
}
QWEN = {
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
FLA = WIDE | {"num_heads": 2}
XLSTM = {"autocast_kernel_dtype": "float32"}
LORA = {"decay_low_rank_dim": 3, "a_low_rank_dim": 4, "v_low_rank_dim": 5, "gate_low_rank_dim": 6}


def rope(kind: str, **numbers) -> dict:
    """Trained on 8 tokens, for three times as many: the golden's 24 are beyond."""
    return {
        "max_position_embeddings": 24,
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": 100.0,
            "factor": 3.0,
            "original_max_position_embeddings": 8,
            **numbers,
        },
    }


# name: (model_type, what its config is given)
CASES = {
    "llama": ("llama", HEADS | {"head_dim": 8, "rms_norm_eps": 1e-3}),
    "llama_tied": ("llama", WIDE | {"num_attention_heads": 2, "tie_word_embeddings": True, "rope_theta": 500.0}),
    "llama_biases": ("llama", HEADS | {"attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("llama", HEADS | rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "yarn_rope": ("llama", HEADS | rope("yarn", beta_fast=8.0, beta_slow=1.0)),
    "linear_rope": ("llama", HEADS | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0}}),
    "qwen2": ("qwen2", HEADS | {"rms_norm_eps": 1e-5}),
    "qwen2_windows": ("qwen2", HEADS | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "mistral": ("mistral", HEADS | {"sliding_window": 5}),
    "qwen3": ("qwen3", HEADS | {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", HEADS),
    "phi3_partial": ("phi3", HEADS | {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "mamba": ("mamba", MAMBA),
    "mamba_odd": ("mamba", MAMBA | {"expand": 3, "conv_kernel": 3, "time_step_rank": 5, "tie_word_embeddings": False}),
    "mamba_biases": ("mamba", MAMBA | {"use_bias": True}),
    "falcon_mamba": ("falcon_mamba", MAMBA | {"mixer_rms_eps": 1e-3}),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2_limits": ("mamba2", MAMBA2 | {"use_bias": True, "time_step_limit": (0.2, 1.5)}),
    "mamba2_groups": ("mamba2", MAMBA2 | {"n_groups": 2, "conv_kernel": 3, "tie_word_embeddings": True}),
    "bamba": ("bamba", HEADS | HYBRID | {"attn_layer_indices": [1]}),
    "granite": ("granitemoehybrid", HEADS | HYBRID | GRANITE | {"tie_word_embeddings": True}),
    "granite_rope": ("granitemoehybrid", HEADS | HYBRID | GRANITE | {"position_embedding_type": "rope"}),
    "nemotron_h": ("nemotron_h", HEADS | NEMOTRON),
    "xlstm": ("xlstm", SIZES | {"hidden_size": 64, "num_heads": 2, "norm_eps": 0.1} | XLSTM),
    "qwen3_next": ("qwen3_next", HEADS | QWEN | {"num_experts": 0}),
    "qwen3_5": ("qwen3_5_text", HEADS | QWEN | {"linear_key_head_dim": 8}),
    "gla": ("gla", FLA),
    "retnet": ("retnet", FLA | {"norm_eps": 1e-3}),
    "linear_attn": ("linear_attn", FLA | {"feature_map": "elu", "expand_k": 0.5}),
    "hgrn2": ("hgrn2", FLA | {"expand_ratio": 8, "norm_eps": 1e-2}),
    "delta_net": ("delta_net", FLA | {"use_gate": True, "allow_neg_eigval": True}),
    "kda": ("kda", FLA | {"head_dim": 6, "norm_eps": 1e-4}),
    "rwkv6": ("rwkv6", FLA | {"proj_low_rank_dim": 3, "gate_low_rank_dim": 5}),
    "rwkv7": ("rwkv7", FLA | {"num_heads": None, "head_dim": 8, **LORA}),
    "gla_hybrid": ("gla", FLA | {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}}),
    "kda_hybrid": (
        "kda",
        FLA
        | {
            "head_dim": 6,
            "num_hidden_layers": 3,
            "attn": {"layers": [1], "num_heads": 2, "window_size": 5, "rope_theta": 100.0},
        },
    ),
    "gated_deltanet": ("gated_deltanet", FLA | {"num_v_heads": 4, "head_dim": 6, "expand_v": 1.5}),
}  # fmt: skip


SINGLE = ("retnet", "kda", "rwkv6", "rwkv7")  # whose plain functions are float32
FLA_MODELS = ("gla", "retnet", "linear_attn", "hgrn2", "delta_net", "gated_deltanet", "kda", "rwkv6", "rwkv7")


@functools.cache
def patch_models() -> None:
    """Import fla, which takes names of transformers' over: `mamba` is its own from then on."""
    import fla.layers.attn as attn
    import fla.models as models
    import fla.modules.mlp as mlp
    from family import RMSNorm
    from fla_on_cpu import patch_fla

    class BlockNorm(RMSNorm):
        """That adds the residual, as a block calls it."""

        def forward(self, x, residual=None, prenorm=False):
            x = x if residual is None else x + residual
            y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
            return (y, x) if prenorm else y

    class BlockLayerNorm(torch.nn.LayerNorm):
        def forward(self, x, residual=None, prenorm=False):
            x = x if residual is None else x + residual
            return (super().forward(x), x) if prenorm else super().forward(x)

    def softmax(q, k, v, causal, window_size):
        rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        seen = (columns <= rows) & ((window_size[0] < 0) | (columns >= rows - window_size[0]))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)

    patch_fla()
    attn.flash_attn_func = softmax  # a CUDA kernel of another package
    mlp.swiglu_linear = lambda gate, up, weight, bias: F.linear(F.silu(gate) * up, weight, bias)
    for name in FLA_MODELS:
        module = getattr(getattr(models, name), f"modeling_{name}")
        module.RMSNorm, module.LayerNorm = BlockNorm, BlockLayerNorm


def plain_functions(model_type: str) -> None:
    """transformers' own torch functions, not the kernels of another package."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"):
        setattr(module, name, inspect.unwrap(getattr(module, name)))


def build(name: str, folder: pathlib.Path) -> torch.nn.Module:
    """The case's model, saved into `folder` with the weights of values.py and opened again."""
    model_type, given = CASES[name]
    if model_type in FLA_MODELS:
        patch_models()
    if model_type.startswith("qwen3_"):
        plain_functions(model_type.removesuffix("_text"))
    config = transformers.AutoConfig.for_model(model_type, **given)
    config._attn_implementation = "eager"
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    file = folder / "model.safetensors"
    values = {key: torch.from_numpy(draw(key, tuple(x.shape))) for key, x in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(values, file, metadata={"format": "pt"})
    return load(folder)


def class_of(architecture: str) -> type:
    """fla takes the name `mamba` over from transformers, but not the class."""
    return getattr(transformers, architecture, None) or getattr(importlib.import_module("fla.models"), architecture)


def load(folder: pathlib.Path) -> torch.nn.Module:
    """Of the class that its config.json names."""
    found = class_of(json.loads((folder / "config.json").read_text())["architectures"][0])
    return found.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def tokens() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).randint(VOCAB, size=(2, TIME)))


def make(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = build(name, folder)
        if CASES[name][0] not in SINGLE:
            model = model.double()  # what is compared is our rounding alone
        ids = tokens()
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)).backward()
        shapes = {key: list(x.shape) for key, x in safetensors.torch.load_file(folder / "model.safetensors").items()}
        config = json.loads((folder / "config.json").read_text())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
        model = model.float()
        model.save_pretrained(folder)  # gradients, under the file's names
        found = {
            key: projections(key, x.numpy())
            for key, x in safetensors.torch.load_file(folder / "model.safetensors").items()
        }
    path = HERE / "goldens" / f"{name}.npz"
    arrays = {"tokens": ids.numpy().astype(np.int32), "logits": logits.detach().float().numpy()}
    text = json.dumps({"config": config, "shapes": shapes})
    np.savez_compressed(path, about=text, gradients=np.stack([found[key] for key in shapes]), **arrays)
    print(f"{path.name}: {path.stat().st_size / 1024:.1f} kB, logits up to {logits.abs().max():.2f}")


if __name__ == "__main__":
    (HERE / "goldens").mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        make(name)
