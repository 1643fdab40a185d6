"""What operations compute and move, read off pieces of compiled programs, and the times that follow."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import kernels
from benchmarks import tpu_static
from kernels import dispatch
from zoo import chips, hlo, pallas_costs, roofline
from zoo.chips import Chip
from zoo.hlo import Collective
from zoo.pallas_costs import Kernel
from zoo.roofline import Operation

CHIP = Chip("TPU v5 lite", peak=1e12, memory=1e9, bandwidth=1e9, link=1e8, sides=2, wraps=4, clock=1e9)


def operations(*lines, kernels=(), computations=""):
    entry = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule jit_f, num_partitions=4\n\n{computations}\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}\n"
    return roofline.operations(hlo.parse(text), kernels)


X = "%x = bf16[4,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)"
WINDOW = "%w = bf16[256,64,1]{1,0,2:T(8,128)(2,1)S(1)} parameter(1)"
W = "%w = bf16[256,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)"  # in vector memory


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("convolution(%x, %w), window={size=1}, dim_labels=0bf_io0->0bf", 2 * 4 * 512 * 256 * 64),
        ("dot(%x, %w), lhs_contracting_dims={2}, rhs_contracting_dims={0}", 2 * 4 * 512 * 256 * 64),
    ],
)
def test_products(line, flops):
    (found,) = operations(X, WINDOW if "window" in line else W, f"%y = f32[4,512,64]{{2,1,0}} {line}")
    assert (found.kind, found.flops) == ("matmul", flops)
    assert found.bytes == 4 * 512 * 256 * 2 + 4 * 512 * 64 * 4  # w is on the chip


def test_a_batched_product_counts_one_place_of_its_window():
    """Eight products of 512 x 256 by 256 x 64, written as a convolution along the batch with seven paddings."""
    (found,) = operations(
        "%x = bf16[8,512,256]{2,1,0} parameter(0)",
        "%w = bf16[8,256,64]{2,1,0} parameter(1)",
        "%y = f32[8,512,64]{2,1,0} convolution(%x, %w), "
        "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
    )
    assert found.flops == 2 * 8 * 512 * 256 * 64


STACKED = """\
%fused (a: bf16[24,512,256], i: s32[]) -> bf16[24,512,256] {
  %a = bf16[24,512,256]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = bf16[1,512,256]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,512,256}
  %t = bf16[1,512,256]{2,1,0} multiply(%s, %s)
  ROOT %u = bf16[24,512,256]{2,1,0} dynamic-update-slice(%a, %t, %i, %zero, %zero)
}"""


def test_a_fusion_moves_the_slices_that_it_takes_of_a_stacked_array():
    (found,) = operations(
        "%p = bf16[24,512,256]{2,1,0} parameter(0)",
        "%n = s32[] parameter(1)",
        "%f = bf16[24,512,256]{2,1,0} fusion(%p, %n), kind=kLoop, calls=%fused, "
        'backend_config={"window_config":{"estimated_cycles":"700"}}',
        computations=STACKED,
    )
    layer = 512 * 256 * 2
    assert found == ("f", "other", 0, 2 * layer + 4, 1, 700, "")


def test_a_copy_to_vector_memory_reads_hbm_once():
    (found,) = operations(
        X,
        "%c = (bf16[4,512,256]{2,1,0:T(8,128)(2,1)S(1)}, bf16[4,512,256]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) "
        "copy-start(%x)",
        "%d = bf16[4,512,256]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%c)",
    )
    assert found.bytes == 4 * 512 * 256 * 2


def test_a_kernel_has_the_costs_of_its_pallas_call():
    def double(x_ref, w_ref, o_ref):
        o_ref[...] = x_ref[...] @ w_ref[...]

    def call(x, w):
        rows = pl.BlockSpec((8, 100), lambda i: (i, 0))
        whole = pl.BlockSpec((100, 64), lambda i: (0, 0))
        return pl.pallas_call(
            double, grid=(4,), in_specs=[rows, whole], out_specs=pl.BlockSpec((8, 64), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((32, 64), jnp.float32), name="products",
        )(x, w)  # fmt: skip

    jaxpr = jax.make_jaxpr(jax.jit(call))(jnp.zeros((32, 100)), jnp.zeros((100, 64))).jaxpr
    (exact,), (padded,) = pallas_costs.kernels(jaxpr, lanes=1), pallas_costs.kernels(jaxpr)
    moved = 4 * (32 * 100 + 100 * 64 + 32 * 64)
    assert exact == ("products", 2 * 32 * 100 * 64, moved, 4 * 32 * 64)
    assert padded.flops == 4 * 2 * 128**3  # of four blocks
    (found,) = operations(
        X,
        '%products.3 = f32[32,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/products/pallas_call"}',
        kernels=[exact, Kernel("products", 1, 2, 3)],
    )
    assert (found.name, found.kind, found.flops) == ("products", "kernel", exact.flops)


def test_attention_computes_the_blocks_below_the_diagonal():
    """Four by four of 512 tokens: ten. With a window of 512, two for each."""

    def flops(window):
        x = jax.ShapeDtypeStruct((1, 2048, 2, 128), jnp.bfloat16)
        with dispatch.use_device(dispatch.Device("tpu", "TPU v5 lite")):
            made = jax.make_jaxpr(lambda q, k, v: kernels.attention(q, k, v, causal=True, window=window))(x, x, x)
        (found,) = pallas_costs.kernels(made.jaxpr)
        return found.flops

    a_block = 2 * 2 * 2 * 512 * 512 * 128  # of two heads, two products
    assert flops(None) == 10 * a_block and flops(512) == 8 * a_block


def test_what_kernels_take_over_their_floors_is_what_is_stored():
    stored = json.loads(tpu_static.RESULTS.read_text())["results"]
    shapes = {
        "linear_attention_per_key": "gla_1.3b",
        "linear_attention_scalar": "mamba2_8b",
        "delta_rule_per_key": "delta_rule_vector",
        "delta_rule_scalar": "delta_rule_scalar",
        "selective_scan": "mamba_1.3b",
    }
    assert len(pallas_costs.TPU_CYCLES) == 2 * len(shapes)
    for (kernel, shape), part, (name, chip) in itertools.product(
        shapes.items(), tpu_static.KERNELS, (("v5e", "TPU v5 lite"), ("v5p", "TPU v5"), ("v6e", "TPU v6"))
    ):
        row = stored[f"{shape} {name}"][part]
        ratio = max(1.0, row["cycles"] / max(row["matmul_floor"], row["memory_floor"]))
        assert pallas_costs.over_floor(f"{kernel}_{part}", chip) == pytest.approx(ratio, abs=0.006), (
            kernel,
            part,
            name,
        )
    assert pallas_costs.over_floor("selective_scan_forward", "H200") == 1.0
    assert pallas_costs.over_floor("dplr_delta_rule_per_key_forward", "TPU v6") == 1.0


def operation(kind, flops, moved, count=1, cycles=0, name=""):
    return Operation(name, kind, flops, moved, count, cycles, "")


def test_a_step_is_the_sum_of_what_binds_each_operation():
    found = [
        operation("matmul", 3e9, 1e6, count=10, cycles=4_000_000),  # 3 ms of arithmetic
        operation("other", 0, 2e6, count=5, cycles=2_500_000),  # 2 ms of memory
        operation("kernel", 1e9, 0, name="selective_scan_forward"),
    ]
    sent = [Collective("all-gather", 10**6, 4, (0, 1), True, ""), Collective("all-reduce", 10**6, 1, (0, 1), False, "")]
    estimate = roofline.estimate(found, sent, CHIP, lambda c: 2)
    kernel = 1e-3 * pallas_costs.TPU_CYCLES["selective_scan_forward"][0]
    assert estimate.kernels == pytest.approx(kernel)
    assert estimate.operations == pytest.approx(30e-3 + 10e-3 + kernel)
    assert (estimate.hidden, estimate.exposed) == pytest.approx((20e-3, 5e-3))
    assert estimate.step == pytest.approx(estimate.operations + 5e-3)
    assert estimate.compiler == pytest.approx(10 * 4e-3 + 5 * 2.5e-3)
    assert estimate.bound() == f"matrix products {30e-3 / estimate.step:.0%}"
    assert sum(estimate.shares().values()) == pytest.approx(1)
    slow = roofline.estimate(found, [Collective("all-gather", 10**7, 40, (0, 1), True, "")], CHIP, lambda c: 2)
    assert (slow.step, slow.bound()) == (pytest.approx(2.0), "interconnect 98%")


def test_links_by_where_a_group_lies():
    """4 x 2 chips: the sides of 4 are rings, those of 2 are lines."""
    coordinates = {n: (n // 2, n % 2) for n in range(8)}
    links = roofline.links(coordinates, CHIP)

    def of(kind, *group):
        return links(Collective(kind, 1, 1, group, False, ""))

    assert of("all-gather", 0, 2, 4, 6) == 2 and of("all-gather", 0, 1) == 1
    assert of("all-reduce", *range(8)) == 3 and of("collective-permute", 0, 2) == 1
    assert roofline.links(coordinates, CHIP._replace(sides=0))(Collective("all-gather", 1, 1, (0, 2), False, "")) == 1


def test_chips_by_what_jax_calls_them():
    names = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    names |= {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "TPU v4": "v4", "TPU7x": "tpu7x"}
    for kind, name in names.items():
        assert chips.of(kind) is chips.CHIPS[name], kind
    assert chips.of("cpu") is None


@pytest.mark.parametrize("name", [name for name, chip in chips.CHIPS.items() if chip.clock and chip.sides])
def test_a_clock_is_a_whole_number_of_matrix_units(name):
    chip = chips.CHIPS[name]
    units = chip.peak / (2 * 128**2 * chip.clock)
    assert math.isclose(units, round(units), rel_tol=0.01)
