"""The U-Net's 3×3 convolutions with 8-bit weights."""

import copy
import pickle

import torch
from helpers import channels_last
from torch import nn

from gafext.models.blocks import Conv3x3
from gafext.models.int8_conv import Int8Conv3x3, quantize_convolutions


@torch.no_grad()
def test_layer_is_close_to_the_convolution_that_it_replaces():
    conv, x = Conv3x3(130, 128), channels_last(2, 130, 9, 8)
    conv.weight[5] = 0.0  # a channel without a scale
    layer, exact = Int8Conv3x3(conv), conv(x)
    assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 0.02
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    again = Int8Conv3x3(Conv3x3(130, 128))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_only_wide_convolutions_are_replaced():
    wide, narrow, other = Conv3x3(128, 130), Conv3x3(130, 4), nn.Conv2d(128, 128, 3, padding=1, stride=2)
    network = nn.Sequential(nn.Sequential(wide), narrow, other)
    assert quantize_convolutions(network) == 1
    assert isinstance(network[0][0], Int8Conv3x3) and network[1] is narrow and network[2] is other
