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


class ShortConvolution(nn.Conv1d):
    """With a cache of the last inputs, as many as it has taps."""

    def __init__(self, hidden_size, kernel_size, bias=False, activation=None, **_):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias)
        self.activation = {"silu": F.silu, None: lambda x: x}[activation]

    def forward(self, x, cache=None, output_final_state=False, **_):
        taps = self.kernel_size[0]
        cache = x.new_zeros(x.shape[0], x.shape[2], taps) if cache is None else cache
        x = torch.cat([cache, x.transpose(1, 2)], 2)
        y = self.activation(super().forward(x[..., 1:])).transpose(1, 2)
        return y, x[..., -taps:] if output_final_state else None


def patch_delta_rules():
    import fla.layers.delta_net
    import fla.layers.gated_deltanet
    import fla.layers.gated_deltaproduct
    import fla.layers.kda
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.kda.gate import naive_kda_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    def delta_rule(q, k, v, beta, initial_state, output_final_state, **_):
        arrays = (x.transpose(1, 2) for x in (unit(q), unit(k), v, beta))
        o, last = delta_rule_recurrence(*arrays, initial_state, output_final_state)
        return o.transpose(1, 2), last

    def gated(q, k, v, g, beta, A_log=None, dt_bias=None, allow_neg_eigval=False, **kwargs):
        if A_log is not None:
            g, beta = -A_log.exp() * F.softplus(g + dt_bias), (1 + allow_neg_eigval) * beta.sigmoid()
        q, k = (unit(x).repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        state = {name: kwargs[name] for name in ("initial_state", "output_final_state")}
        return naive_recurrent_gated_delta_rule(q, k, v, beta, g, **state)

    def product(q, k, v, g, beta, initial_state, output_final_state, num_householder, **_):
        return naive_recurrent_gated_delta_product(
            unit(q), unit(k), v, g, beta, q.shape[-1] ** -0.5, None, initial_state, output_final_state, num_householder
        )

    def kda(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, initial_state, output_final_state, **_):
        g, beta = naive_kda_gate(g, A_log, dt_bias), (1 + allow_neg_eigval) * beta.sigmoid()
        return naive_recurrent_kda(unit(q), unit(k), v, g, beta, None, initial_state, output_final_state)

    layers = fla.layers
    for module in (layers.delta_net, layers.gated_deltanet, layers.gated_deltaproduct, layers.kda):
        module.ShortConvolution, module.FusedRMSNormGated, module.RMSNorm = ShortConvolution, RMSNorm, RMSNorm
    layers.delta_net.chunk_delta_rule = layers.delta_net.fused_recurrent_delta_rule = delta_rule
    layers.gated_deltanet.chunk_gated_delta_rule = layers.gated_deltanet.fused_recurrent_gated_delta_rule = gated
    layers.gated_deltanet.GatedDeltaNet._use_fused_qkv_conv = lambda *_, **__: False
    layers.gated_deltaproduct.chunk_gated_delta_product = product
    layers.gated_deltaproduct.fused_recurrent_gated_delta_rule = gated
    layers.kda.chunk_kda = layers.kda.fused_recurrent_kda = kda


def patch_rwkv7():
    import fla.layers.rwkv7 as layer
    import fla.models.rwkv7.modeling_rwkv7 as model
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    def chunk(r, w, k, v, a, b, scale, initial_state, output_final_state, **_):
        arrays = (x.transpose(1, 2) for x in (r * scale * r.shape[-1] ** 0.5, k, v, a, b, w))
        o, last = dplr_recurrence(*arrays, initial_state, output_final_state)
        return o.transpose(1, 2), last

    def recurrent(kk, a, **kwargs):
        return chunk(a=-kk, b=kk * a, **kwargs)

    def token_shift(x, cu_seqlens=None, cache=None, output_cache=False):
        before = torch.zeros_like(x[:, :1]) if cache is None else cache.view(x.shape[0], 1, -1)
        return torch.cat([before, x[:, :-1]], 1) - x, x[:, -1]

    layer.chunk_rwkv7, layer.fused_mul_recurrent_rwkv7, layer.GroupNorm = chunk, recurrent, GroupNorm
    layer.fused_addcmul_rwkv7, layer.fused_k_rwkv7 = torch_addcmul_rwkv7, k_update_ref
    layer.gate_output_correction, layer.l2_norm = gate_output_correction_ref, unit
    layer.token_shift = model.token_shift = token_shift
    model.ACT2FN = {"sqrelu": lambda x: F.relu(x) ** 2}


def unit(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def patch_fla():
    import fla.layers.forgetting_attn
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
    from fla.ops.forgetting_attn.naive import naive_forgetting_attn
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    patch_delta_rules()
    patch_rwkv7()
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

    def forgetting_attn(q, k, v, g, **_):
        return naive_forgetting_attn(q, k, v, g)

    fla.layers.forgetting_attn.parallel_forgetting_attn = forgetting_attn
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
