"""conv3x3_int8 against float64, against the weights that it rounds, and against misuse."""

import os

import pytest
import torch
from helpers import (
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_same_when_compiled,
    assert_same_words,
    called,
    channels_last,
)

from gafext import _C, ops
from gafext.ops.conv3x3_int8 import reference_conv3x3_int8, slower_reasons, unsupported_reasons
from gafext.ops.linear_int8 import quantize_weight

OP = torch.ops.gafext.conv3x3_int8
EMULATED = os.environ.get("GAFEXT_EMULATED_CPU")
DIRECT = EMULATED == "amx" if EMULATED else _C.build_info()["int8_products"].startswith("AMX")  # or Winograd's
ERROR = 0.025 if DIRECT else 0.015


def conv3x3_int8(x, weight, scale, bias=None):
    """The kernel, also where PyTorch is faster."""
    return OP(x.contiguous(memory_format=torch.channels_last), weight, scale, bias)


def problem(batch, in_channels, out_channels, height, width):
    """Output channels whose scales differ a thousandfold."""
    weight = torch.randint(-127, 128, (out_channels, in_channels, 3, 3)).to(torch.int8)
    scale = torch.logspace(-3, 0, out_channels) / 73 * (9 * in_channels) ** -0.5
    return channels_last(batch, in_channels, height, width), weight, scale, torch.randn(out_channels)


def relative_error(x, weight, scale, bias=None):
    """Of every output channel by itself; the largest, and without the bias, which would hide it."""
    out = conv3x3_int8(x, weight, scale, bias)
    exact = reference_conv3x3_int8(x.double(), weight, scale.double(), None if bias is None else bias.double())
    assert out.shape == exact.shape and out.dtype == x.dtype and out.is_contiguous(memory_format=torch.channels_last)
    terms = exact if bias is None else exact - bias.double()[:, None, None]
    error, size = ((t * t).sum(dim=(0, 2, 3)).sqrt() for t in (out.double() - exact, terms))
    return (error / size).max().item()


def test_bits_do_not_depend_on_threads_or_on_what_a_picture_is_beside():
    """Float32 results of several slices of channels: a sum that is rounded twice for some of them shows."""
    for sizes in ((1, 128, 128, 32, 32), (3, 130, 70, 13, 13)):
        assert_same_bits_on_any_number_of_threads(conv3x3_int8, *problem(*sizes))
    for sizes in ((2, 128, 128, 16, 16), (3, 130, 70, 13, 13), (8, 128, 64, 8, 8)):
        x, *layer = problem(*sizes)
        assert torch.equal(conv3x3_int8(x, *layer), torch.cat([conv3x3_int8(one[None], *layer) for one in x]))


SIZES = [
    (1, 1, 1, 1, 1),
    (1, 3, 5, 4, 4),
    (2, 33, 65, 5, 3),
    (3, 70, 100, 13, 17),
    (1, 257, 63, 1, 9),
    (9, 16, 64, 16, 16),
    (1, 65, 16, 63, 65),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(sizes):
    x, weight, scale, bias = problem(*sizes)
    assert relative_error(x, weight, scale, bias) < ERROR
    assert relative_error(x, weight, scale) < ERROR


@pytest.mark.parametrize("sizes", [*SIZES, (2, 128, 40, 8, 8), (2, 70, 33, 5, 32)], ids=str)
def test_directly_it_is_exact_but_for_the_rounding_of_the_pictures(sizes):
    """To 256 steps from the least number to the largest, or zero; what is beyond the picture is zero."""
    if not DIRECT:
        pytest.skip("without AMX it is Winograd's algorithm")
    x, weight, scale, bias = problem(*sizes)
    x = torch.nn.functional.silu(x + torch.linspace(-3, 3, len(x))[:, None, None, None])  # or of one sign
    low, high = x.amin((1, 2, 3), keepdim=True).clamp_max(0), x.amax((1, 2, 3), keepdim=True).clamp_min(0)
    step = (high - low) / 255
    factor = 1 / step
    zero = (0.5 - low * factor).floor()
    rounded = ((x * factor).round() + zero).clamp(0, 255) - zero
    exact = torch.nn.functional.conv2d(rounded.double(), weight.double(), padding=1)
    exact = exact * (step.double() * scale[:, None, None]) + bias[:, None, None]
    error = (conv3x3_int8(x, weight, scale, bias) - exact).norm()
    assert error < 2e-4 * exact.norm()  # a number halfway between two steps may be rounded either way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, weight, scale, bias = problem(2, 70, 33, 9, 16)
    x, bias = x.to(dtype), bias.to(dtype)
    out = conv3x3_int8(x, weight, scale, bias)
    wide = conv3x3_int8(x.float(), weight, scale, bias.float())
    assert out.dtype == dtype
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize("channels", [7281, 7282])
def test_sums_of_many_channels_fit(channels):
    """Up to 7281 directly, beyond by Winograd's algorithm."""
    x = torch.ones(1, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.full((1, channels, 3, 3), -127, dtype=torch.int8)
    out = conv3x3_int8(x, weight, torch.ones(1))
    torch.testing.assert_close(out[0, 0, 1, 1].item(), -127.0 * 9 * channels, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 70, 33, 9, 16), (3, 33, 65, 5, 3)], ids=str)
