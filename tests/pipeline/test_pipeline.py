"""The whole way on tiny checkpoints that diffusers and transformers save."""

import json
import os
import shutil
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers import BACKENDS, max_abs_diff
from PIL import Image
from small_checkpoints import (
    SIZE,
    count_rows,
    portrait,
    run,
    save_checkpoint,
    save_ip_adapter,
    save_lora,
    save_upsampler,
)

import gafext
from gafext.assets import PORTRAIT, CartoonWarning
from gafext.errors import OutputError
from gafext.families import family_of
from gafext.heads import head_normals
from gafext.noise import view_noise
from gafext.upsampler import NOISE_STEP


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_a_stock_tree_follows_diffusers(prediction_type, tmp_path):
    """Encode the normals, denoise, decode: the same loop written with diffusers' classes."""
    save_checkpoint(tmp_path, multi_view=False, prediction_type=prediction_type, seed=4)
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    cameras = gafext.cameras.orbit(3, elevation=10)
    normals = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    normals = (normals * 255).round() / 255
    latents = torch.randn(3, 4, SIZE, SIZE)
    ours = run(
        pipe,
        cameras=cameras,
        normal_maps=normals,
        num_inference_steps=4,
        latents=latents,
        upsample="none",
        guidance_scale=3.0,
    )

    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(4)
    pose = cameras.w2c[:, :3, :].reshape(3, 12)
    normal_latents = vae.encode(normals * 2 - 1).latent_dist.mean * 0.3
    for t in scheduler.timesteps:
        sample = torch.cat([latents, normal_latents], dim=1)
        output = unet(sample, t, torch.zeros(3, 1, 40), class_labels=pose).sample
        latents = scheduler.step(output, t, latents).prev_sample
    expected = (vae.decode(latents / 0.3).sample / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    assert max_abs_diff(ours.images, expected) < 1e-4


@torch.no_grad()
def test_guidance_is_two_passes(pipe):
    """Both passes in one batch give what two calls of the U-Net give."""
    latents = torch.randn(4, 4, SIZE, SIZE)
    seen = {}
    run(
        pipe,
        latents=latents,
        guidance_scale=5.0,
        num_inference_steps=1,
        callback_on_step_end=lambda p, i, t, kw: seen.update(t=t, **kw),
    )
    cameras = gafext.cameras.orbit(4)
    normals = pipe.encode(head_normals(cameras, 4 * SIZE))
    image_embeds = pipe.encode_portraits([portrait()]).conditional
    common = {"pose": cameras.pose(12), "num_views": 4}
    sample = torch.cat([latents, normals], 1)
    with_image = pipe.unet(sample, seen["t"], image_embeds=image_embeds, **common)
    without = pipe.unet(sample, seen["t"], **common)
    assert max_abs_diff(with_image, without) > 1e-2
    expected = pipe.scheduler.step(without + 5.0 * (with_image - without), seen["t"], latents)
    assert max_abs_diff(seen["latents"], expected) < 1e-4


@torch.no_grad()
def test_image_tokens_are_the_projected_last_hidden_state(pipe):
    features = pipe.image_encoder(pipe.image_encoder.preprocess(portrait()))
    tokens = pipe.encode_portraits([portrait()]).conditional
    assert tokens.shape == (1, 50, 40)
    assert max_abs_diff(tokens, pipe.unet.image_projection.proj(features.last_hidden_state)) < 1e-6
    assert max_abs_diff(tokens, pipe.unet.image_projection.proj(features.penultimate)) > 1e-3


def test_guidance_one_runs_no_unconditional_pass(pipe):
    rows = count_rows(pipe)
    run(pipe, guidance_scale=1.0)
    assert rows == [4, 4]
    rows.clear()
    run(pipe, guidance_scale=2.0)
    assert rows == [8, 8]


def test_image_keys_and_values_are_made_once_per_run(pipe):
    calls = []
    pipe.unet.transformer_blocks()[0].attn_ip.to_k.register_forward_hook(lambda *_: calls.append(1))
    run(pipe, num_inference_steps=3)
    assert len(calls) == 1


def test_the_seed_decides(pipe):
    first, again, other = (run(pipe, generator=seed).images for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(run(pipe, generator=generator).images, first)
    fresh = run(pipe, generator=None)
    assert torch.equal(run(pipe, generator=fresh.run["seed"]).images, fresh.images)


def test_numpy_integers_are_integers(pipe):
    options = {"num_inference_steps": np.int64(2), "generator": np.int64(3), "num_views": np.int64(2)}
    assert torch.equal(run(pipe, **options).images, run(pipe, generator=3, num_views=2).images)


def test_noise_of_a_view_depends_on_seed_portrait_and_view_alone():
    four, eight = (view_noise(7, portraits=2, views=v, shape=(4, 8, 8)).view(2, v, 4, 8, 8) for v in (4, 8))
    assert torch.equal(four, eight[:, :4])
    flat = eight.flatten(0, 1)
    assert len({tuple(x.flatten()[:3].tolist()) for x in flat}) == 16
    assert not torch.equal(flat, view_noise(8, portraits=2, views=8, shape=(4, 8, 8)))
    assert not torch.equal(flat, view_noise(7, portraits=2, views=8, shape=(4, 8, 8), step=1))
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05


def test_eta_draws_fresh_noise_at_every_step(pipe, monkeypatch):
    drawn, step = [], pipe.scheduler.step

    def spy(*arguments, noise=None, **options):
        drawn.append(noise)
        return step(*arguments, noise=noise, **options)

    monkeypatch.setattr(pipe.scheduler, "step", spy)
    run(pipe, generator=7, eta=1.0, num_inference_steps=3)
    expected = [view_noise(7, portraits=1, views=4, shape=(4, SIZE, SIZE), step=k) for k in (1, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_a_batch_of_portraits_is_each_alone(pipe):
    both = run(pipe, [portrait(0), portrait(1)], generator=5)
    assert len(both) == 2
    assert max_abs_diff(both[0].images, run(pipe, portrait(0), generator=5).images) < 1e-5
    assert not torch.equal(both[0].images, both[1].images)


def test_each_condition_changes_the_views(pipe):
    base = run(pipe).images
    cameras = gafext.cameras.orbit(4, elevation=40)
    ones = np.ones((4, 32, 32, 3), dtype=np.float32)
    changes = {
        "portrait": run(pipe, portrait(9)),
        "cameras": run(pipe, cameras=cameras, normal_maps=ones),
        "normals": run(pipe, normal_maps=ones),
        "guidance": run(pipe, guidance_scale=2.0),
        "eta": run(pipe, eta=1.0),
        "steps": run(pipe, num_inference_steps=3),
    }
    assert max_abs_diff(changes["cameras"].images, changes["normals"].images) > 1e-3
    for what, output in changes.items():
        assert max_abs_diff(output.images, base) > 1e-3, what


def test_attention_backends_agree(pipe):
    images = {}
    for backend in BACKENDS:
        pipe.set_attention_backend(backend)
        images[backend] = run(pipe, guidance_scale=2.0).images
    for backend in ("auto", "kernel", "sdpa"):
        assert max_abs_diff(images[backend], images["reference"]) < 1e-3, backend
    with pytest.raises(ValueError, match="attention backend: expected one of"):
        pipe.set_attention_backend("flash")


def test_renders_and_strength(pipe):
    views = np.random.default_rng(0).random((4, 32, 32, 3), dtype=np.float32)
    seen = []

    def note(pipe, step, timestep, kwargs):
        seen.append(timestep)

    near = run(pipe, renders=views, strength=0.25, num_inference_steps=8, callback_on_step_end=note)
    assert seen == [126, 1]  # the last quarter of 876, 751, ..., 126, 1
    clean = pipe.decode(pipe.encode(torch.from_numpy(views).permute(0, 3, 1, 2)))
    far = run(pipe, renders=views, strength=1.0, num_inference_steps=8)
    small = torch.nn.functional.avg_pool2d
    assert max_abs_diff(small(near.images, 2), small(far.images, 2)) > 1e-3
    assert (small(near.images, 2) - clean).abs().mean() < (small(far.images, 2) - clean).abs().mean()


def test_output_types(pipe):
    tensor = run(pipe).images
    assert tensor.shape == (4, 3, 64, 64) and tensor.dtype == torch.float32
    array = run(pipe, output_type="np").images
    assert array.shape == (4, 64, 64, 3) and max_abs_diff(torch.from_numpy(array).permute(0, 3, 1, 2), tensor) == 0
    pictures = run(pipe, output_type="pil").images
    assert [p.size for p in pictures] == [(64, 64)] * 4
    assert np.abs(np.asarray(pictures[2]) / 255 - array[2]).max() <= 0.5 / 255 + 1e-6
    latents = run(pipe, output_type="latent").images
    assert latents.shape == (4, 4, 16, 16)
    small = run(pipe, output_type="latent", upsample="none").images
    expected = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.equal(latents, expected)


def test_save_from_every_output_type(pipe, tmp_path):
    for output_type in ("pil", "np", "pt"):
        run(pipe, output_type=output_type).save(tmp_path / output_type)
    pictures = {f"view_00{i}.png" for i in range(4)}
    assert {"contact_sheet.png", "run.json", "transforms.json"} | pictures <= set(os.listdir(tmp_path / "pil"))
    pictures = [(tmp_path / kind / "view_003.png").read_bytes() for kind in ("pil", "np", "pt")]
    assert pictures[0] == pictures[1] == pictures[2]
    record = json.loads((tmp_path / "pil" / "run.json").read_text())
    assert record["seed"] == 0 and record["num_inference_steps"] == 2 and record["guidance_scale"] == 7.5
    assert record["crop"] is True and record["matte"] is False
    with pytest.raises(ValueError, match="latents"):
        run(pipe, output_type="latent").save(tmp_path / "latent")


def test_what_is_behind_transparent_normal_maps_and_renders(pipe, monkeypatch):
    monkeypatch.setattr(type(family_of(pipe.unet.config)), "background", (10, 20, 30))
    clear = [Image.new("RGBA", (32, 32), (0, 0, 255, 0))] * 2
    filled = {colour: [Image.new("RGB", (32, 32), colour)] * 2 for colour in ((10, 20, 30), (128, 128, 128))}
    got, expected = (
        pipe.prepare(portrait(), normal_maps=normals, renders=renders, num_views=2, strength=0.5, generator=0)
        for normals, renders in ((clear, clear), (filled[128, 128, 128], filled[10, 20, 30]))
    )
    assert torch.equal(got.latents, expected.latents)
    assert torch.equal(got.conditions.input_latents, expected.conditions.input_latents)


def test_each_portrait_and_the_normal_maps_are_saved_with_the_views(pipe, tmp_path):
    portraits, normals = [portrait(1), portrait(2)], [portrait(3, (32, 32)), portrait(4, (32, 32))]
    for index, output in enumerate(run(pipe, image=portraits, normal_maps=normals, num_views=2, output_type="pil")):
        folder = output.save(tmp_path / str(index))
        for name, picture in (("portrait", portraits[index]), ("normals/view_001", normals[1])):
            assert np.array_equal(np.asarray(Image.open(folder / f"{name}.png")), np.asarray(picture))


@torch.no_grad()
def test_the_upsampler_in_the_folder_is_used(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    upsampler = save_upsampler(tmp_path / "model" / "upsampler")
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    options = {"output_type": "latent", "generator": 6}
    small = run(pipe, upsample="none", **options).images
    noise = view_noise(6, portraits=1, views=4, shape=(4, 2 * SIZE, 2 * SIZE), step=NOISE_STEP)
    expected = upsampler(small, noise=noise)
    doubled = run(pipe, **options).images
    assert max_abs_diff(doubled, expected) < 1e-5
    assert max_abs_diff(doubled, run(pipe, upsample="bilinear", **options).images) > 1e-2

    for given, steps in (({"upsample_steps": 3}, 3), ({"preset": "fast"}, 1), ({}, 10)):
        ours = run(pipe, **options, **given)
        expected = upsampler(
            run(pipe, upsample="none", **options, **given).images, noise=noise, num_inference_steps=steps
        )
        assert max_abs_diff(ours.images, expected) < 1e-5 and ours.run["upsample_steps"] == steps
    assert run(pipe, upsample="bilinear", upsample_steps=3, **options).run["upsample_steps"] is None

    pipe.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "upsampler" / "text_encoder").exists()
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(run(again, **options).images, doubled)


@torch.no_grad()
def test_an_ip_adapter_and_a_lora(tmp_path):
    """Both change the views; guidance moves away from the projection of zero features, as IP-Adapter has it."""
    save_checkpoint(tmp_path, multi_view=False)
    adapter, lora = save_ip_adapter(tmp_path / "adapter.safetensors"), save_lora(tmp_path / "lora.safetensors")

    def load(**options):
        return gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu", **options)

    with pytest.warns(UserWarning, match="does not look at the portrait"):
        plain, tuned = load(), load(lora=lora)
    adapted = load(ip_adapter=adapter, ip_adapter_scale=0.7)
    assert adapted.unet.config.image_scale == 0.7
    latents = torch.randn(4, 4, SIZE, SIZE)
    options = {"latents": latents, "num_inference_steps": 1, "upsample": "none", "output_type": "latent"}
    base = run(plain, **options).images
    assert torch.equal(run(plain, portrait(5), **options).images, base)
    assert max_abs_diff(run(tuned, **options).images, base) > 1e-3
    untouched = load(lora=lora, lora_scale=0.0)
    assert torch.equal(run(untouched, **options).images, base)
    ours = run(adapted, guidance_scale=3.0, **options).images

    features = adapted.image_encoder(adapted.image_encoder.preprocess(portrait())).image_embeds
    cameras = gafext.cameras.orbit(4)
    normals = adapted.encode(head_normals(cameras, 4 * SIZE))
    sample = torch.cat([latents, normals], dim=1)
    negative, positive = (
        adapted.unet(sample, 1, pose=cameras.pose(12), image_embeds=adapted.unet.image_projection(x), num_views=4)
        for x in (torch.zeros_like(features), features)
    )
    assert max_abs_diff(negative, positive) > 1e-3
    expected = adapted.scheduler.step(negative + 3.0 * (positive - negative), 1, latents)
    assert max_abs_diff(ours, expected) < 1e-4


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
@torch.no_grad()
def test_schedulers_by_name(name, checkpoint):
    """The same noise through each solver, against the loop written with diffusers' scheduler."""
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu", scheduler=name)
    latents = torch.randn(4, 4, SIZE, SIZE)
    ours = run(
        pipe, latents=latents, num_inference_steps=6, guidance_scale=1.0, upsample="none", output_type="latent"
    ).images
    theirs = {
        "ddim": diffusers.DDIMScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
    }[name].from_pretrained(checkpoint / "scheduler")
    theirs.set_timesteps(6)
    cameras = gafext.cameras.orbit(4)
    given = {
        "pose": cameras.pose(12),
        "image_embeds": pipe.encode_portraits([portrait()]).conditional,
        "num_views": 4,
    }
    normals = pipe.encode(head_normals(cameras, 4 * SIZE))
    sample = latents * theirs.init_noise_sigma
    for t in theirs.timesteps:
        output = pipe.unet(torch.cat([theirs.scale_model_input(sample, t), normals], dim=1), t, **given)
        sample = theirs.step(output, t, sample).prev_sample
    assert max_abs_diff(ours, sample) < 1e-4 * max(1.0, sample.abs().max().item())


def test_callback_sees_every_step_and_may_replace_latents(pipe):
    steps = []

    def zero(pipe, step, timestep, kwargs):
        steps.append((step, timestep))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    result = run(pipe, num_inference_steps=3, callback_on_step_end=zero, output_type="latent").images
    assert steps == [(0, 667), (1, 334), (2, 1)]
    assert (result == 0).all()


def test_an_interrupt_leaves_the_pipeline_usable(pipe):
    def interrupt(*_):
        raise KeyboardInterrupt

    base = run(pipe).images
    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=interrupt)
    assert torch.equal(run(pipe).images, base)


def test_diffusers_way_to_stop_a_run(pipe):
    seen = []

    def stop(pipeline, step, timestep, tensors):
        seen.append((step, tensors["latents"].clone()))
        pipeline._interrupt = step == 1

    options = {"num_inference_steps": 4, "output_type": "latent", "upsample": "none"}
    latents = run(pipe, callback_on_step_end=stop, **options).images
    assert [step for step, _ in seen] == [0, 1] and torch.equal(latents, seen[-1][1])
    seen.clear()
    pipe._interrupt = True  # left by a callback that raised an error
    run(pipe, num_inference_steps=3, callback_on_step_end=lambda *args: seen.append(args[1]))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("callback", [None, lambda *_: None])
def test_a_run_is_stopped_from_without(pipe, callback):
    calls = []

    def stop(*_):
        calls.append(pipe)
        pipe._interrupt = True

    handle = pipe.unet.register_forward_pre_hook(stop)
    latents = run(pipe, num_inference_steps=4, output_type="latent", callback_on_step_end=callback).images
    handle.remove()
    assert len(calls) == 1 and latents.isfinite().all()


def test_save_pretrained_round_trip(pipe, tmp_path):
    pipe.guidance_scale = 4.5
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(str(tmp_path), device="cpu")
    assert again.guidance_scale == 4.5
    assert torch.equal(run(again).images, run(pipe).images)
    again.save_pretrained(tmp_path)  # over the files it is mapped from
    assert torch.equal(run(again).images, run(pipe).images)


def test_a_save_that_fails_leaves_the_older_checkpoint(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = deepcopy(pipe)
    other.guidance_scale = 3.0
    with torch.no_grad():
        other.unet.conv_in.bias.add_(1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(type(other.image_encoder), "save_pretrained", fail)
        other.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_save_that_cannot_be_moved_leaves_the_older_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    (tmp_path / "vae").write_text("a file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = deepcopy(pipe)
    other.guidance_scale = 3.0
    with pytest.raises(OutputError, match=r"expected a folder: .*vae"):
        other.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_save_through_a_link_to_another_disk(pipe, tmp_path):
    disk = Path(tempfile.mkdtemp(dir="/dev/shm")) if Path("/dev/shm").is_dir() else tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "unet").symlink_to(disk)
    pipe.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in disk.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(run(again).images, run(pipe).images)
    shutil.rmtree(disk)


def test_a_save_without_an_upsampler_leaves_that_of_before(pipe, tmp_path):
    (tmp_path / "upsampler").mkdir()
    (tmp_path / "upsampler" / "empty_prompt.safetensors").touch()
    assert pipe.upsampler is None
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "upsampler" / "empty_prompt.safetensors").exists()


def test_a_save_removes_what_readers_would_prefer(pipe, tmp_path):
    stem = "diffusion_pytorch_model"
    pipe.save_pretrained(tmp_path)
    stale = ("unet/{}.safetensors.index.json", "unet/{}-00001-of-00002.safetensors")
    kept = ("unet/{}.fp16.safetensors", "unet/notes.md")
    for name in (*stale, *kept):
        (tmp_path / name.format(stem)).write_text("{}")
    pipe.save_pretrained(tmp_path)
    assert not any((tmp_path / name.format(stem)).exists() for name in stale)
    assert all((tmp_path / name.format(stem)).exists() for name in kept)


def test_to_and_half_precision(checkpoint):
    single = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
    half = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, torch.bfloat16, "cpu")
    assert half.dtype == half.vae.dtype == half.image_encoder.dtype == torch.bfloat16
    difference = (run(half).images - run(single).images).abs()
    assert 0 < difference.mean() < 0.05
    assert torch.equal(run(single.to(torch.bfloat16)).images, run(half).images)


def test_embedded_default_says_what_it_knows():
    with pytest.warns(CartoonWarning, match="a cartoon"):
        pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(device="cpu")
    output = pipe(PORTRAIT, num_inference_steps=2, generator=0, progress_bar=False)
    assert [image.size for image in output.images] == [(256, 256)] * 4
    assert np.std(np.asarray(output.images[0])) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = gafext.MultiViewDiffusionPipeline.from_pretrained(device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), again.unet.parameters(), strict=True))
