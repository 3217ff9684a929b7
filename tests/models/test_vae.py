"""AutoencoderKL against diffusers, on small checkpoints that diffusers itself saves."""

import re

import diffusers
import pytest
import torch
from helpers import UNET_WEIGHTS as WEIGHTS
from helpers import assert_backends_agree, assert_lists, edit_json, edit_weights, loaded_by, max_abs_diff, normal
from safetensors.torch import load_file
from small_checkpoints import stock_vae

from gafext.config import SD_VAE, VAEConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.vae import AutoencoderKL

WIDE = {"norm_num_groups": 8, "sample_size": 32}


def wide_vae(**changes):
    return stock_vae((32, 64), **{**WIDE, **changes})


def image(*shape, seed=0):
    return normal(*shape, seed=seed).clamp(-1, 1)


@pytest.fixture
def folder(tmp_path):
    wide_vae().save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize(
    ("widths", "changes", "size"),
    [
        ((32,), {}, (9, 7)),
        ((32, 64), {}, (18, 26)),
        ((32, 64), {"layers_per_block": 2, "latent_channels": 8}, (24, 24)),
        ((64, 32), {"in_channels": 4, "out_channels": 1}, (14, 6)),
        ((16, 48, 32), {"layers_per_block": 2, "norm_num_groups": 16}, (20, 36)),
        ((32, 64, 64), {"norm_num_groups": 32}, (28, 12)),
        ((16, 32, 64, 64), {"layers_per_block": 2}, (40, 72)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_diffusers(tmp_path, widths, changes, size, seed):
    theirs = stock_vae(widths, seed=seed, **{**WIDE, **changes})
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    assert not ours.training and ours.dtype == torch.float32

    pixels = image(2, changes.get("in_channels", 3), *size, seed=seed)
    posterior = theirs.encode(pixels).latent_dist
    mean, logvar = ours.encode(pixels)
    assert max_abs_diff(mean, posterior.mean) < 1e-5
    assert max_abs_diff(logvar, posterior.logvar) < 1e-5
    assert mean.shape[-2:] == tuple(edge // ours.config.factor for edge in size)

    latents = normal(*mean.shape, seed=seed)
    decoded = ours.decode(latents)
    assert max_abs_diff(decoded, theirs.decode(latents).sample) < 1e-5
    assert decoded.shape[-2:] == size


@torch.no_grad()
def test_logvar_is_clamped_as_in_diffusers(folder):
    def stretch(tensors):
        tensors["quant_conv.bias"][4:] = torch.tensor([-100.0, 100.0, 0.0, 19.0])

    edit_weights(folder / WEIGHTS, stretch)
    pixels = image(1, 3, 16, 16)
    _, logvar = AutoencoderKL.from_pretrained(folder).encode(pixels)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).encode(pixels).latent_dist.logvar
    assert max_abs_diff(logvar, theirs) < 1e-5
    assert logvar.min() == -30 and logvar.max() == 20


def test_every_backend_gives_the_same_image(folder):
    model = AutoencoderKL.from_pretrained(folder)
    assert_backends_agree(model, lambda: model.decode(normal(1, 4, 9, 5)), tolerance=1e-5)


@torch.no_grad()
def test_old_spelling_of_the_attention_keys(folder):
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for key in [key for key in tensors if ".attentions." in key]:
            block, new, kind = re.fullmatch(r"(.+\.attentions\.0)\.(.+)\.(weight|bias)", key).groups()
            tensors[f"{block}.{old.get(new, new)}.{kind}"] = tensors.pop(key)

    edit_weights(folder / WEIGHTS, rename)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in load_file(folder / WEIGHTS)
    latents = normal(1, 4, 8, 8)
    decoded = AutoencoderKL.from_pretrained(folder).decode(latents)
    assert max_abs_diff(decoded, theirs.decode(latents).sample) < 1e-5


def test_published_size():
    with torch.device("meta"):
        model = AutoencoderKL(SD_VAE)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863
    assert len(model.state_dict()) == 248
    assert model.config.factor == 8 and model.config.scaling_factor == 0.18215


def test_the_scaling_factor_is_the_files_own(tmp_path):
    wide_vae(scaling_factor=0.13025).save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor == 0.13025
    edit_json(tmp_path / "config.json", lambda config: config.pop("scaling_factor"))
    assert AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor == 0.18215


@torch.no_grad()
def test_what_it_saves_diffusers_loads(folder, tmp_path):
    ours = AutoencoderKL.from_pretrained(folder)
    theirs = loaded_by(diffusers.AutoencoderKL, ours, tmp_path / "saved")
    pixels = image(1, 3, 12, 20)
    mean, _ = ours.encode(pixels)
    assert max_abs_diff(mean, theirs.encode(pixels).latent_dist.mean) < 1e-5
    assert max_abs_diff(ours.decode(mean), theirs.decode(mean).sample) < 1e-5


@torch.no_grad()
def test_dtype_and_variant(folder):
    wide_vae().half().save_pretrained(folder, variant="fp16")
    assert AutoencoderKL.from_pretrained(folder, variant="fp16").dtype == torch.float32
    model = AutoencoderKL.from_pretrained(folder, variant="fp16", dtype=torch.bfloat16)
    assert model.decode(normal(1, 4, 4, 4).bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_weights(folder):
    model = AutoencoderKL.from_pretrained(folder)
    mean, logvar = model.encode(image(1, 3, 8, 8))
    (model.decode(mean).sum() + logvar.sum()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 17, 16), (1, 3, 16, 17), (1, 4, 16, 16), (3, 16, 16), (1, 3, 0, 8)])
def test_images_of_a_wrong_shape(shape):
    model = AutoencoderKL(VAEConfig.from_dict(dict(wide_vae().config)))
    with pytest.raises(ValueError, match=r"image: expected \(B,3,H,W\), H and W multiples of 2, got \("):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 8, 0), (1, 1, 4, 8, 8)])