def test_a_bias_per_image_and_a_residual(sizes, dtype):
    x, weight, scale, _ = problem(*sizes)
    x, bias = x.to(dtype), torch.randn(sizes[0], sizes[2]).to(dtype)
    residual = channels_last(sizes[0], 2 * sizes[2], *sizes[3:]).to(dtype)[:, ::1][:, : sizes[2]]
    alone = conv3x3_int8(x.float(), weight, scale)
    expected = alone + bias.float()[:, :, None, None] + residual.float()
    out = OP(x, weight, scale, bias, residual)
    torch.testing.assert_close(out, expected.to(dtype))
    torch.testing.assert_close(ops.conv3x3_int8(x, weight, scale, bias, residual, backend="kernel"), out)
    reference = ops.conv3x3_int8(x, weight, scale, bias, residual, backend="reference")
    assert (out.float() - reference.float()).norm() < ERROR * reference.float().norm()


def test_the_memory_format_of_the_weight_does_not_matter():
    x, weight, scale, bias = problem(2, 70, 33, 5, 7)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv3x3_int8(x, last, scale, bias), conv3x3_int8(x, weight, scale, bias))


def test_more_tiles_than_fit_the_scratch_memory():
    assert relative_error(*problem(3, 2048, 16, 32, 32)) < ERROR  # 192 tiles of 36 x 2048 numbers, 24 MB at a time


def test_the_largest_numbers_do_not_overflow():
    """Every number at its limit, with the signs that add up at the point of the largest sums."""
    x = torch.where(torch.arange(8)[:, None] // 2 % 2 == torch.arange(8) // 2 % 2, 1.0, -1.0).expand(1, 256, 8, 8)
    weight = torch.full((64, 256, 3, 3), 127, dtype=torch.int8)
    for sign in (weight, -weight):
        assert relative_error(x * 1e30, sign, torch.ones(64) * 1e-30) < 0.02
    ones = torch.ones(1, 256, 8, 8)
    assert relative_error(ones, weight, torch.ones(64)) < 0.02


def test_the_least_8_bit_number_as_a_weight():
    """-128, which `quantize_weight` does not make but a file may have; sums are largest for this picture."""
    signs = torch.tensor([0.0, 1, 0, -1, 0, 1])
    x, weight = torch.zeros(1, 128, 12, 12), torch.zeros(1, 128, 3, 3, dtype=torch.int8)
    x[:, :, 3:9, 3:9], weight[:, :, 2, 2] = signs[:, None] * signs, -128
    exact = reference_conv3x3_int8(x.double(), weight, torch.ones(1).double())
    out = OP(x.contiguous(memory_format=torch.channels_last), weight, torch.ones(1))
    assert (out - exact).abs().max() <= 0.02 * exact.abs().max()


def test_tiles_do_not_depend_on_each_other():
    x, weight, scale, bias = problem(3, 40, 20, 12, 12)
    x[1] *= 1e4
    out = conv3x3_int8(x, weight, scale, bias)
    for image in range(3):
        assert torch.equal(conv3x3_int8(x[image : image + 1], weight, scale, bias)[0], out[image])
    if DIRECT:  # pictures do not
        return
    x[0, :, 9:, 9:] = 1e5
    assert torch.equal(conv3x3_int8(x, weight, scale, bias)[0, :, :4, :4], out[0, :, :4, :4])


def test_zeros_give_the_bias():
    x, weight, scale, bias = problem(2, 8, 4, 5, 6)
    for tiny in (0.0, 1e-40):
        assert torch.equal(
            conv3x3_int8(torch.full_like(x, tiny), weight, scale, bias), bias[:, None, None].expand(2, 4, 5, 6)
        )


def test_strides():
    x, weight, scale, bias = problem(2, 40, 20, 9, 7)
    wide = channels_last(4, 50, 12, 8)
    views = (wide[::2, 3:43, 1:10, :7], wide[:2, 10:, ::2, ::3], x[:1].expand(3, -1, -1, -1), x.contiguous())
    parameters = weight.permute(0, 1, 3, 2), scale.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]
    for strided in views:
        expected = conv3x3_int8(strided.clone(), *(t.contiguous() for t in parameters))
        assert torch.equal(conv3x3_int8(strided, *parameters), expected)


