"""Makes goldens/*.npz from the reference packages: config.json as they save it, tokens, logits, gradients. Run by hand:

    python tests/interop/make.py [case ...]        in the environment of tests/goldens/make.py, on a CPU

A case is a whole model of a package with the weights of values.py under the names of its own file, so that a golden
holds none: logits, and of each tensor's gradient of the mean loss its length and a few projections. Layers of
flash-linear-attention call Triton kernels; on a CPU its own naive functions take their places (goldens/fla_on_cpu.py).
"""

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
FLA = WIDE | {"num_heads": 2}

# name: (model_type, what its config is given)
CASES = {
    "llama": ("llama", HEADS | {"head_dim": 8, "rms_norm_eps": 1e-3}),
    "llama_tied": ("llama", WIDE | {"num_attention_heads": 2, "tie_word_embeddings": True, "rope_theta": 500.0}),
    "mistral": ("mistral", HEADS | {"sliding_window": 5}),
    "qwen3": ("qwen3", HEADS | {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", HEADS),
    "mamba": ("mamba", MAMBA),
    "mamba_odd": ("mamba", MAMBA | {"expand": 3, "conv_kernel": 3, "time_step_rank": 5, "tie_word_embeddings": False}),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2_groups": ("mamba2", MAMBA2 | {"n_groups": 2, "conv_kernel": 3, "tie_word_embeddings": True}),
    "gla": ("gla", FLA),
    "retnet": ("retnet", FLA | {"norm_eps": 1e-3}),
    "linear_attn": ("linear_attn", FLA | {"feature_map": "elu", "expand_k": 0.5}),
    "hgrn2": ("hgrn2", FLA | {"expand_ratio": 8, "norm_eps": 1e-5}),
    "delta_net": ("delta_net", FLA | {"use_gate": True, "allow_neg_eigval": True}),
    "gated_deltanet": ("gated_deltanet", FLA | {"num_v_heads": 4, "head_dim": 6, "expand_v": 1.5}),
}  # fmt: skip


FLA_MODELS = ("gla", "retnet", "linear_attn", "hgrn2", "delta_net", "gated_deltanet")


def patch_models() -> None:
    """Import fla, which takes names of transformers' over: `mamba` is its own from then on."""
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

    patch_fla()
    mlp.swiglu_linear = lambda gate, up, weight, bias: F.linear(F.silu(gate) * up, weight, bias)
    for name in FLA_MODELS:
        module = getattr(getattr(models, name), f"modeling_{name}")
        module.RMSNorm = BlockNorm


def build(name: str, folder: pathlib.Path) -> torch.nn.Module:
    """The case's model, saved into `folder` with the weights of values.py and opened again."""
    model_type, given = CASES[name]
    if model_type in FLA_MODELS and "fla" not in sys.modules:
        patch_models()
    config = transformers.AutoConfig.for_model(model_type, **given)
    config._attn_implementation = "eager"
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    file = folder / "model.safetensors"
    values = {key: torch.from_numpy(draw(key, tuple(x.shape))) for key, x in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(values, file, metadata={"format": "pt"})
    return load(folder)


def load(folder: pathlib.Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).randint(VOCAB, size=(2, TIME)))


def make(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = build(name, folder)
        ids = tokens()
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)).backward()
        shapes = {key: list(x.shape) for key, x in safetensors.torch.load_file(folder / "model.safetensors").items()}
        config = json.loads((folder / "config.json").read_text())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
        model.save_pretrained(folder)  # gradients, under the file's names
        found = {
            key: projections(key, x.numpy())
            for key, x in safetensors.torch.load_file(folder / "model.safetensors").items()
        }
    path = HERE / "goldens" / f"{name}.npz"
    arrays = {"tokens": ids.numpy().astype(np.int32), "logits": logits.detach().numpy()}
    text = json.dumps({"config": config, "shapes": shapes})
    np.savez_compressed(path, about=text, gradients=np.stack([found[key] for key in shapes]), **arrays)
    print(f"{path.name}: {path.stat().st_size / 1024:.1f} kB, logits up to {logits.abs().max():.2f}")


if __name__ == "__main__":
    (HERE / "goldens").mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        make(name)
