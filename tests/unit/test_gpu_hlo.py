"""Kernels and bytes of HLO text, on small modules of which every answer is known."""

import pytest

from tav_jax.bench.cards import CARDS, Card
from tav_jax.bench.gpu_hlo import Kernel, read_kernels, total_bytes


def summary(text):
    return [(kernel.kind, kernel.bytes, kernel.flops, kernel.runs) for kernel in read_kernels(text)]


def entry(*lines):
    return "HloModule m\n\nENTRY %main (x: f32[4]) -> f32[4] {\n  " + "\n  ".join(lines) + "\n}\n"


X, Y = "%x = f32[4,8]{1,0} parameter(0)", "%y = f32[8,16]{1,0} parameter(1)"
CONVOLUTION = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="


def test_bookkeeping_starts_no_kernel():
    text = entry(X, "%b = f32[32]{0} bitcast(%x)", "ROOT %t = (f32[32]{0}) tuple(%b)")
    assert summary(text) == []


def test_a_kernel_reads_each_operand_once_and_writes_its_result():
    assert summary(entry(X, "ROOT %a = f32[4,8]{1,0} add(%x, %x)")) == [("other", 256, 0, 1)]


@pytest.mark.parametrize(
    "product",
    [
        pytest.param(
            "ROOT %p = (f32[4,16]{1,0}, s8[4096]{0}) custom-call(%x, /*index=1*/%y), "
            'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            id="cuBLAS, without its scratch memory",
        ),
        pytest.param(
            "ROOT %p = f32[4,16]{1,0} dot(%x, %y), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={0}",
            id="dot",
        ),
    ],
)
def test_matrix_products(product):
    expected = "matrix_product", 4 * (4 * 8 + 8 * 16 + 4 * 16), 2 * 4 * 8 * 16, 1
    assert summary(entry(X, Y, product)) == [expected]


def test_a_fusion_with_a_product_is_a_product():
    text = """
%fused (a: f32[4,8], b: f32[8,16]) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %p = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %n = f32[4,16]{1,0} negate(%p)
}

""" + entry(X, Y, "ROOT %f = f32[4,16]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused")
    assert summary(text) == [("matrix_product", 4 * (32 + 128 + 64), 1024, 1)]


@pytest.mark.parametrize(
    ("shapes", "target"),
    [
        pytest.param(("8,8,3", "5,3,3,3", "8,8,5"), "Forward", id="output"),
        pytest.param(("8,8,5", "5,3,3,3", "8,8,3"), "BackwardInput", id="input's gradient"),
        pytest.param(("8,8,3", "8,8,5", "5,3,3,3"), "BackwardFilter", id="kernel's gradient"),
    ],
)
def test_convolutions_and_their_gradients_cost_the_same(shapes, target):
    first, second, result = (shape if shape.startswith("5") else f"2,{shape}" for shape in shapes)
    text = entry(
        f"%x = bf16[{first}]{{3,2,1,0}} parameter(0)",
        f"%y = bf16[{second}]{{3,2,1,0}} parameter(1)",
        f"ROOT %c = (bf16[{result}]{{3,2,1,0}}, u8[1024]{{0}}) custom-call(%x, %y), "
        f'{CONVOLUTION}"__cudnn$conv{target}"',
    )
    numbers = 2 * 64 * 3 + 5 * 27 + 2 * 64 * 5
    assert summary(text) == [("convolution", 2 * numbers, 2 * 2 * 64 * 5 * 27, 1)]


@pytest.mark.parametrize(("suffix", "products"), [("", 2), ("Backward", 5)])
def test_attention(suffix, products):
    text = entry(
        "%x = bf16[1,6,2,8]{3,2,1,0} parameter(0)",
        "%y = bf16[1,10,2,8]{3,2,1,0} parameter(1)",
        "ROOT %a = (bf16[1,2,6,8]{3,1,2,0}, u8[0]{0}) custom-call(%x, %y), "
        f'custom_call_target="__cudnn$fmhaSoftmax{suffix}", backend_config='
        '{"intermediate_tensor_shape": {"dimensions": ["1", "2", "6", "10"]}}',
    )
    flops = products * 2 * (2 * 6 * 10) * 8
    assert summary(text) == [("attention", 2 * (96 + 160 + 96), flops, 1)]


