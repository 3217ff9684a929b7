"""Layers of diffusers with gafext's operations, against themselves without, in settings that few networks have."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from helpers import max_abs_diff, normal, randomized
from torch import nn

import gafext

FEATURES, EMBEDDING = normal(2, 32, 8, 8), normal(2, 16)
TOKENS, TEXT = normal(2, 6, 32), normal(2, 5, 24, seed=1)


def resnet(**settings):
    sizes = {"in_channels": 32, "out_channels": 64, "temb_channels": 16, "groups": 4}
    return randomized(ResnetBlock2D(**sizes, **settings), seed=0).eval()


def attention(**settings):
    return randomized(Attention(32, heads=2, dim_head=16, **settings), seed=0).eval()


@torch.no_grad()
def assert_same(layer, *inputs, **options):
    """A layer's result is the stock one."""
    stock = layer(*inputs, **options)
    assert gafext.accelerate(layer).swapped[type(layer).__name__] == 1
    assert max_abs_diff(layer(*inputs, **options), stock) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        # At published values, a wrong eps or a wrong scale of the output would be lost in rounding.
        {"eps": 0.5, "output_scale_factor": 2.0},
        {"up": True},
        {"down": True},
        {"skip_time_act": True},
        {"time_embedding_norm": "scale_shift"},
        {"non_linearity": "gelu"},
    ],
)
def test_a_residual_block_keeps_its_settings(settings):
    assert_same(resnet(**settings), FEATURES, EMBEDDING)


class Twice(nn.SiLU):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("custom", ["hook", "forward", "class"])
def test_a_residual_block_keeps_its_nonlinearity(custom):
    block = resnet()
    if custom == "hook":
        block.nonlinearity.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif custom == "forward":
        block.nonlinearity.forward = torch.tanh
    else:
        block.nonlinearity = Twice()
    assert_same(block, FEATURES, EMBEDDING)


def test_a_residual_block_drops_out():
    """Everything: which numbers a smaller share zeroes depends on the memory format."""
    assert_same(resnet(dropout=1.0).train(), FEATURES, EMBEDDING)


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_block_copies_for_ddp_in_training_alone(training):
    block, seen = resnet().train(training), []
    gafext.accelerate(block)
    block.conv_shortcut.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    block(FEATURES.to(memory_format=torch.channels_last), EMBEDDING)
    assert seen == [training]


@pytest.mark.parametrize("norm", [{"cross_attention_norm": "layer_norm"}, {"qk_norm": "layer_norm"}])
def test_an_attention_keeps_its_norms(norm):
    assert_same(attention(cross_attention_dim=24, **norm), TOKENS, TEXT)


def test_an_attention_keeps_its_spatial_norm():
    assert_same(attention(spatial_norm_dim=8), FEATURES, temb=normal(2, 8, 8, 8))


def test_an_attention_drops_out():
    assert_same(attention(dropout=1.0, out_bias=False, residual_connection=True).train(), TOKENS)


def test_lists_of_scales_without_masks_are_left_to_diffusers():
    """Which takes them where all are 0."""
    layer = attention(cross_attention_dim=24)
    processor = IPAdapterAttnProcessor2_0(32, cross_attention_dim=24, num_tokens=(4,), scale=[[0.0, 0.0]])
    layer.set_processor(processor)
    assert_same(layer, TOKENS, (TEXT, [normal(2, 2, 4, 24)]))


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (resnet(), (FEATURES, EMBEDDING)),
        (resnet(up=True), (FEATURES, EMBEDDING)),
        (attention(), (TOKENS,)),
        (attention(cross_attention_dim=24), (TOKENS, TEXT, torch.zeros(2, 1, 5))),
    ],
)
@torch.no_grad()
def test_a_bound_forward_outlives_restore(layer, inputs):
    gafext.accelerate(layer)
    forward = layer.forward
    gafext.restore(layer)
    assert max_abs_diff(forward(*inputs), layer(*inputs)) <= 1e-5
