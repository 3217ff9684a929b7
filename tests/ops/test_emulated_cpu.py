"""Operations on emulated processors (tests/emulated_cpu.py): their own tests pass there, and tiles multiply."""

import pytest
import torch
from emulated_cpu import PROCESSORS, Emulated, needs_compiler
from helpers import assert_operations_pass_on

from gafext.ops.linear_int8 import quantize_weight

pytestmark = needs_compiler


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_tests_of_the_operations_pass(processor):
    """Sizes, strides, threads, what is empty or not finite; compiled graphs and misuse are the same everywhere."""
    kernels = "not compile and not opcheck and not every_instruction_set and not bad_input"
    own = {
        "amx": ("linear_int8", "conv3x3_int8", "conv3x3", "conv3x3_gradients", "geglu", "linear"),
        "avx512_bf16": ("flash_attention", "geglu", "linear"),
        "avx512_vnni": ("linear_int8", "conv3x3_int8", "conv3x3", "conv3x3_gradients"),
        "avx512": ("linear_int8", "conv3x3_int8"),
    }
    if processor == "avx512_bf16":
        kernels += " and not scratch and not more_exact"  # large problems in float32, as on "amx"
    assert_operations_pass_on(processor, own[processor], kernels)


@pytest.mark.parametrize("rows, products", [(31, 0), (32, 8), (100, 32)])
def test_tiles_multiply_from_a_block_of_rows_on(rows, products):
    """Of 32 rows, 32 columns and 64 features: here two blocks of columns, and one of features."""
    x, weight, bias = torch.randn(rows, 60), torch.randn(40, 60), torch.randn(40)
    inputs = x, *quantize_weight(weight), bias
    operation = Emulated("linear_int8", "amx")
    before = operation.tile_products
    out = operation(*inputs)
    assert operation.tile_products - before == products
    assert torch.equal(out, torch.ops.gafext.linear_int8(*inputs))


def test_tiles_multiply_bfloat16_directly():
    """conv3x3: 9 taps of 2 groups of channels, 2 pairs of columns, 2 of strips, the second of 33 pixels' third."""
    x = torch.randn(1, 64, 3, 11).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(40, 64, 3, 3).bfloat16()
    operation = Emulated("conv3x3", "amx")
    before = operation.tile_products
    out = operation(x, weight)
    assert operation.tile_products - before == 9 * 2 * 2 * 2 * 4
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    torch.testing.assert_close(out, exact.bfloat16(), atol=0.25, rtol=0.02)


@pytest.mark.parametrize("sizes", [(65, 257, 63), (500, 1283, 90), (33, 31, 700)], ids=str)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_processor_computes_the_same_bits(processor, sizes):
    rows, in_features, out_features = sizes
    inputs = torch.randn(rows, in_features), *quantize_weight(torch.randn(out_features, in_features))
    bias = torch.randn(out_features)
    expected = torch.ops.gafext.linear_int8(*inputs, bias)
    assert torch.equal(Emulated("linear_int8", processor)(*inputs, bias), expected)


@pytest.mark.parametrize("sizes", [(1, 257, 63, 5, 9), (2, 70, 100, 13, 17)], ids=str)
def test_every_product_of_16_bits_is_exact(sizes):
    """In two halves and by vpdpwssd the bits of conv3x3_int8 are the same; tiles multiply bytes directly."""
    batch, in_channels, out_channels, height, width = sizes
    x = torch.randn(batch, in_channels, height, width).contiguous(memory_format=torch.channels_last)
    weight, scale = quantize_weight(torch.randn(out_channels, in_channels, 3, 3))
    emulated = {processor: Emulated("conv3x3_int8", processor) for processor in PROCESSORS}
    results = {processor: operation(x, weight, scale) for processor, operation in emulated.items()}
    assert emulated["amx"].tile_products > 0
    assert torch.equal(results["avx512_vnni"], results["avx512"])
    assert (results["amx"] - results["avx512"]).norm() < 0.03 * results["avx512"].norm()
