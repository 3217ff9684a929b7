"""Queries, keys and values of the same hidden states are one product, whose weights are still three parameters."""

import copy

import pytest
import torch
from helpers import max_abs_diff
from torch import nn

from gafext import attention
from gafext.attention import linears, set_attention_backend, stack_weights
from gafext.config import UNetConfig
from gafext.models.blocks import Attention, CrossViewAttention
from gafext.models.unet import MultiViewUNet


def layers(*sizes, in_features=24, bias=False):
    torch.manual_seed(0)
    return [nn.Linear(in_features, size, bias=bias) for size in sizes]


def are_stacked(some):
    return attention._can_stack(some) and attention._are_stacked(some)


@torch.no_grad()
@pytest.mark.parametrize("rows", [(0,), (5,), (2, 130)], ids=str)
def test_one_product_of_all(rows):
    some, x = layers(8, 16, 3), torch.randn(*rows, 24)
    expected = [layer(x) for layer in some]
    before = [layer.weight.clone() for layer in some]
    stack_weights(some)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(some, before, strict=True))
    results = linears(some, x)
    assert len({result.untyped_storage().data_ptr() for result in results}) == 1
    assert all(max_abs_diff(a, b) < 1e-5 for a, b in zip(results, expected, strict=True) if a.numel())
    assert [result.shape for result in results] == [result.shape for result in expected]


def with_hook():
    some = layers(8, 8)
    some[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
    return some


NOT_STACKED = {
    "bias": lambda: layers(8, 8, bias=True),
    "hook": with_hook,
    "two types": lambda: [layers(8)[0], layers(8)[0].half()],
    "two widths": lambda: [*layers(8, in_features=24), *layers(8, in_features=32)],
    "not linear": lambda: [*layers(8), nn.Identity()],
    "meta": lambda: [layer.to("meta") for layer in layers(8, 8)],
}


@pytest.mark.parametrize("make", NOT_STACKED.values(), ids=NOT_STACKED)
def test_what_is_no_plain_layer_is_left_alone(make):
    some = make()
    before = [[parameter.data_ptr() for parameter in layer.parameters()] for layer in some]
    stack_weights(some)
    assert [[parameter.data_ptr() for parameter in layer.parameters()] for layer in some] == before


def test_a_hook_is_called_on_stacked_weights_too():
    some, x = layers(8, 8), torch.randn(3, 24)
    stack_weights(some)
    some[1].register_forward_hook(lambda layer, inputs, output: 2 * output)
    with torch.no_grad():
        assert torch.equal(linears(some, x)[1], 2 * (x @ some[1].weight.T))


def test_gradients_reach_every_weight():
    some, x = layers(8, 8, 8), torch.randn(3, 24)
    stack_weights(some)
    sum(result.square().sum() for result in linears(some, x)).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in some)


@torch.no_grad()
@pytest.mark.parametrize("make", [Attention, CrossViewAttention])
def test_attention_of_stacked_weights(make):
    torch.manual_seed(0)
    part, x = make(64, 4), torch.randn(8, 5, 64)
    arguments = (4,) if make is CrossViewAttention else ()
    expected = part(x, *arguments)
    part.arrange_weights()
    assert are_stacked([part.to_q, part.to_k, part.to_v])
    assert max_abs_diff(part(x, *arguments), expected) < 1e-5
    set_attention_backend(part, "sdpa")
    assert max_abs_diff(part(x, *arguments), expected) < 1e-5
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    assert max_abs_diff(compiled(x, *arguments), expected) < 1e-5


def test_attention_to_a_context_keeps_its_weights():
    part = Attention(24, 3, context_channels=24)
    part.arrange_weights()
    assert not are_stacked([part.to_q, part.to_k, part.to_v])


def attentions(network):
    return [m for m in network.modules() if isinstance(m, Attention) and m.attends_to_itself]


def test_a_network_is_stacked_however_it_came_to_be(tmp_path):
    config = UNetConfig(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )
    unet = MultiViewUNet(config)
    for form in (unet.to(torch.float16), unet.to(torch.float32), copy.deepcopy(unet).to("cpu")):
        assert attentions(form) and all(are_stacked([a.to_q, a.to_k, a.to_v]) for a in attentions(form))
    unet.save_pretrained(tmp_path)
    again = type(unet).from_pretrained(tmp_path)
    assert all(are_stacked([a.to_q, a.to_k, a.to_v]) for a in attentions(again))
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), again.state_dict().values(), strict=True))
