"""What stands in for flash-linear-attention's Triton kernels on a CPU: its own `naive` functions and plain torch."""

import torch
import torch.nn.functional as F
from family import EPSILON, RMSNorm
from torch import nn


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