LOOP = """
%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %n = f32[4,8]{1,0} negate(%v)
  ROOT %r = (s32[], f32[4,8]{1,0}) tuple(%i, %n)
}

"""
OUTSIDE = [X, "%before = f32[4,8]{1,0} add(%x, %x)", "%w = (s32[], f32[4,8]{1,0}) tuple(%x)"]
WHILE = "ROOT %l = (s32[], f32[4,8]{1,0}) while(%w), condition=%cond, body=%body"


def test_a_loop_counts_as_often_as_it_runs():
    text = LOOP + entry(*OUTSIDE, WHILE + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert summary(text) == [("other", 256, 0, 1), ("other", 256, 0, 7)]
    assert total_bytes(read_kernels(text)) == 8 * 256
    assert total_bytes(read_kernels(text), "attention") == 0


def test_of_a_loop_over_timesteps_one_step_counts():
    assert summary(LOOP + entry(*OUTSIDE, WHILE)) == [("other", 256, 0, 1)]


def test_calls_are_followed_and_of_branches_the_largest_counts():
    text = """
%small (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  ROOT %s = f32[2]{0} negate(%a)
}

%large (b: f32[4,8]) -> f32[4,8] {
  %b = f32[4,8]{1,0} parameter(0)
  ROOT %n = f32[4,8]{1,0} negate(%b)
}

""" + entry(
        X,
        "%c = f32[4,8]{1,0} call(%x), to_apply=%large",
        "ROOT %d = f32[4,8]{1,0} conditional(%x), branch_computations={%small, %large}",
    )
    assert summary(text) == [("other", 256, 0, 1)] * 2


def test_only_the_part_that_a_fusion_slices_or_updates_moves():
    text = """
%slice (a: f32[64,8], i: s32[]) -> f32[1,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}
}

%update (a2: f32[64,8], u: f32[1,8], i2: s32[]) -> f32[64,8] {
  %a2 = f32[64,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i2 = s32[] parameter(2)
  ROOT %r = f32[64,8]{1,0} dynamic-update-slice(%a2, %u, %i2, %i2)
}

""" + entry(
        "%x = f32[64,8]{1,0} parameter(0)",
        "%j = s32[] parameter(1)",
        "%f = f32[1,8]{1,0} fusion(%x, %j), kind=kLoop, calls=%slice",
        "ROOT %g = f32[64,8]{1,0} fusion(%x, %f, %j), kind=kLoop, calls=%update",
    )
    # Eight numbers in, eight out, and the index.
    assert summary(text) == [("other", 68, 0, 1)] * 2


def test_the_two_halves_of_an_asynchronous_operation_count_once():
    text = entry(
        X,
        "%s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), dimensions={0}",
        "ROOT %d = f32[8,8]{1,0} all-gather-done(%s)",
    )
    assert summary(text) == [("other", 4 * (32 + 64), 0, 1)]


def test_the_floor_takes_of_each_kernel_what_is_slower():
    card = CARDS["h100"]
    kernels = [
        Kernel("matrix_product", "bound by its products", 1, int(card.bfloat16_rate), 16, 2),
        Kernel("matrix_product", "in float32", 1, int(card.float32_rate), 32, 3),
        Kernel("other", "bound by its bytes", int(card.reached_bandwidth), 0, 16, 4),
    ]
    assert card.floor_seconds(kernels) == pytest.approx(2 + 3 + 4)
    assert card.work(kernels).kernels == 9


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_no_card_is_faster_than_published(card: Card):
    assert card.reached_bandwidth < card.memory_bandwidth
    assert card.bfloat16_rate < 989e12
    assert card.name in card.target_config()
