"""The U-Net's convolutions with 8-bit weights."""

import copy
import pickle

import pytest
import torch
from helpers import channels_last
from torch import nn

from gafext.models.blocks import Conv3x3
from gafext.models.int8 import quantize_convolutions
from gafext.models.int8_conv import Int8Conv3x3, Int8PatchConv

CONVOLUTIONS = {
    "3x3": (Conv3x3, Int8Conv3x3, {}),
    "1x1": (nn.Conv2d, Int8PatchConv, {"kernel_size": 1}),
    "1x1, every third": (nn.Conv2d, Int8PatchConv, {"kernel_size": 1, "stride": 3}),
    "halving": (nn.Conv2d, Int8PatchConv, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "halving, padded before": (nn.Conv2d, Int8PatchConv, {"kernel_size": 3, "stride": 2}),
}


@torch.no_grad()
@pytest.mark.parametrize("memory", [channels_last, torch.randn], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layer_is_close_to_the_convolution_that_it_replaces(name, memory):
    kind, ours, options = CONVOLUTIONS[name]
    conv, x = kind(130, 128, **options), memory(2, 130, 9, 8)
    conv.weight[5] = 0.0  # a channel without a scale
    layer, exact = ours(conv), conv(x)
    assert layer(x).shape == exact.shape
    assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 0.02
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    again = ours(kind(130, 128, **options))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_with_gradients_on_the_layer_computes_the_same(name):
    kind, ours, options = CONVOLUTIONS[name]
    layer, x = ours(kind(130, 128, **options)), channels_last(2, 130, 9, 8)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x), expected) and not list(layer.parameters())


@torch.no_grad()
def test_bias_addend_and_residual_are_all_added():
    layer, x = Int8Conv3x3(Conv3x3(130, 128)), channels_last(2, 130, 9, 8)
    addend, residual = torch.randn(2, 128), channels_last(2, 128, 9, 8)
    expected = layer(x) + addend[..., None, None] + residual
    assert torch.allclose(layer(x, addend=addend, residual=residual), expected, atol=1e-5)


def test_a_rounded_input_has_no_gradient():
    layer = Int8PatchConv(nn.Conv2d(130, 128, 1))
    with pytest.raises(ValueError, match="expected an input without gradient"):
        layer(channels_last(2, 130, 9, 8).requires_grad_())


@torch.no_grad()
def test_without_bias_and_without_pixels():
    conv = nn.Conv2d(130, 128, 1, bias=False)
    x = channels_last(2, 130, 5, 5)
    assert (Int8PatchConv(conv)(x) - conv(x)).norm() < 0.02 * conv(x).norm()
    assert Int8PatchConv(conv)(x[:0]).shape == (0, 128, 5, 5)


def test_only_wide_convolutions_are_replaced():
    narrow, thin = Conv3x3(130, 4), nn.Conv2d(127, 128, 1)
    halving = nn.Conv2d(128, 128, 3, padding=1, stride=2)
    network = nn.Sequential(nn.Sequential(Conv3x3(128, 130)), narrow, halving, thin)
    assert quantize_convolutions(network) == 2
    assert isinstance(network[0][0], Int8Conv3x3) and isinstance(network[2], Int8PatchConv)
    assert network[1] is narrow and network[3] is thin
