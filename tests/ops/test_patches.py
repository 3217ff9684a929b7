"""Convolutions as a product of patches, against torch's conv2d."""

import pytest
import torch
import torch.nn.functional as F
from helpers import called
from torch import nn

from gafext import _C
from gafext.ops.conv2d import conv2d_layer
from gafext.ops.patches import convolve_patches

ON_AMX = _C.build_info()["instruction_set"] == "amx"


def layer_and_map(batch, height, width, *, channels=(24, 40), **options):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, **options).requires_grad_(False)
    return layer, torch.randn(batch, channels[0], height, width).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1)])
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (7, 8)])
def test_patches_are_torchs_convolution(kernel, stride, padding, size):
    layer, x = layer_and_map(2, *size, kernel_size=kernel)
    for each in (x, x.contiguous()):
        out = convolve_patches(each, layer.weight, layer.bias, stride=stride, padding=padding)
        expected = F.conv2d(each, layer.weight, layer.bias, stride=stride, padding=padding)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(ON_AMX, reason="not measured with AMX")
def test_a_map_of_fewer_positions_than_channels_is_a_product():
    layer, few = layer_and_map(4, 6, 6, kernel_size=3, stride=2, padding=1)  # 36 positions, 40 channels
    assert "aten::linear" in called(conv2d_layer, layer, few)
    torch.testing.assert_close(conv2d_layer(layer, few), layer(few), atol=1e-5, rtol=1e-5)
    _, many = layer_and_map(5, 6, 6, kernel_size=3)
    assert "aten::linear" not in called(conv2d_layer, layer, many)


@pytest.mark.parametrize(
    "options", [{"stride": (1, 2)}, {"padding": (0, 1)}, {"padding": "same"}, {"groups": 2}, {"dilation": 2}]
)
def test_other_convolutions_are_called_as_they_are(options):
    layer, x = layer_and_map(1, 5, 5, kernel_size=3, **options)
    assert torch.equal(conv2d_layer(layer, x), layer(x))


def test_a_map_smaller_than_the_kernel_is_pytorchs_error():
    _, x = layer_and_map(1, 4, 4, kernel_size=1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        conv2d_layer(nn.Conv2d(24, 40, 3), x[:, :, :2])


def test_gradients_are_those_of_the_convolution():
    layer, x = layer_and_map(1, 4, 4, kernel_size=3, stride=2, padding=1)
    layer.requires_grad_()
    x.requires_grad_()
    grads = [
        torch.autograd.grad(f(x).square().sum(), (x, *layer.parameters()))
        for f in (layer, lambda x: conv2d_layer(layer, x))
    ]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_autocast_gives_its_dtype():
    layer, x = layer_and_map(1, 4, 4, kernel_size=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d_layer(layer, x).dtype == torch.bfloat16


def test_a_map_smaller_than_the_kernel_is_an_error():
    layer, x = layer_and_map(1, 1, 1, kernel_size=3)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        conv2d_layer(layer, x)
