"""Bad arguments and checkpoints whose parts do not fit: clear errors before any work, and nothing half-built."""

import json

import numpy as np
import pytest
import torch
from helpers import edit_json
from small_checkpoints import count_rows, multi_view_config, multi_view_unet, run, save_checkpoint, save_upsampler

import gafext
from gafext.errors import CameraError, CheckpointError, CheckpointNotFoundError, ImageError
from gafext.models.unet import MultiViewUNet

BAD_ARGUMENTS = {
    "num_views": (dict(num_views=0), ValueError, "num_views"),
    "negative views": (dict(num_views=-3), ValueError, "num_views"),
    "low guidance": (dict(guidance_scale=0.9), ValueError, "guidance_scale"),
    "high guidance": (dict(guidance_scale=20.1), ValueError, "guidance_scale"),
    "NaN guidance": (dict(guidance_scale=float("nan")), ValueError, "guidance_scale"),
    "no steps": (dict(num_inference_steps=0), ValueError, "num_inference_steps"),
    "too many steps": (dict(num_inference_steps=1001), ValueError, "num_inference_steps"),
    "scaled camera": (dict(cameras=2 * torch.eye(4).repeat(4, 1, 1)), CameraError, "camera 0"),
    "three normal maps": (
        dict(normal_maps=np.zeros((3, 8, 8, 3), np.uint8)),
        ValueError,
        "normal_maps: expected 4",
    ),
    "three renders": (dict(renders=np.zeros((3, 8, 8, 3), np.uint8)), ValueError, "renders: expected 4"),
    "strength alone": (dict(strength=0.5), ValueError, "strength"),
    "strength 0": (dict(strength=0.0, renders=np.zeros((4, 8, 8, 3), np.uint8)), ValueError, "strength"),
    "strength of no step": (
        dict(strength=0.1, renders=np.zeros((4, 8, 8, 3), np.uint8)),
        ValueError,
        "no step",
    ),
    "latents": (dict(latents=torch.zeros(3, 4, 8, 8)), ValueError, r"latents: expected \[4,4,s,s\]"),
    "eta": (dict(eta=1.5), ValueError, "eta"),
    "upsample": (dict(upsample="cubic"), ValueError, "upsample"),
    "steps of the upsampler": (dict(upsample_steps=0), ValueError, "upsample_steps: expected a whole number"),
    "output type": (dict(output_type="tiff"), ValueError, "output_type"),
    "seed": (dict(generator=-1), ValueError, "generator"),
    "cameras and another number": (dict(cameras=torch.eye(4).repeat(3, 1, 1), num_views=2), ValueError, "num_views"),
    "cameras and no views": (dict(cameras=torch.eye(4).repeat(3, 1, 1), num_views=0), ValueError, "num_views"),
    "views as a truth": (dict(num_views=True), ValueError, "num_views"),
    "latents of NumPy": (dict(latents=np.zeros((4, 4, 8, 8))), ValueError, "latents: expected a tensor"),
    "text for strength": (dict(strength="a"), ValueError, "strength"),
    "text for eta": (dict(eta="a"), ValueError, "eta"),
    "no image": (dict(image="nowhere.png"), ImageError, "nowhere.png"),
    "no portraits": (dict(image=[]), ValueError, "portrait"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named_before_any_work(case, pipe):
    options, error, words = BAD_ARGUMENTS[case]
    rows = count_rows(pipe)
    with pytest.raises(error, match=words):
        run(pipe, **options)
    assert not rows


def test_a_unet_without_normals_refuses_them(tmp_path, checkpoint):
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
    unet = multi_view_unet(in_channels=4, seed=0)
    plain = gafext.MultiViewDiffusionPipeline(
        unet=unet, vae=pipe.vae, scheduler=pipe.scheduler, image_encoder=pipe.image_encoder
    )
    assert run(plain).images.shape == (4, 3, 64, 64)
    with pytest.raises(ValueError, match="normal_maps: expected None"):
        run(plain, normal_maps=np.zeros((4, 8, 8, 3), np.uint8))


def test_parts_that_do_not_fit_together(pipe):
    parts = {"vae": pipe.vae, "scheduler": pipe.scheduler, "image_encoder": pipe.image_encoder}
    with pytest.raises(CheckpointError, match="in_channels"):
        gafext.MultiViewDiffusionPipeline(unet=MultiViewUNet(multi_view_config(in_channels=5)), **parts)
    with pytest.raises(CheckpointError, match="hidden_size 25"):
        gafext.MultiViewDiffusionPipeline(unet=MultiViewUNet(multi_view_config(image_embed_dim=25)), **parts)
    with pytest.raises(CheckpointError, match="image_encoder: expected one"):
        gafext.MultiViewDiffusionPipeline(unet=pipe.unet, **{**parts, "image_encoder": None})


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_a_missing_part_is_named(part, checkpoint, tmp_path):
    for folder in checkpoint.iterdir():
        if folder.name != part:
            (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(CheckpointNotFoundError, match=part):
        gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path)


def test_a_checkpoint_that_is_nowhere(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("./no/such/folder", "nobody/nothing"):
        with pytest.raises(CheckpointNotFoundError, match=name):
            gafext.MultiViewDiffusionPipeline.from_pretrained(name)


@pytest.mark.parametrize("returned", [torch.zeros(4, 4, 8, 8), {"latents": torch.zeros(1)}, {"latents": 3}])
def test_what_a_callback_must_not_return(returned, pipe):
    with pytest.raises(ValueError, match="callback_on_step_end: expected"):
        run(pipe, callback_on_step_end=lambda *_: returned)


def test_saving_over_another_pipeline_leaves_nothing_of_it(pipe, checkpoint, tmp_path):
    pipe.upsampler = save_upsampler(tmp_path / "upsampler")
    pipe.prompt_embeds = torch.randn(1, 3, 40)
    pipe.save_pretrained(tmp_path)
    plain = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
    plain.save_pretrained(tmp_path)
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert again.upsampler is None and again.prompt_embeds is None
    assert torch.equal(run(again).images, run(plain).images)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"guidance_scale": 50}, "guidance_scale: expected a number from 1.0 to 20.0, got 50"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"unet": None}, "expected a unet, got null"),
        ({"image_encoder": [None, None]}, "image_encoder: expected one"),
    ],
)
def test_a_damaged_index_is_named(values, words, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    edit_json(tmp_path / "model_index.json", **values)
    with pytest.raises(CheckpointError, match=words) as error:
        gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("values", [{}, {"scaling_factor": 0.13025}])
def test_an_upsampler_of_other_latents_is_refused(tmp_path, values):
    save_checkpoint(tmp_path)  # its autoencoder has 0.3
    save_upsampler(tmp_path / "upsampler")
    path = tmp_path / "upsampler" / "vae" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(values))
    factor = values.get("scaling_factor", 0.18215)
    with pytest.raises(CheckpointError, match=f"expected the VAE's scaling_factor 0.3, got {factor}"):
        gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    path.write_text('{"scaling_factor": 0.3}')
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert pipe.upsampler.scaling_factor == 0.3


def test_code_beside_the_weights_never_runs(tmp_path):
    """Files with code in every place where diffusers or transformers would look for it."""
    save_checkpoint(tmp_path)
    save_upsampler(tmp_path / "upsampler")
    marker = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Custom: pass\n"
    for folder in ("", "unet", "vae", "image_encoder", "scheduler", "upsampler", "upsampler/unet"):
        for name in ("pipeline", "custom", "unet", "modeling_custom", "__init__", "conftest"):
            (tmp_path / folder / f"{name}.py").write_text(code)
    (tmp_path / "model_index.json").write_text(
        json.dumps(
            {"_class_name": ["pipeline", "Custom"], "unet": ["custom", "Custom"], "vae": ["diffusers", "Custom"]}
        )
    )
    edit_json(tmp_path / "unet" / "config.json", _name_or_path="custom.Custom")
    run(gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu"))
    edit_json(tmp_path / "image_encoder" / "config.json", auto_map={"AutoModel": "modeling_custom.Custom"})
    with pytest.raises(CheckpointError, match=r"image_encoder/config\.json: auto_map="):
        gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert not marker.exists()
    exec(code, {})
    assert marker.exists()  # the code would have