def test_latents_of_a_wrong_shape(shape):
    model = AutoencoderKL(VAEConfig.from_dict(dict(wide_vae().config)))
    with pytest.raises(ValueError, match=r"latents: expected \(B,4,H,W\), got \("):
        model.decode(torch.zeros(shape))


def test_every_key_that_does_not_fit_is_listed(folder):
    def spoil(tensors):
        for key in ("encoder.conv_in.weight", "decoder.conv_out.bias"):
            del tensors[key]
        tensors["encoder.extra.weight"], tensors["loss.logvar"] = torch.zeros(1), torch.zeros(1)
        tensors["quant_conv.weight"] = torch.zeros(8, 7, 1, 1)
        tensors["post_quant_conv.bias"] = torch.zeros(5)

    edit_weights(folder / WEIGHTS, spoil)
    assert_lists(
        lambda: AutoencoderKL.from_pretrained(folder),
        *("missing keys (2)", "encoder.conv_in.weight", "decoder.conv_out.bias"),
        *("unknown keys (2)", "encoder.extra.weight", "loss.logvar"),
        *("wrong shapes (2)", "quant_conv.weight: expected [8, 8, 1, 1], got [8, 7, 1, 1]"),
        "post_quant_conv.bias: expected [4], got [5]",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(folder, value):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors["decoder.conv_in.weight"].view(-1)[5:7].fill_(value))
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight has 2 NaN or infinite values"):
        AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 4, 100, 20_000])
def test_a_truncated_file(folder, size):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        AutoencoderKL.from_pretrained(folder)


def test_missing_files(folder):
    with pytest.raises(CheckpointNotFoundError, match="nowhere: no such folder"):
        AutoencoderKL.from_pretrained(folder / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"\.fp16\.safetensors: no such file"):
        AutoencoderKL.from_pretrained(folder, variant="fp16")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json: no such file"):
        AutoencoderKL.from_pretrained(folder)


def test_a_pickle_is_refused_with_the_reason(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin .*can run code"):
        AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 2}, r"missing keys .*encoder\.down_blocks\.0\.resnets\.1\.conv1\.weight"),
        (
            {"latent_channels": 8},
            r"wrong shapes .*quant_conv\.bias: expected \[16\], got \[8\]",
        ),
        ({"block_out_channels": [32]}, "down_block_types"),
        ({"block_out_channels": [32, 60]}, "60 channels do not divide into norm_num_groups=8"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "latents_mean"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=False"),
        ({"use_quant_conv": False}, "use_quant_conv=False"),
        ({"layers_per_block": "2"}, "layers_per_block='2'"),
        ({"latent_channels": 0}, "latent_channels=0"),
    ],
)
def test_a_config_that_contradicts_the_weights_or_is_not_supported(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        AutoencoderKL.from_pretrained(folder)
