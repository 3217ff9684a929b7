"""Attention layers in half precision with scores that float16 cannot hold, against diffusers."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention as StockAttention
from diffusers.models.attention_processor import AttnProcessor
from helpers import max_abs_diff, normal, randomized
from small_checkpoints import NARROW, stock_unet

from gafext.models.attention import Attention, CrossViewAttention
from gafext.models.unet import MultiViewUNet
from gafext.ops.backend import set_attention_backend


@pytest.mark.parametrize("backend", ["auto", "kernel", "sdpa", "reference"])
@torch.no_grad()
def test_upcast_attention_has_the_scores_in_float32_as_diffusers(backend):
    stock = StockAttention(32, heads=2, dim_head=16, upcast_attention=True, processor=AttnProcessor())
    stock = randomized(stock, seed=3).half()
    stock.to_k.weight.copy_(stock.to_q.weight)
    ours, views = Attention(32, 2).half(), CrossViewAttention(32, 2).half()
    x = (100 + normal(2, 24, 32) / 4).half()
    query, key = (torch.nn.functional.linear(x, layer.weight).float() for layer in (stock.to_q, stock.to_k))
    assert (query[..., :16] @ key[..., :16].mT).abs().max() > 65504
    for layer in (ours, views):
        layer.load_state_dict(stock.state_dict())
        set_attention_backend(layer, backend)
        layer.upcast_attention = True
    expected = stock(x)
    for result in (ours(x), views(x.transpose(0, 1), len(x[0])).transpose(0, 1)):
        assert result.dtype == torch.float16
        assert max_abs_diff(result, expected) < 4 * torch.finfo(torch.float16).eps * expected.abs().max()
    ours.upcast_attention = False
    assert ours(x).isfinite().all() == (backend != "reference")


@pytest.mark.parametrize("value", [True, False, None])
def test_the_configuration_decides_and_is_kept(tmp_path, value):
    stock_unet(**NARROW, upcast_attention=value).save_pretrained(tmp_path / "stock")
    unet = MultiViewUNet.from_pretrained(tmp_path / "stock")
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    assert layers and all(layer.upcast_attention == bool(value) for layer in layers)
    unet.save_pretrained(tmp_path / "ours")
    assert diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours").config.upcast_attention == value
