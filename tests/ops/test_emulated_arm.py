"""The CPU kernels on emulated Arm processors (tests/emulated_arm.py): the operations' own tests pass there."""

import pytest
import torch
from emulated_arm import PROCESSORS, OnArm, needs_arm, run_arm
from helpers import assert_operations_pass_on

from gafext.ops.linear_int8 import quantize_weight

pytestmark = needs_arm

OPERATIONS = ("conv3x3", "conv3x3_gradients", "conv3x3_int8", "cross_view_attention", "flash_attention")
OPERATIONS += ("geglu", "group_norm_silu", "linear", "linear_int8")
KERNELS = "odd or strides or nan or infinity or finite or huge or empty or residual or overflow or same_bits or exact"
TOO_LARGE_OR_ELSEWHERE = "emulator or compile or opcheck or where_it_is_used or 2000 or 2048 or every_instruction_set"


def test_the_tests_of_the_operations_pass():
    """Sizes, strides, what is empty or not finite, each against float64 or PyTorch on this machine."""
    assert_operations_pass_on("neon_sdot", OPERATIONS, f"({KERNELS}) and not ({TOO_LARGE_OR_ELSEWHERE})")


@pytest.mark.parametrize(("processor", "products"), [("neon", "NEON, as 16 bits"), ("neon_sdot", "SDOT")])
def test_the_best_products_of_integers_are_found(processor, products):
    assert run_arm(processor).stdout.splitlines() == ["neon", products, str(int(processor == "neon_sdot"))]
    assert run_arm(processor, GAFEXT_INSTRUCTION_SET="neon").stdout.startswith("neon\n")


@pytest.mark.parametrize("name", ["portable", "avx2", "sse9"])
def test_another_instruction_set_is_refused_with_the_choices(name):
    done = run_arm("neon", GAFEXT_INSTRUCTION_SET=name)
    assert done.returncode == 1
    assert done.stderr == f"GAFEXT_INSTRUCTION_SET={name}: must be neon, on this processor\n"


@pytest.mark.parametrize("sizes", [(1, 1, 1), (65, 257, 63), (33, 31, 300)], ids=str)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_sums_of_integers_have_the_bits_of_this_machine(processor, sizes):
    rows, in_features, out_features = sizes
    inputs = torch.randn(rows, in_features), *quantize_weight(torch.randn(out_features, in_features))
    bias = torch.randn(out_features)
    assert torch.equal(OnArm("linear_int8", processor)(*inputs, bias), torch.ops.gafext.linear_int8(*inputs, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision_comes_through_load_and_store(dtype):
    """Attention to one view returns its values, times a weight of exactly 1."""
    value = torch.arange(-32768, 32768).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
    value = torch.where(value.isfinite(), value, 0)
    zero = torch.zeros_like(value)
    assert torch.equal(OnArm("cross_view_attention", "neon")(zero, zero, value, 1), value)
