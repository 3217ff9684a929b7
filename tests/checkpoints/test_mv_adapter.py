"""Files of MV-Adapter: what is read, what is refused, and `gafext assemble` on top of one."""

import diffusers
import pytest
import torch
from helpers import assert_equal_weights, assert_lists, edit_json, edit_weights, max_abs_diff, normal
from plain_mv_adapter import save_mv_adapter
from small_checkpoints import (
    SD_SCHEDULE,
    multi_view_unet,
    run,
    stock_clip,
    stock_text,
    stock_tokenizer,
    stock_unet,
    stock_vae,
)

import gafext
from gafext.checkpoints.assemble import assemble
from gafext.checkpoints.mv_adapter import with_mv_adapter
from gafext.cli import main
from gafext.errors import CheckpointError
from gafext.models.int8 import unsupported_reasons
from gafext.models.unet import MultiViewUNet

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture
def stock(tmp_path):
    """A stock folder and an adapter file, not shared: the tests edit them."""
    unet = stock_unet(cross_attention_dim=32)
    unet.save_pretrained(tmp_path / "sd/unet")
    stock_vae(seed=None).save_pretrained(tmp_path / "sd/vae")
    stock_text().save_pretrained(tmp_path / "sd/text_encoder")
    stock_tokenizer(tmp_path / "sd/tokenizer")
    diffusers.DDIMScheduler(**SD_SCHEDULE, clip_sample=False).save_pretrained(tmp_path / "sd/scheduler")
    return tmp_path / "sd", save_mv_adapter(tmp_path / "mv.safetensors", unet)


def load(folder, **options):
    return gafext.MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu", **options)


def test_the_parent_is_unchanged_and_shared(stock):
    folder, file = stock
    parent = MultiViewUNet.from_pretrained(folder / "unet")
    before, config = {name: value.clone() for name, value in parent.state_dict().items()}, parent.config
    adapted = with_mv_adapter(parent, file)
    assert parent.config is config and adapted.config.has_mv_adapter and not adapted.training
    assert_equal_weights(parent, before)
    assert adapted.conv_in.weight.data_ptr() == parent.conv_in.weight.data_ptr()


def test_the_condition_encoder_under_its_name(stock, tmp_path):
    folder, file = stock
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    prefixed = save_mv_adapter(tmp_path / "prefixed.safetensors", unet, prefix="cond_encoder.")
    parent = MultiViewUNet.from_pretrained(folder / "unet")
    assert_equal_weights(with_mv_adapter(parent, prefixed), with_mv_adapter(parent, file))


def test_every_misfit_is_listed(stock):
    folder, file = stock

    def spoil(tensors):
        del tensors[f"{BLOCK}.attn1.processor.to_out_ref.0.bias"], tensors["adapter.conv_in.bias"]
        tensors[f"{BLOCK}.attn2.processor.to_q_mv.weight"] = torch.zeros(1)
        tensors[f"{BLOCK}.attn1.processor.to_q_mv.weight"] = torch.zeros(64, 64)

    edit_weights(file, spoil)
    assert_lists(
        lambda: load(folder, mv_adapter=file),
        str(file),
        f"{BLOCK}.adapter.ref.to_out.0.bias",
        "ray_encoder.conv_in.bias",
        f"{BLOCK}.attn2.processor.to_q_mv.weight",
        f"{BLOCK}.adapter.mv.to_q.weight: expected [32, 32], got [64, 64]",
    )


def test_the_text_to_multi_view_kind_is_refused_with_the_other_ones_name(stock):
    folder, file = stock
    save_mv_adapter(file, diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"), kinds=("mv",))
    with pytest.raises(CheckpointError, match=r"text-to-multi-view .* mvadapter_i2mv_sd21\.safetensors"):
        load(folder, mv_adapter=file)


def test_other_files_and_other_parents_are_refused(stock, tmp_path, checkpoint):
    folder, file = stock
    with pytest.raises(CheckpointError, match="expected a .safetensors file"):
        load(folder, mv_adapter=tmp_path / "mv.bin")
    with pytest.raises(CheckpointError, match="no such file"):
        load(folder, mv_adapter=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="mv_adapter: expected a stock U-Net"):
        load(checkpoint, mv_adapter=file)
    with pytest.raises(ValueError, match="mv_adapter: expected a stock U-Net"):
        with_mv_adapter(multi_view_unet(), file)
    with pytest.raises(ValueError, match="mv_adapter.*: expected None for the built-in model"):
        load(None, mv_adapter=file)
    edit_json(folder / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr: expected false"):
        load(folder, mv_adapter=file)


def test_the_command_line_refuses_in_one_line_and_writes_nothing(stock, tmp_path, capsys):
    folder, file = stock
    edit_weights(file, lambda tensors: tensors.pop("adapter.conv_in.bias"))
    out = tmp_path / "views"
    assert main(["generate", "--model", str(folder), "--mv-adapter", str(file), "--out", str(out)]) == 1
    assert "ray_encoder.conv_in.bias" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("with_encoder", [False, True])
def test_assembled_it_makes_the_adapters_views(stock, with_encoder, tmp_path):
    folder, file = stock
    command = ["assemble", "--parent", folder, "--mv-adapter", file, "--out", tmp_path / "model"]
    if with_encoder:
        stock_clip(seed=None).save_pretrained(tmp_path / "clip")
        command += ["--image-encoder", tmp_path / "clip"]
    assert main(list(map(str, command))) == 0
    child, parent = load(tmp_path / "model"), load(folder, mv_adapter=file)
    config = child.unet.config
    assert config.in_channels == 8 and config.has_mv_adapter and config.pose_dim is None
    assert (config.image_attention == "block") == with_encoder
    assert child.guidance_scale == 3.0
    assert max_abs_diff(run(child).images, run(parent).images) < 1e-5
    assert torch.equal(child.scheduler.alphas_cumprod, parent.scheduler.alphas_cumprod)


def test_assembled_and_trained_the_normals_have_an_effect(stock):
    """The added channels of conv_in are zero but not dead, and the adapter trains with them."""
    folder, file = stock
    unet = assemble(folder, mv_adapter=file).unet.train()
    given = {"reference_latents": torch.randn(1, 4, 8, 8), "rays": torch.rand(3, 6, 1, 1)}
    unet(torch.randn(3, 8, 8, 8), 301, num_views=3, **given).square().sum().backward()
    assert not unet.conv_in.weight[:, 4:].any() and unet.conv_in.weight.grad[:, 4:].abs().sum() > 0
    assert all(block.adapter.mv.to_q.weight.grad.abs().sum() > 0 for block in unet.transformer_blocks())


def test_assemble_without_image_encoder_needs_an_adapter_of_its_own(stock, tmp_path, capsys):
    folder, _ = stock
    assert main(["assemble", "--parent", str(folder), "--out", str(tmp_path / "model")]) == 1
    assert "image_encoder: expected a folder" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@torch.no_grad()
@pytest.mark.skipif(bool(unsupported_reasons(torch.device("cpu"))), reason="needs a processor with VNNI")
def test_int8_linear_layers(stock):
    folder, file = stock
    given = {"reference_latents": normal(1, 4, 8, 8, seed=1), "rays": normal(3, 6, 1, 1, seed=2).sigmoid()}
    exact, rounded = (
        load(folder, dtype=dtype, mv_adapter=file).unet(normal(3, 4, 8, 8), 301, num_views=3, **given)
        for dtype in (None, "int8")
    )
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1
