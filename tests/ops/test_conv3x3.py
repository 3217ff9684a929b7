"""conv3x3 against float64, against PyTorch's conv2d, and against misuse."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_gradients,
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_same_when_compiled,
    assert_same_words,
    called,
    channels_last,
)

from gafext import ops
from gafext.ops.conv3x3 import reference_conv3x3, slower_reasons, unsupported_reasons

OP = torch.ops.gafext.conv3x3


def conv3x3(x, weight, bias=None):
    """The kernel, also where PyTorch is faster."""
    return OP(x.contiguous(memory_format=torch.channels_last), weight, bias)


def problem(batch, in_channels, out_channels, height, width):
    weight = torch.randn(out_channels, in_channels, 3, 3) * (9 * in_channels) ** -0.5
    return channels_last(batch, in_channels, height, width), weight, torch.randn(out_channels)


def assert_exact(x, weight, bias=None):
    """To a few roundings of the largest terms: Winograd's transforms and sums both add to the error."""
    out = conv3x3(x, weight, bias)
    exact = reference_conv3x3(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.shape == exact.shape and out.dtype == x.dtype and out.is_contiguous(memory_format=torch.channels_last)
    size = F.conv2d(x.double().abs(), weight.double().abs(), padding=1).max()
    assert (out.double() - exact).abs().max() <= 1e-6 * size


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
    x, weight, bias = problem(*sizes)
    assert_exact(x, weight, bias)
    assert_exact(x, weight)


def test_more_tiles_than_fit_the_scratch_memory():
    assert_exact(*problem(3, 1024, 16, 32, 32))  # 192 tiles of 36 x 1024 floats, 24 MB at a time


@pytest.mark.parametrize("sizes", [(8, 320, 320, 32, 32), (8, 640, 320, 16, 16), (2, 1280, 640, 8, 8)], ids=str)
def test_nearly_as_exact_as_pytorch_where_it_is_used(sizes):
    x, weight, bias = problem(*sizes)
    exact = reference_conv3x3(x.double(), weight.double(), bias.double())
    error, allowed = (
        (t.double() - exact).square().mean().sqrt()
        for t in (conv3x3(x, weight, bias), reference_conv3x3(x, weight, bias))
    )
    assert error <= 2.5 * allowed


def test_strides():
    x, weight, bias = problem(2, 40, 20, 9, 7)
    wide = channels_last(4, 50, 12, 8)
    for strided in (wide[::2, 3:43, 1:10, :7], wide[:2, 10:, ::2, ::3], x[:1].expand(3, -1, -1, -1), x.contiguous()):
        assert_exact(strided, weight, bias)
        assert_exact(strided, weight.permute(0, 1, 3, 2), bias.repeat(2)[::2])
    strided = wide[::2, 3:43, 1:10, :7].as_strided((2, 40, 9, 7), (2 * 4800, 1, 400, 50))
    assert "gafext::conv3x3" in called(conv3x3, strided, weight, bias)


def test_empty_inputs():
    x, weight, bias = problem(2, 8, 4, 5, 6)
    assert conv3x3(x[:0], weight, bias).shape == (0, 4, 5, 6)
    assert conv3x3(x[:, :, :0], weight, bias).shape == (2, 4, 0, 6)
    assert conv3x3(x, weight[:0], bias[:0]).shape == (2, 0, 5, 6)


def test_a_nan_stays_within_its_tiles():
    x, weight, bias = problem(1, 8, 4, 16, 16)
    x[0, 3, 9, 9] = float("nan")
    out = conv3x3(x, weight, bias).isnan().any(dim=1)[0]
    assert out[8:11, 8:11].all()
    assert not out[:4].any() and not out[:, :4].any() and not out[12:].any() and not out[:, 12:].any()


def test_same_bits_on_any_number_of_threads():
    assert_same_bits_on_any_number_of_threads(conv3x3, *problem(3, 70, 100, 13, 17))


BAD_INPUTS = {
    "flat x": (lambda t: (t(3, 8), t(5, 8, 3, 3)), "x must have shape (batch, channels, height, width), got (3, 8)"),
    "weight": (
        lambda t: (t(1, 8, 4, 4), t(5, 9, 3, 3)),
        "weight must have shape (out_channels, 8, 3, 3) to go with x (1, 8, 4, 4), got (5, 9, 3, 3)",
    ),
    "kernel": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 1, 1)),
        "weight must have shape (out_channels, 8, 3, 3) to go with x (1, 8, 4, 4), got (5, 8, 1, 1)",
    ),
    "bias": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3), t(8)),
        "bias must have shape (5,) to go with weight (5, 8, 3, 3), got (8,)",
    ),
    "dtype": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3).half()),
        "weight must have the dtype of x, float32, got float16",
    ),
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(ops.conv3x3, OP, make, f"conv3x3: {words}")


