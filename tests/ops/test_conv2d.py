"""conv2d and conv2d_layer against PyTorch's convolution, on CPUs with and without half-precision products."""

import pytest
import torch
import torch.nn.functional as F
from helpers import called, channels_last
from torch import nn

from gafext.ops.conv2d import conv2d, conv2d_layer
from gafext.ops.linear import linear

HALVES = [torch.float16, torch.bfloat16]
LAYERS = {
    "1x1": lambda: nn.Conv2d(33, 20, 1),
    "1x1 without bias": lambda: nn.Conv2d(33, 20, 1, bias=False),
    "1x1 strided": lambda: nn.Conv2d(33, 20, 1, stride=2),
    "3x3 strided": lambda: nn.Conv2d(33, 20, 3, stride=2, padding=1),
    "3x3 of the same size": lambda: nn.Conv2d(33, 20, 3, padding="same"),
    "patches": lambda: nn.Conv2d(33, 20, 5, stride=5),
}


@pytest.fixture
def slow_halves(pretend_cpu):
    pretend_cpu("avx2", multiplies_bfloat16=False, multiplies_float16=False)


def assert_close_to_exact(out, layer, x):
    """Half precision is rounded once."""
    exact = F.conv2d(
        x.double(),
        layer.weight.double(),
        None if layer.bias is None else layer.bias.double(),
        stride=layer.stride,
        padding=layer.padding,
    )
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= torch.finfo(x.dtype).eps / 2 * exact.abs() + 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_half_precision_is_rounded_once_where_the_cpu_lacks_it(make, dtype, slow_halves):
    layer = make().to(dtype)
    for x in (channels_last(2, 33, 10, 15).to(dtype), torch.randn(2, 33, 10, 15, dtype=dtype)):
        out = conv2d_layer(layer, x)
        assert_close_to_exact(out, layer, x)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, conv2d(last, layer.weight, layer.bias, stride=layer.stride, padding=layer.padding))
        assert out.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_pointwise_convolutions_are_linear_layers(pretend_cpu):
    """At every width: sums of oneDNN's depend on the number of threads, and wide ones are slower."""
    pretend_cpu("avx512", multiplies_bfloat16=True, multiplies_float16=True)
    for dtype in (torch.float32, *HALVES):
        for layer in (nn.Conv2d(8, 8, 1), nn.Conv2d(33, 20, 1, bias=False), nn.Conv2d(640, 320, 1)):
            layer, x = layer.to(dtype), channels_last(2, layer.in_channels, 10, 15).to(dtype)
            out, rows = conv2d_layer(layer, x), linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias)
            assert torch.equal(out.permute(0, 2, 3, 1), rows)
            torch.testing.assert_close(out, layer(x))
            assert not called(conv2d_layer, layer, x) & {"aten::clone", "aten::convolution"}
    assert conv2d_layer(layer, x[:0]).shape == (0, 320, 10, 15)


@torch.no_grad()
def test_pointwise_convolutions_are_linear_layers_without_a_copy(slow_halves):
    x, layer = channels_last(2, 33, 10, 15).bfloat16(), nn.Conv2d(33, 20, 1).bfloat16()
    assert "gafext::linear" in called(conv2d_layer, layer, x)
    assert not called(conv2d_layer, layer, x) & {"aten::clone", "aten::convolution"}
    assert conv2d_layer(layer, x).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_elsewhere_it_is_pytorchs(dtype, pretend_cpu):
    pretend_cpu("avx512", multiplies_bfloat16=True, multiplies_float16=True)
    for name, make in LAYERS.items():
        if name not in ("1x1", "1x1 without bias"):
            layer, x = make().to(dtype), channels_last(2, 33, 10, 15).to(dtype)
            assert torch.equal(conv2d_layer(layer, x), layer(x))


@torch.no_grad()
def test_other_convolutions_are_pytorchs(slow_halves):
    x = channels_last(2, 33, 10, 15).bfloat16()
    for options in ({"groups": 3, "out_channels": 21}, {"dilation": 2}):
        layer = nn.Conv2d(33, kernel_size=3, **{"out_channels": 20, **options}).bfloat16()
        assert torch.equal(conv2d_layer(layer, x), layer(x))
    layer = nn.Conv2d(33, 20, 3, padding=1, padding_mode="circular").bfloat16()
    assert torch.equal(conv2d_layer(layer, x), layer(x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients(dtype, slow_halves):
    for make in LAYERS.values():
        layer = make().to(dtype)
        x = channels_last(2, 33, 10, 15).to(dtype).requires_grad_()
        ours = torch.autograd.grad(conv2d_layer(layer, x).float().sum(), [x, *layer.parameters()])
        layer, x = layer.float(), x.detach().float().requires_grad_()
        theirs = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left.float(), right, atol=0.03, rtol=0.03)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_to_a_slow_half_is_computed_as_that_half(slow_halves, dtype):
    layer, x = nn.Conv2d(33, 20, 3, stride=2, padding=1), channels_last(2, 33, 9, 8)
    linear_layer = nn.Linear(8, 20)
    with torch.autocast("cpu", dtype):
        out, rows = conv2d_layer(layer, x), linear(x, linear_layer.weight, linear_layer.bias)
        assert "gafext::linear" in called(linear, x, linear_layer.weight, linear_layer.bias)
    half = layer.to(dtype)
    assert torch.equal(out, conv2d_layer(half, x.to(dtype)))
    half = linear_layer.to(dtype)
    assert torch.equal(rows, linear(x.to(dtype), half.weight, half.bias))
