"""gafext's attention as a backend of diffusers' dispatcher."""

import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from helpers import called, max_abs_diff, normal, randomized
from small_checkpoints import stock_vae
from torch import nn

import gafext
from gafext.integrations.dispatch import register_attention_backend


def flux():
    """A small model, and inputs of it."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    layers = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1}
    model = FluxTransformer2DModel(**layers, **sizes, joint_attention_dim=32, pooled_projection_dim=32).eval()
    inputs = {
        "hidden_states": normal(1, 200, 4),
        "encoder_hidden_states": normal(1, 56, 32),
        "pooled_projections": normal(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": normal(200, 3),
        "txt_ids": normal(56, 3),
    }
    return randomized(model, seed=0), inputs


@torch.no_grad()
def test_a_transformer_gives_the_same():
    register_attention_backend()
    register_attention_backend()
    model, inputs = flux()
    stock = model(**inputs).sample
    with attention_backend("native"):  # sets the process's backend back, which set_attention_backend changes too
        model.set_attention_backend("gafext")
        assert "gafext::flash_attention" in called(model, **inputs)
        assert max_abs_diff(model(**inputs).sample, stock) <= 1e-4
    model.reset_attention_backend()
    assert torch.equal(model(**inputs).sample, stock)


@pytest.mark.parametrize("case", ["mask", "causal", "scale", "grouped", "dropout", "narrow values"])
def test_options(case):
    register_attention_backend()
    query, key_heads = normal(2, 6, 4, 16), 2 if case == "grouped" else 4
    key, value = normal(2, 6, key_heads, 16, seed=1), normal(2, 6, key_heads, 8 if "values" in case else 16, seed=2)
    mask = torch.eye(6, dtype=torch.bool)[None, None].expand(2, 1, 6, 6)
    options = {
        "mask": {"attn_mask": mask, "scale": 0.7},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.5},
        "grouped": {"enable_gqa": True, "scale": 0.7, "is_causal": True},
        "dropout": {"dropout_p": 0.5},
    }.get(case, {})
    results = []
    for backend in ("native", "gafext"):
        torch.manual_seed(0)
        results.append(dispatch_attention_fn(query, key, value, backend=backend, **options))
    assert max_abs_diff(*results) <= 1e-6


def test_accelerate_registers_it(monkeypatch):
    register_attention_backend()
    monkeypatch.delitem(AttentionBackendName._value2member_map_, "gafext")
    gafext.accelerate(nn.Identity())
    assert AttentionBackendName("gafext").name == "GAFEXT"


READ = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model, inputs, expected = pickle.load(file)
with torch.no_grad():
    assert torch.equal(model(**inputs).sample, expected)
from diffusers.models.attention_dispatch import attention_backend
with attention_backend("gafext"):
    pass
"""


@pytest.mark.parametrize("which", ["names it", "is accelerated"])
@torch.no_grad()
def test_another_process_reads_a_network_that(which, tmp_path):
    if which == "names it":
        register_attention_backend()
        model, inputs = flux()
        with attention_backend("native"):
            model.set_attention_backend("gafext")
    else:
        model, inputs = stock_vae((16, 16)), {"sample": normal(1, 3, 8, 8)}
        gafext.accelerate(model)
    (tmp_path / "pickled").write_bytes(pickle.dumps((model, inputs, model(**inputs).sample)))
    subprocess.run([sys.executable, "-c", READ, str(tmp_path / "pickled")], check=True)