def test_the_formula_is_in_float32_under_autocast():
    x, weight, scale, _ = problem(1, 16, 16, 8, 8)
    expected = reference_conv3x3_int8(x.bfloat16(), weight, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.conv3x3_int8(x, weight, scale, backend="reference"), expected)


def test_empty_inputs():
    x, weight, scale, bias = problem(2, 8, 4, 5, 6)
    assert conv3x3_int8(x[:0], weight, scale, bias).shape == (0, 4, 5, 6)
    assert conv3x3_int8(x[:, :, :0], weight, scale, bias).shape == (2, 4, 0, 6)
    assert conv3x3_int8(x, weight[:0], scale[:0], bias[:0]).shape == (2, 0, 5, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [12, 16])
def test_what_is_not_finite_makes_nan_of_its_picture(value, size):
    if not DIRECT:
        pytest.skip("without AMX it makes NaN of its tile")
    x, weight, scale, bias = problem(3, 37, 4, size, size)
    expected = conv3x3_int8(x, weight, scale, bias)
    x[1, 36, 9, 9] = value
    out = conv3x3_int8(x, weight, scale, bias)
    assert out[1].isnan().all()
    out[1] = expected[1]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e37])
def test_what_is_not_finite_makes_nan_of_its_tiles(value):
    if DIRECT:
        pytest.skip("with AMX it makes NaN of its picture")
    x, weight, scale, bias = problem(1, 37, 4, 16, 16)
    expected = conv3x3_int8(x, weight, scale, bias)
    x[0, 36, 9, 9] = value
    out = conv3x3_int8(x, weight, scale, bias)
    assert out[:, :, 8:12, 8:12].isnan().all()
    out[:, :, 8:12, 8:12] = expected[:, :, 8:12, 8:12]
    assert torch.equal(out, expected)


def test_same_bits_on_any_number_of_threads():
    assert_same_bits_on_any_number_of_threads(conv3x3_int8, *problem(3, 70, 100, 13, 17))


def test_weights_are_rounded_per_channel():
    weight = torch.randn(5, 3, 3, 3) * torch.logspace(-3, 3, 5)[:, None, None, None]
    weight[2] = 0.0
    rounded, scale = quantize_weight(weight)
    assert rounded.dtype == torch.int8 and scale.shape == (5,)
    assert rounded.abs().amax(dim=(1, 2, 3)).tolist() == [127, 127, 0, 127, 127]
    error = (rounded * scale[:, None, None, None] - weight).abs().amax(dim=(1, 2, 3))
    assert (error <= 0.5001 * scale).all()


