"""gafext's attention as a backend of diffusers' dispatcher."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from helpers import called, max_abs_diff, normal, randomized

from gafext.integrations.dispatch import register_attention_backend


@torch.no_grad()
def test_a_transformer_gives_the_same():
    register_attention_backend()
    register_attention_backend()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    layers = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1}
    model = FluxTransformer2DModel(**layers, **sizes, joint_attention_dim=32, pooled_projection_dim=32).eval()
    randomized(model, seed=0)
    inputs = {
        "hidden_states": normal(1, 200, 4),
        "encoder_hidden_states": normal(1, 56, 32),
        "pooled_projections": normal(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": normal(200, 3),
        "txt_ids": normal(56, 3),
    }
    stock = model(**inputs).sample
    with attention_backend("native"):  # sets the process's backend back, which set_attention_backend changes too
        model.set_attention_backend("gafext")
        assert "gafext::flash_attention" in called(model, **inputs)
        assert max_abs_diff(model(**inputs).sample, stock) <= 1e-4
    model.reset_attention_backend()
    assert torch.equal(model(**inputs).sample, stock)


@pytest.mark.parametrize("case", ["mask", "causal", "scale", "grouped"])
def test_options(case):
    register_attention_backend()
    query = normal(2, 6, 4, 16)
    key, value = (normal(2, 6, 2 if case == "grouped" else 4, 16, seed=seed) for seed in (1, 2))
    options = {
        "mask": {"attn_mask": torch.eye(6, dtype=torch.bool)[None, None].expand(2, 1, 6, 6)},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.5},
        "grouped": {"enable_gqa": True},
    }[case]
    theirs = dispatch_attention_fn(query, key, value, backend="native", **options)
    ours = dispatch_attention_fn(query, key, value, backend="gafext", **options)
    assert max_abs_diff(ours, theirs) <= 1e-6
