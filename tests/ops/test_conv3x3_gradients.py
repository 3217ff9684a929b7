"""Gradients of conv3x3 against PyTorch's and float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    assert_gradients,
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_second_gradients,
    called,
    channels_last,
    max_abs_diff,
)

from gafext import ops
from gafext.ops.conv3x3 import reference_conv3x3, weight_gradient

OP, INPUT_GRADIENT = torch.ops.gafext.conv3x3, torch.ops.gafext.conv3x3_input_gradient


def problem(batch, in_channels, out_channels, height, width):
    weight = torch.randn(out_channels, in_channels, 3, 3) * (9 * in_channels) ** -0.5
    return channels_last(batch, in_channels, height, width), weight, torch.randn(out_channels)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_gradients(count):
    inputs = (*problem(2, 8, 4, 5, 6), channels_last(2, 4, 5, 6))
    assert_gradients((OP, ops.conv3x3), reference_conv3x3, *inputs[:count])


def test_gradients_of_a_bias_per_image():
    x, weight, _ = problem(2, 8, 4, 5, 6)
    assert_gradients((OP, ops.conv3x3), reference_conv3x3, x, weight, torch.randn(2, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 8, 5, 7, 7), (1, 63, 65, 9, 1), (3, 65, 33, 4, 5), (1, 1, 1, 1, 1), (1, 257, 130, 6, 11)], ids=str
)
def test_input_gradient_is_a_convolution(sizes, dtype):
    """With the weight's other transpose and its taps reversed: the same bits."""
    batch, channels, outputs, height, width = sizes
    grad = channels_last(batch, outputs, height, width).to(dtype)
    weight = (torch.randn(outputs, channels, 3, 3) * (9 * outputs) ** -0.5).to(dtype)
    out = INPUT_GRADIENT(grad, weight)
    assert torch.equal(out, OP(grad, weight.transpose(0, 1).flip(2, 3)))
    exact = F.conv_transpose2d(grad.double(), weight.double(), padding=1)
    assert max_abs_diff(out, exact) < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]


@pytest.mark.parametrize("sizes", [(2, 128, 128, 16, 16), (2, 640, 320, 13, 17), (1, 1280, 1280, 8, 8)], ids=str)
def test_input_gradient_is_as_exact_as_pytorchs(sizes):
    """Measured, relative to the error of PyTorch's: 0.7 to 1.1."""
    batch, channels, outputs, height, width = sizes
    grad = channels_last(batch, outputs, height, width)
    weight = torch.randn(outputs, channels, 3, 3) * (9 * outputs) ** -0.5
    exact = F.conv_transpose2d(grad.double(), weight.double(), padding=1)
    x = channels_last(batch, channels, height, width).requires_grad_()
    (torchs,) = torch.autograd.grad(F.conv2d(x, weight, padding=1), x, grad)
    assert (INPUT_GRADIENT(grad, weight) - exact).norm() < 2 * (torchs - exact).norm()


@pytest.mark.parametrize("sizes", [(8, 512, 512, 4), (8, 128, 128, 8), (4, 128, 160, 16), (32, 128, 128, 4)], ids=str)
@torch.no_grad()
def test_weight_gradient_is_as_exact_as_pytorchs(sizes):
    """Measured, relative to the error of PyTorch's: 0.5 to 1.5, its largest number 0.4 to 1.6."""
    batch, channels, outputs, size = sizes
    x, grad = channels_last(batch, channels, size, size), channels_last(batch, outputs, size, size)
    weight = torch.zeros(outputs, channels, 3, 3)
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    torchs = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=1) - exact
    ours = weight_gradient(grad, x, weight) - exact
    assert ours.norm() < 2 * torchs.norm() and ours.abs().max() < 2 * torchs.abs().max()


def test_input_gradient_of_nothing():
    assert INPUT_GRADIENT(channels_last(0, 8, 5, 5), torch.zeros(8, 4, 3, 3)).shape == (0, 4, 5, 5)
    assert INPUT_GRADIENT(channels_last(2, 8, 5, 0), torch.zeros(8, 4, 3, 3)).shape == (2, 4, 5, 0)


def test_input_gradient_misuse_opcheck_and_threads():
    grad, weight = channels_last(2, 40, 9, 13), torch.randn(40, 70, 3, 3)
    for given, words in (
        ((grad[0], weight), "grad must have shape (batch, channels, height, width), got (40, 9, 13)"),
        (
            (grad, weight[:39]),
            "weight must have shape (40, in_channels, 3, 3) to go with grad (2, 40, 9, 13), got (39, 70, 3, 3)",
        ),
        ((grad, weight.half()), "weight must have the dtype of grad, float32, got float16"),
        (
            (grad.contiguous(), weight),
            "grad must be channels-last, got a stride of 117 from channel to channel",
        ),
    ):
        assert_refused(INPUT_GRADIENT, f"conv3x3_input_gradient: {words}", *given)
    torch.library.opcheck(INPUT_GRADIENT.default, (grad, weight))
    assert_same_bits_on_any_number_of_threads(INPUT_GRADIENT, grad, weight)
    with pytest.raises(NotImplementedError, match="conv3x3_input_gradient: has no gradient"):
        INPUT_GRADIENT(grad, weight.requires_grad_()).sum().backward()


@pytest.mark.parametrize("with_bias", [True, False])
def test_training_runs_the_kernels_where_they_are_faster(with_bias):
    x, weight, bias = (t.requires_grad_() for t in problem(2, 128, 130, 5, 6))
    inputs = (x, weight, bias) if with_bias else (x, weight)
    used = called(lambda: ops.conv3x3(*inputs).sum().backward())
    assert {"gafext::conv3x3", "gafext::conv3x3_input_gradient"} <= used
    assert_gradients((ops.conv3x3,), reference_conv3x3, *(t.detach() for t in inputs))
    narrow = [t.requires_grad_() for t in problem(2, 31, 130, 5, 6)]
    assert not any(name.startswith("gafext") for name in called(lambda: ops.conv3x3(*narrow).sum().backward()))
    between = [t.requires_grad_() for t in problem(2, 127, 130, 5, 6)]  # the weight's gradient is PyTorch's
    used = called(lambda: ops.conv3x3(*between).sum().backward())
    assert {"gafext::conv3x3", "gafext::conv3x3_input_gradient", "aten::convolution_backward"} <= used


def test_second_gradients_are_pytorchs():
    assert_second_gradients(OP, reference_conv3x3, *problem(1, 128, 128, 5, 4)[:2])


def test_the_weights_gradient_sums_over_as_many_images_as_fit():
    grad, (x, weight, _) = channels_last(5, 128, 6, 7), problem(5, 128, 128, 6, 7)
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    for images in (0, 2, 5):  # none: PyTorch's
        floats = images * 9 * 128 * 42
        with torch.no_grad():
            used = called(weight_gradient, grad, x, weight, patch_floats=floats)
            assert ("aten::convolution_backward" in used) == (images == 0)
            assert max_abs_diff(weight_gradient(grad, x, weight, patch_floats=floats), exact) < 1e-4