BAD_INPUTS = {
    "flat x": (
        lambda t: (t(3, 8), t(5, 8, 3, 3).char(), t(5)),
        "x must have shape (batch, channels, height, width), got (3, 8)",
    ),
    "weight": (
        lambda t: (t(1, 8, 4, 4), t(5, 9, 3, 3).char(), t(5)),
        "weight must have shape (out_channels, 8, 3, 3) to go with x (1, 8, 4, 4), got (5, 9, 3, 3)",
    ),
    "weight dtype": (lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3), t(5)), "weight must be int8, got float32"),
    "scale": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3).char(), t(8)),
        "scale must have shape (5,) to go with weight (5, 8, 3, 3), got (8,)",
    ),
    "bias": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3).char(), t(5), t(5, 1)),
        "bias must have shape (5,) or (1, 5) to go with x (1, 8, 4, 4) and weight (5, 8, 3, 3), got (5, 1)",
    ),
    "scale dtype": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3).char(), t(5).char()),
        "scale must have dtype float32, got int8",
    ),
    "residual": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3).char(), t(5), t(5), t(1, 4, 4, 4)),
        "residual must have shape (1, 5, 4, 4) to go with x (1, 8, 4, 4) and weight (5, 8, 3, 3), got (1, 4, 4, 4)",
    ),
    "bias dtype": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3).char(), t(5), t(5).half()),
        "bias must have the dtype of x, float32, got float16",
    ),
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(ops.conv3x3_int8, OP, make, f"conv3x3_int8: {words}")


UNSUPPORTED = {
    "dtype": (lambda x: x.double(), "dtype must be float32, float16 or bfloat16, got float64"),
    "layout": (lambda x: x.contiguous(), "x must be channels-last, got a stride of 30 from channel to channel"),
    "channels": (lambda x: x[:, :0], "channels must be at least 1, got (2, 0, 5, 6)"),
}


@pytest.mark.parametrize("change, words", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_the_bare_operation_says_what_it_cannot_do(change, words):
    x, weight, scale, _ = problem(2, 8, 4, 5, 6)
    x = change(x)
    assert_refused(OP, f"conv3x3_int8: {words}", x, weight[:, : x.shape[1]], scale.to(x.dtype))


def test_opcheck():
    inputs = problem(2, 8, 4, 5, 6)
    torch.library.opcheck(OP.default, inputs)
    torch.library.opcheck(OP.default, inputs[:3])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    sizes = ((2, 5), (3, 9), (5, 8))
    inputs = (problem(batch, 8, 4, size, size + 1) for batch, size in sizes)
    assert_same_when_compiled(conv3x3_int8, inputs, backend=backend)


def test_wide_convolutions_run_the_kernel(pretend_cpu):
    pretend_cpu("avx2")
    wide, narrow = problem(1, 128, 128, 8, 8), problem(1, 64, 128, 8, 8)
    for backend, inputs, used in (
        ("auto", wide, True),
        ("kernel", wide, True),
        ("sdpa", wide, False),
        ("auto", narrow, False),
        ("kernel", narrow, True),
    ):
        assert ("gafext::conv3x3_int8" in called(ops.conv3x3_int8, *inputs, backend=backend)) == used
        exact = reference_conv3x3_int8(*inputs)
        assert (ops.conv3x3_int8(*inputs, backend=backend) - exact).norm() < ERROR * exact.norm()
    for instruction_set in ("avx512", "amx"):
        pretend_cpu(instruction_set)
        assert slower_reasons(*problem(1, 128, 128, 1, 1)[:2]) == []
    for instruction_set in ("portable", "neon"):
        pretend_cpu(instruction_set)
        reason = f"the {instruction_set} kernels have no fast products of 16-bit integers"
        assert slower_reasons(*wide[:2]) == [reason]
        assert torch.equal(ops.conv3x3_int8(*wide), reference_conv3x3_int8(*wide))


def test_gradients_are_pytorchs():
    x, weight, scale, bias = problem(2, 128, 128, 5, 6)
    x.requires_grad_()
    (reason,) = unsupported_reasons(x, weight, scale, bias)
    assert reason == "inputs need a gradient, and PyTorch's operation has the faster backward pass"
    ops.conv3x3_int8(x, weight, scale, bias).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_unsupported_goes_to_pytorch_with_the_reason():
    x, weight, scale, bias = problem(2, 8, 4, 5, 6)
    inputs = x.double(), weight, scale.double(), bias.double()
    assert unsupported_reasons(*inputs) == ["dtype must be float32, float16 or bfloat16, got float64"]
    assert torch.equal(ops.conv3x3_int8(*inputs), reference_conv3x3_int8(*inputs))