UNSUPPORTED = {
    "dtype": (lambda x: x.half(), "dtype must be float32, got float16"),
    "layout": (lambda x: x.contiguous(), "x must be channels-last, got a stride of 30 from channel to channel"),
}


@pytest.mark.parametrize("change, words", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_the_bare_operation_says_what_it_cannot_do(change, words):
    x, weight, _ = problem(2, 8, 4, 5, 6)
    x = change(x)
    assert_refused(OP, f"conv3x3: {words}", x, weight.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_unsupported_goes_to_pytorch_with_the_reason(dtype):
    inputs = [t.to(dtype) for t in problem(2, 8, 4, 5, 6)]
    assert unsupported_reasons(*inputs) == [f"dtype must be float32, got {str(dtype).removeprefix('torch.')}"]
    assert torch.equal(ops.conv3x3(*inputs), reference_conv3x3(*inputs))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients(with_bias):
    assert_gradients((OP, ops.conv3x3), reference_conv3x3, *problem(2, 8, 4, 5, 6)[: 3 if with_bias else 2])


def test_opcheck():
    inputs = tuple(t.requires_grad_() for t in problem(2, 8, 4, 5, 6))
    torch.library.opcheck(OP.default, inputs)
    torch.library.opcheck(OP.default, inputs[:2])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    sizes = ((2, 5), (3, 9), (5, 8))
    inputs = (problem(batch, 8, 4, size, size + 1) for batch, size in sizes)
    assert_same_when_compiled(conv3x3, inputs, backend=backend)


def test_the_network_uses_it_for_wide_convolutions_in_inference():
    wide, narrow = problem(1, 128, 128, 8, 8), problem(1, 64, 128, 8, 8)
    for backend, inputs, used in (
        ("auto", wide, True),
        ("kernel", wide, True),
        ("sdpa", wide, False),
        ("auto", narrow, False),
    ):
        assert ("gafext::conv3x3" in called(ops.conv3x3, *inputs, backend=backend)) == used
        out = ops.conv3x3(*inputs, backend=backend)
        torch.testing.assert_close(out, reference_conv3x3(*inputs), atol=1e-5, rtol=1e-5)


def test_what_pytorch_does_faster_goes_to_pytorch_with_the_reason():
    few_channels, few_tiles, enough = problem(4, 127, 128, 8, 8), problem(3, 128, 128, 4, 4), problem(4, 128, 128, 4, 4)
    assert slower_reasons(*few_channels[:2]) == ["fewer than 128 channels: the transforms outweigh the products"]
    assert slower_reasons(*few_tiles[:2]) == ["fewer than 4 tiles of 4×4 do not pay for transforming the weights"]
    assert slower_reasons(*enough[:2]) == []
    for inputs, kernel in ((few_channels, reference_conv3x3), (few_tiles, reference_conv3x3), (enough, OP)):
        assert torch.equal(ops.conv3x3(*inputs), kernel(*inputs))
