"""The reader of compiled steps, and the step of a family compiled for a GPU that is not there."""

import pytest

from benchmarks import gpu_static
from tests.kernels import hopper
from zoo import config

HLO = """HloModule jit_step

%fused.1 (p: bf16[8,4]) -> f32[8,4] {
  ROOT %convert.1 = f32[8,4]{1,0} convert(%p)
}

%inner (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %y = f32[8,4]{1,0} get-tuple-element(%q), index=1
  %fusion.2 = f32[8,4]{1,0} fusion(%y), kind=kLoop, calls=%fused.1, metadata={op_name="jit(step)/transpose(jvp())/mul"}
}

%body (s: (s32[], bf16[6,8,4], f32[8,4])) -> (s32[], bf16[6,8,4], f32[8,4]) {
  %s = (s32[], bf16[6,8,4]{2,1,0}, f32[8,4]{1,0}) parameter(0)
  %stack = bf16[6,8,4]{2,1,0} get-tuple-element(%s), index=1
  %fusion.1 = f32[8,4]{1,0} fusion(%stack), kind=kLoop, calls=%fused.1, metadata={op_name="jit(step)/add"}
  %gemm_fusion.1 = f32[8,4]{1,0} fusion(%fusion.1), kind=kCustom, calls=%fused.1
  %kernel.1 = (f32[8,4]{1,0}, bf16[8,4]{1,0}) custom-call(%fusion.1), custom_call_target="mosaic_gpu_v2"
  %while.2 = (s32[], f32[8,4]) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (a: bf16[6,8,4]) -> f32[8,4] {
  %while.1 = (s32[], bf16[6,8,4]) while(%u), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""


def test_bytes_of_a_layer():
    kernels = {kernel.name: kernel for kernel in gpu_static.kernels_of_layers(HLO, layers=6)}
    moved = {name: (kernel.kind, kernel.moved) for name, kernel in kernels.items()}
    assert moved == {
        "fusion.1": ("other", 4 * 32 + 2 * 32),  # of the stack one layer
        "gemm_fusion.1": ("matmul", 2 * 4 * 32),
        "kernel.1": ("pallas", 4 * 32 + 2 * 32 + 4 * 32),
        "fusion.2": ("other", 3 * 2 * 4 * 32),
    }
    forward, backward = (line for line in gpu_static.table("gla", list(kernels.values()), 0))
    assert "other   0.00 GB" in forward and "backward" in backward


@pytest.mark.gpu_compile
@pytest.mark.parametrize("mixer", ["gla", "mamba2"])
def test_no_kernel_runs_twice_in_the_forward_pass(mixer):
    """XLA would, to write a result into the stack of all layers' (kernels.mosaic_gpu.launch)."""
    settings = config.preset("125m")
    settings.model.mixer, settings.model.vocab_size, settings.model.dtype = mixer, 512, "bfloat16"
    settings.model.remat, settings.model.num_layers = "minimal", gpu_static.LAYERS
    settings.train.batch_size, settings.train.context_length = 16, 512
    text = gpu_static.compile_step(settings, hopper.h200())
    kernels = [k for k in gpu_static.kernels_of_layers(text, gpu_static.LAYERS) if k.kind == "pallas"]
    assert {k.loop for k in kernels} == {0, 1}
    assert len([k for k in kernels if k.loop == 0]) == {"gla": 3, "mamba2": 2}[mixer]  # states, scores, out
