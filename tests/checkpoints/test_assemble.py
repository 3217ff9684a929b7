"""`gafext assemble`: what is added to the parents has no effect, yet can be trained."""

import json

import diffusers
import pytest
import torch
from helpers import UNET_WEIGHTS, max_abs_diff, randomized
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_checkpoints import portrait, run, stock_clip, stock_unet, stock_vae

import gafext
from gafext.checkpoints.assemble import assemble, load_trained
from gafext.cli import main
from gafext.errors import CheckpointError
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A stock Stable Diffusion folder and a CLIP folder, small."""
    folder = tmp_path_factory.mktemp("parents")
    stock_unet().save_pretrained(folder / "sd" / "unet")
    stock_vae(seed=None).save_pretrained(folder / "sd" / "vae")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "sd" / "scheduler")
    stock_clip(seed=None).save_pretrained(folder / "clip")
    return folder / "sd", folder / "clip"


@pytest.mark.parametrize("views", [4, 8])
@torch.no_grad()
def test_every_view_is_the_parents(parents, views):
    sd, clip = parents
    child = assemble(sd, image_encoder=clip).unet
    parent = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    latents = torch.randn(views, 4, 8, 8)
    expected = parent(latents, 301, torch.zeros(views, 1, 40)).sample
    result = child(
        torch.cat([latents, torch.randn(views, 4, 8, 8)], dim=1),
        301,
        pose=torch.randn(views, 12),
        image_embeds=child.image_projection(torch.randn(1, 50, 24)),
        num_views=views,
    )
    assert expected.std() > 0.1
    assert max_abs_diff(result, expected) < 1e-5


def test_every_addition_can_be_trained(parents):
    sd, clip = parents
    child = assemble(sd, image_encoder=clip).unet.train()
    sample, pose, image = torch.randn(4, 8, 8, 8), torch.randn(4, 12), torch.randn(1, 50, 24)
    optimizer = torch.optim.SGD(child.parameters(), lr=0.1)
    for _ in range(2):  # behind a zero layer, gradients come with the second step
        optimizer.zero_grad()
        out = child(sample, 301, pose=pose, image_embeds=child.image_projection(image), num_views=4)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        optimizer.step()
    added = ("attn_cv", "norm_cv", "attn_ip", "norm_ip", "class_embedding", "image_projection")
    dead = [n for n, p in child.named_parameters() if any(a in n for a in added) and not p.grad.abs().sum() > 0]
    assert not dead
    assert child.conv_in.weight.grad[:, 4:].abs().sum() > 0


def test_the_command_writes_a_checkpoint(parents, tmp_path, capsys):
    sd, clip = parents
    command = ["assemble", "--parent", str(sd), "--image-encoder", str(clip), "--out", str(tmp_path / "model")]
    assert main(command) == 0
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert pipe.unet.config.cross_view == "position" and pipe.unet.config.image_attention == "block"
    stock = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    latents = torch.randn(4, 4, 8, 8)
    ours = run(pipe, portrait(), latents=latents, upsample="none", output_type="latent").images
    scheduler = diffusers.DDIMScheduler.from_pretrained(sd / "scheduler")
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            latents = scheduler.step(stock(latents, t, torch.zeros(4, 1, 40)).sample, t, latents).prev_sample
    assert max_abs_diff(ours, latents) < 1e-4
    assert main(command) == 1
    assert "new or empty" in capsys.readouterr().err


def test_a_failure_leaves_nothing(parents, tmp_path, capsys):
    sd, _ = parents
    command = ["assemble", "--parent", sd, "--image-encoder", tmp_path / "none", "--out", tmp_path / "model"]
    assert main(list(map(str, command))) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(parents, tmp_path, capsys, monkeypatch):
    def save_file(tensors, path, **options):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gafext.weights.store.save_file", save_file)
    sd, clip = parents
    assert main(["assemble", "--parent", str(sd), "--image-encoder", str(clip), "--out", str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and ".safetensors: cannot be written (" in error and "No space left" in error
    assert list(tmp_path.iterdir()) == []


def test_a_trained_state_dict_under_other_names(parents, tmp_path):
    sd, clip = parents
    trained = randomized(assemble(sd, image_encoder=clip).unet, seed=8)
    renamed = {}
    for key, value in trained.state_dict().items():
        key = key.replace(".attn_cv.", ".attn_mv.").replace(".norm_cv.", ".norm_mv.")
        renamed["module.unet." + key.replace("class_embedding.", "pose_embedding.")] = value.clone()
    save_file(renamed, tmp_path / "trained.safetensors")
    child = assemble(sd, image_encoder=clip, trained=tmp_path / "trained.safetensors").unet
    assert all(torch.equal(a, b) for a, b in zip(child.parameters(), trained.parameters(), strict=True))

    renamed["module.unet.mystery.a"] = renamed["module.unet.mystery.b"] = torch.zeros(1)
    del renamed["module.unet.conv_in.bias"]
    save_file({k: v.clone() for k, v in renamed.items()}, tmp_path / "trained.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_trained(child, tmp_path / "trained.safetensors")
    assert all(part in str(error.value) for part in ("mystery.a", "mystery.b", "conv_in.bias"))


def test_a_parent_that_has_additions_is_refused(parents, tmp_path):
    sd, clip = parents
    assemble(sd, image_encoder=clip).save_pretrained(tmp_path / "child")
    with pytest.raises(CheckpointError, match="expected a stock U-Net"):
        assemble(tmp_path / "child", image_encoder=clip)


def test_copies_of_the_parents_attention_wait_behind_the_zeros(parents, tmp_path):
    sd, clip = parents
    assemble(sd, image_encoder=clip).save_pretrained(tmp_path)
    state = load_file(tmp_path / "unet" / UNET_WEIGHTS)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert torch.equal(state[f"{block}.attn_cv.to_q.weight"], state[f"{block}.attn1.to_q.weight"])
    assert torch.equal(state[f"{block}.attn_ip.to_k.weight"], state[f"{block}.attn2.to_k.weight"])
    assert not state[f"{block}.attn_cv.to_out.0.weight"].any()
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["in_channels"] == 8


def test_a_variant_that_clip_lacks(parents, tmp_path):
    sd, clip = parents
    for part, network in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        network.from_pretrained(sd / part).save_pretrained(tmp_path / part, variant="fp16")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.warns(UserWarning, match="clip: no weights of variant 'fp16'"):
        pipe = assemble(tmp_path, image_encoder=clip, variant="fp16")
    assert torch.equal(pipe.vae.quant_conv.bias, assemble(sd, image_encoder=clip).vae.quant_conv.bias)


@pytest.fixture
def single_file(parents, tmp_path, monkeypatch):
    """A file that passes for Stable Diffusion 2's: its networks are read from folders."""
    stock_unet(cross_attention_dim=1024).save_pretrained(tmp_path / "unet")
    for network, folder in ((MultiViewUNet, tmp_path / "unet"), (AutoencoderKL, parents[0] / "vae")):
        read = network.from_pretrained(folder)
        monkeypatch.setattr(network, "from_single_file", lambda path, read=read, **options: read)
    (tmp_path / "sd.safetensors").touch()
    return tmp_path / "sd.safetensors"


def test_what_a_single_file_predicts(parents, single_file, tmp_path, capsys):
    command = ["assemble", "--parent", single_file, "--image-encoder", parents[1], "--out"]
    for options, expected, told in (
        ([], "epsilon", True),
        (["--prediction-type", "epsilon"], "epsilon", False),
        (["--prediction-type", "v_prediction"], "v_prediction", False),
    ):
        out = tmp_path / f"{len(options)}-{expected}"
        assert main([*map(str, [*command, out, *options])]) == 0
        assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == expected
        error = capsys.readouterr().err
        assert ("--prediction-type" in error) is told and len(error.splitlines()) == told


def test_a_folder_says_itself_what_it_predicts(parents):
    with pytest.raises(ValueError, match="prediction_type: expected None"):
        assemble(parents[0], image_encoder=parents[1], prediction_type="epsilon")
