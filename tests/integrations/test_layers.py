"""PyTorch's own layers with gafext's operations, against themselves without."""

import pytest
import torch
from helpers import max_abs_diff, normal
from torch import nn

import gafext

CHANNELS_LAST = torch.channels_last


def convolution(**settings):
    return nn.Conv2d(16, 32, 3, **{"padding": 1, **settings})


def are_channels_last(*layers):
    return [layer.weight.is_contiguous(memory_format=CHANNELS_LAST) for layer in layers]


@torch.no_grad()
def test_channels_last_weights_are_laid_out_once_and_back():
    layers = nn.Sequential(convolution().to(memory_format=CHANNELS_LAST), nn.SiLU(), nn.Conv2d(32, 16, 3, padding=1))
    x = normal(2, 16, 8, 8)
    stock = layers.eval()(x)
    with torch.inference_mode():
        gafext.accelerate(layers)
    assert are_channels_last(layers[0], layers[2]) == [False, False]
    assert not layers[0].weight.is_inference()
    assert max_abs_diff(layers(x), stock) <= 1e-5
    gafext.restore(layers)
    assert are_channels_last(layers[0], layers[2]) == [True, False]
    layers.to(memory_format=torch.contiguous_format)
    gafext.accelerate(layers)
    gafext.restore(layers)
    assert are_channels_last(layers[0], layers[2]) == [False, False]


def test_weights_in_training_keep_the_layout_of_their_optimizer():
    weights, x = [], normal(2, 16, 8, 8)
    for accelerated in (False, True):
        torch.manual_seed(0)
        layer = convolution().to(memory_format=CHANNELS_LAST)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for step in range(3):
            if accelerated and step:
                gafext.accelerate(layer)
            layer(x).square().mean().backward()
            optimizer.step()
        assert are_channels_last(layer) == [True]
        weights.append(layer.weight)
    assert max_abs_diff(*weights) <= 1e-4


def test_inference_leaves_weights_trainable():
    layer, x = convolution().eval(), normal(2, 16, 8, 8)
    gafext.accelerate(layer)
    layer.to(memory_format=CHANNELS_LAST)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert are_channels_last(layer) == [True]


def test_weights_made_in_inference_mode_and_others_stay_as_they_are():
    with torch.inference_mode():
        layer = convolution().to(memory_format=CHANNELS_LAST).eval()
    elsewhere = convolution().to("meta", memory_format=CHANNELS_LAST).eval()
    gafext.accelerate(nn.Sequential(layer, elsewhere))
    assert are_channels_last(layer, elsewhere) == [True, True]


@pytest.mark.parametrize("settings", [{"groups": 4}, {"dilation": 2}, {"stride": 2}, {"padding_mode": "reflect"}])
def test_other_convolutions_are_left_alone(settings):
    layer, x = convolution(**settings), normal(2, 16, 8, 8)
    stock = layer(x)
    assert gafext.accelerate(layer) == ({}, {})
    assert torch.equal(layer(x), stock)


def test_a_picture_without_a_batch():
    layer, x = convolution(), normal(16, 8, 8)
    stock = layer(x)
    gafext.accelerate(layer)
    assert torch.equal(layer(x), stock)


def test_quantized_parameters_are_left_alone():
    class Quantized(nn.Parameter):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = Quantized(layer.weight.data)
    assert gafext.accelerate(layer) == ({}, {})


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 4), torch.empty(2, 4, device="meta")),
        (convolution(), normal(16, 8, 8)),
        (nn.GroupNorm(2, 16), normal(2, 16)),
    ],
)
def test_a_bound_forward_outlives_restore(layer, x):
    gafext.accelerate(layer)
    forward = layer.to(x.device).forward
    gafext.restore(layer)
    assert forward(x).shape == layer(x).shape


def test_a_norm_with_weights_in_float32_of_an_input_in_bfloat16():
    norm = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 1).bfloat16())
    x = torch.randn(2, 16, 8, 8).bfloat16()
    expected = norm(x)
    gafext.accelerate(norm)
    assert torch.equal(norm(x), expected)
