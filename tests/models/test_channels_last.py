"""Channels-last memory must reach every GroupNorm, or its kernel cannot serve.

On CUDA in half precision convolutions follow the format of their weights, which is tested here on the CPU with
PyTorch's convolutions; gafext's write it whatever the weights have.
"""

import pytest
import torch
from helpers import max_abs_diff, randomized

from gafext.config import UNetConfig, VAEConfig
from gafext.models import base
from gafext.models.blocks import GroupNorm
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.ops.backend import set_attention_backend
from gafext.ops.group_norm_silu import unsupported_reasons

UNET = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=16,
    norm_num_groups=8,
    cross_view="position",
)
VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
)


def run_unet(network):
    sample = torch.randn(4, network.config.in_channels, 9, 6)
    pose = torch.randn(4, network.config.pose_dim) if network.config.pose_dim else None
    return network(sample, 500, torch.randn(4, 5, 16), pose=pose, num_views=2)


def run_vae(network):
    return network.decode(network.encode(torch.randn(2, 3, 18, 12))[0])


NETWORKS = [(MultiViewUNet, UNET, run_unet), (AutoencoderKL, VAE, run_vae)]


@torch.no_grad()
@pytest.mark.parametrize("by_weights", [True, False])
@pytest.mark.parametrize("make, config, run", NETWORKS, ids=[make.__name__ for make, *_ in NETWORKS])
def test_channels_last_reaches_every_norm(make, config, run, by_weights, monkeypatch):
    network = randomized(make(config), seed=1).eval()
    set_attention_backend(network, "sdpa")  # PyTorch's convolutions, in the memory format of x
    torch.manual_seed(0)
    expected = run(network)

    set_attention_backend(network, "sdpa" if by_weights else "auto")
    if by_weights:
        monkeypatch.setattr(base, "convolution_format", lambda device, dtype: torch.channels_last)
        network.to("cpu")
        weights = [p for p in network.parameters() if p.ndim == 4]
        assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    reasons = {}
    for name, module in network.named_modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: reasons.update(
                    {name: unsupported_reasons(inputs[0], module.num_groups)}
                )
            )
    torch.manual_seed(0)
    assert max_abs_diff(run(network), expected) < 1e-4 * expected.abs().max()
    norms = sum(isinstance(module, GroupNorm) for module in network.modules())
    assert len(reasons) == norms >= 8
    assert {tuple(why) for why in reasons.values()} == {()}

    monkeypatch.undo()
    network.to("cpu")
    assert all(p.is_contiguous() for p in network.parameters())


def test_half_precision_on_cuda_is_channels_last_and_nothing_else():
    for device, dtype, expected in (
        ("cuda", torch.float16, torch.channels_last),
        ("cuda", torch.bfloat16, torch.channels_last),
        ("cuda", torch.float32, torch.contiguous_format),
        ("cpu", torch.bfloat16, torch.contiguous_format),
        ("mps", torch.float16, torch.contiguous_format),
    ):
        assert base.convolution_format(torch.device(device), dtype) is expected
