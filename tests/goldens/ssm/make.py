"""Make mamba.npz and mamba2.npz: two-layer models of transformers, run by its pure torch code on a CPU.

    python -m venv goldens && goldens/bin/pip install torch transformers numpy
    goldens/bin/python tests/goldens/ssm/make.py

Each file holds the weights (`w.<name>`), tokens [B, T], hidden [B, T, D] after the final norm, a cotangent of it, the
gradient of the embedding table (every position has a token of its own, so it is the inputs' gradient), and decoding:
hidden states of the last tokens one by one after a prefill, with the states of both layers at the end.
"""

import pathlib

import numpy as np
import torch
from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel

BATCH, TIME, PREFILL, WIDTH = 2, 12, 7, 16
COMMON = dict(vocab_size=BATCH * TIME, hidden_size=WIDTH, num_hidden_layers=2, layer_norm_epsilon=1e-5, expand=2)


def make(name, model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter_name.endswith("A_log"):
                parameter.copy_(0.7 * noise)
            elif parameter_name.endswith("dt_bias") or parameter_name.endswith("dt_proj.bias"):
                parameter.copy_(noise - 1)
            elif parameter.ndim == 1:  # norms, D, biases: away from 1 and 0
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / (parameter.shape[-1] ** 0.5 if "embed" not in parameter_name else 1.0))
    model = model.eval()
    tokens = torch.randperm(BATCH * TIME).reshape(BATCH, TIME)
    hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
    cotangent = torch.randn_like(hidden)
    (hidden * cotangent).sum().backward()
    with torch.no_grad():
        out = model(input_ids=tokens[:, :PREFILL], use_cache=True)
        decoded = []
        for t in range(PREFILL, TIME):
            out = model(input_ids=tokens[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            decoded.append(out.last_hidden_state)
    arrays = {
        "tokens": tokens,
        "hidden": hidden,
        "cotangent": cotangent,
        "embedding_gradient": model.embeddings.weight.grad,
        "decoded": torch.cat(decoded, 1),
    }
    for layer in range(2):
        arrays[f"conv_state.{layer}"] = out.cache_params.get_conv_state(layer, state_idx=0)
        arrays[f"ssm_state.{layer}"] = out.cache_params.get_recurrent_state(layer, state_idx=0)
    arrays |= {f"w.{key}": value for key, value in model.named_parameters()}
    path = pathlib.Path(__file__).parent / f"{name}.npz"
    np.savez_compressed(path, **{key: value.detach().float().numpy() for key, value in arrays.items()})
    print(path.name, path.stat().st_size)


make("mamba", MambaModel(MambaConfig(**COMMON, state_size=4, time_step_rank=3)))
make("mamba2", Mamba2Model(Mamba2Config(**COMMON, state_size=4, num_heads=4, head_dim=8, n_groups=2, chunk_size=4)))
