"""Files in the states in which people have them: pointers, wrapped state dicts, configurations without fields."""

import json

import pytest
from helpers import CLIP_WEIGHTS, UNET_WEIGHTS, assert_equal_weights
from safetensors.torch import load_file, save_file
from small_checkpoints import NARROW, stock_clip, stock_text, stock_unet, stock_vae

from gafext import weights
from gafext.errors import CheckpointError
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.clip_text import CLIPTextEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.weights.keys import trained_key

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3463726504\n"


@pytest.mark.parametrize("name", [UNET_WEIGHTS, "config.json"])
def test_a_git_lfs_pointer_is_named_with_the_command(tmp_path, name):
    folder = tmp_path / "my model" / "unet"
    stock_unet(**NARROW).save_pretrained(folder)
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError) as caught:
        MultiViewUNet.from_pretrained(folder)
    assert f"{folder / name}: a git-LFS pointer" in str(caught.value)
    assert str(caught.value).endswith(f"git -C '{folder}' lfs pull")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "ema.", "unet.unet.", "unet._orig_mod.", "module.model.ema._orig_mod."]
)
@pytest.mark.parametrize(
    ("stock", "ours", "name"),
    [
        (lambda: stock_unet(**NARROW), MultiViewUNet, UNET_WEIGHTS),
        (stock_vae, AutoencoderKL, UNET_WEIGHTS),
        (stock_clip, CLIPVisionEncoder, CLIP_WEIGHTS),
        (stock_text, CLIPTextEncoder, CLIP_WEIGHTS),
    ],
    ids=["unet", "vae", "clip", "text"],
)
def test_prefixes_of_training_code_that_all_keys_have(tmp_path, prefix, stock, ours, name):
    stock().save_pretrained(tmp_path)
    expected = ours.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / name)
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / name)
    assert_equal_weights(ours.from_pretrained(tmp_path), expected)


def test_a_prefix_that_some_keys_lack_is_kept(tmp_path):
    model = stock_unet(**NARROW)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / UNET_WEIGHTS)
    averaged = {f"ema.{key}": value.clone() for key, value in tensors.items()}
    save_file(tensors | averaged, tmp_path / UNET_WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"unknown keys \({len(tensors)}\):\s+ema\."):
        MultiViewUNet.from_pretrained(tmp_path)


def test_latent_diffusions_own_prefix_stays():
    keys = ["module.model.diffusion_model.out.0.bias", "module.model.diffusion_model.out.0.weight"]
    assert list(map(weights.unwrapped_rule(keys), keys)) == [key.removeprefix("module.") for key in keys]
    assert trained_key("module.ema_model.conv_in.bias") == "conv_in.bias"
    assert weights.unwrapped_rule([])("module.x") == "module.x"


@pytest.mark.parametrize(
    ("stock", "ours", "values", "fields"),
    [
        (stock_unet, MultiViewUNet, {"_class_name": "UNet2DConditionModel"}, ["in_channels", "block_out_channels"]),
        (stock_unet, MultiViewUNet, {"_class_name": "MultiViewUNetModel"}, ["model_channels", "context_dim"]),
        (stock_vae, AutoencoderKL, {"_class_name": "AutoencoderKL", "_diffusers_version": "0.36"}, ["latent_channels"]),
        (stock_clip, CLIPVisionEncoder, {"architectures": ["CLIPVisionModel"]}, ["hidden_size", "patch_size"]),
    ],
)
def test_a_configuration_of_the_class_alone_names_the_missing_fields(tmp_path, stock, ours, values, fields):
    stock().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json: expected the fields ") as caught:
        ours.from_pretrained(tmp_path)
    assert all(name in str(caught.value) for name in fields)
