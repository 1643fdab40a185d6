"""Makes the golden files of tests/zoo/test_goldens.py from the reference models. Run by hand:

    pip install torch triton transformers flash-linear-attention     (once, in an environment of its own, CPU is enough)
    python tests/goldens/make.py [family ...]

Each file holds a model of two layers: weights, tokens, logits, the gradient of every parameter, the final states. The
mixers (and RWKV's channel mixing) are the reference packages' own layers; embedding, norms, MLP, residuals and head
around them are the lines of `Model`; a family is a function of fla_layers.py or transformers_layers.py. Layers of
flash-linear-attention call Triton kernels: on a CPU its own `naive` functions, or the torch function of the same name,
take their places (fla_on_cpu.py). Logits and gradients come from a full pass; states, and the check that decoding gives
the same logits, from a prefill and single tokens through the package's cache.
"""

import json
import pathlib
import sys
import warnings
from collections.abc import Callable

import fla_layers
import numpy as np
import torch
import torch.nn.functional as F
import transformers_layers
from family import D_FF, LAYERS, PREFILL, TIME, VOCAB, D, Family, RMSNorm, matrices, same
from fla_on_cpu import patch_fla
from torch import nn

warnings.simplefilter("ignore")
FAMILIES = {
    function.__name__: function
    for function in (
        transformers_layers.attention,
        transformers_layers.attention_qwen3_next,
        fla_layers.forgetting_attention,
        fla_layers.linear_attention,
        fla_layers.linear_attention_relu,
        fla_layers.linear_attention_taylor2,
        fla_layers.linear_attention_identity,
        fla_layers.retnet,
        transformers_layers.lightning,
        fla_layers.gated_retention,
        transformers_layers.mlstm,
        fla_layers.gla,
        fla_layers.hgrn2,
        fla_layers.rwkv6,
        fla_layers.delta_net,
        fla_layers.delta_net_gated,
        fla_layers.gated_delta_net,
        transformers_layers.gated_delta_net_qwen3_next,
        fla_layers.gated_delta_product,
        fla_layers.kda,
        fla_layers.rwkv7,
    )
}


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
        self.mixer_norms = nn.ModuleList(RMSNorm(D, eps=family.epsilon) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(family.mlp(i) if family.mlp else SwiGLU() for i in range(LAYERS))
        self.mlp_norms = nn.ModuleList(RMSNorm(D, eps=family.epsilon) for _ in range(LAYERS))
        self.norm = RMSNorm(D, eps=family.epsilon)
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
                theirs = theirs if isinstance(theirs, list) else [theirs]
                rows = [turn(*(of(module.get_parameter(one)) for one in theirs)) for module in modules]
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
    config |= {"num_layers": LAYERS, "d_model": D, "d_ff": D_FF, "vocab_size": VOCAB, "norm_epsilon": family.epsilon}
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
