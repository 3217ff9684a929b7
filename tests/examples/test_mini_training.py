"""The training scripts of the built-in model, at a size that trains in seconds."""

import json
import shutil
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gafext import AutoencoderKL, CLIPVisionEncoder, LatentUpsampler, MultiViewDiffusionPipeline, MultiViewUNet, heads
from gafext.cameras import Cameras, orbit
from gafext.config import SchedulerConfig
from gafext.evaluation import as_portrait, subjects
from gafext.heads.shape import MEASURES, SHAPE, beard_numbers, hairstyle_numbers
from gafext.models.head_fitter import HeadShape
from gafext.schedulers import SCHEDULERS, DDIMScheduler, schedule, scheduler_class
from gafext.training.denoiser import diffuse


def train(script, out, *more):
    script.main(["--rung", "test", "--device", "cpu", "--out", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def trained(scripts, tmp_path_factory):
    """A folder in which each stage was trained for a few steps, in turn."""
    out = tmp_path_factory.mktemp("mini")
    few = {"HEADS": 4, "SCENES": 4, "PICTURES": 12, "HELD_OUT": 16, "BATCH": 8, "FRESH": 2}
    for name, value in few.items():
        setattr(scripts["head_detector"], name, value)
    for name, value in {"POOL": 6, "KEPT": 8, "HELD_OUT": 4, "NORMALS": 16, "BATCH": 8, "FRESH": 2}.items():
        setattr(scripts["head_fitter"], name, value)
    for name, value in {"POOL": 6, "KEPT": 8, "HELD_OUT": 4, "BATCH": 8, "FRESH": 2}.items():
        setattr(scripts["image_encoder"], name, value)
    for stage in ("vae", "head_detector", "head_fitter", "image_encoder", "unet", "upsampler"):
        train(scripts[stage], out, "--steps", 3)
    return out


def test_weights_are_carried_over_to_a_network_with_one_more_level(scripts):
    rungs, carry_over = scripts["rungs"], scripts["initial"].carry_over
    torch.manual_seed(0)
    shallow, deep = (rungs.RUNGS[name].unet for name in ("cpu", "sharp"))
    deep = replace(deep, block_out_channels=(32, 64, 96), attention_head_dim=(1, 2, 3))
    shallow, deep = MultiViewUNet(shallow), MultiViewUNet(deep)
    before = {key: value.clone() for key, value in deep.state_dict().items()}
    copied = carry_over(deep, shallow.state_dict())
    now, small = deep.state_dict(), shallow.state_dict()
    for level in (0, 1):
        conv = "resnets.0.conv2.weight"
        assert torch.equal(now[f"down_blocks.{level + 1}.{conv}"], small[f"down_blocks.{level}.{conv}"])
        assert torch.equal(now[f"up_blocks.{level}.{conv}"], small[f"up_blocks.{level}.{conv}"])
    for key in (f"down_blocks.0.{conv}", f"up_blocks.2.{conv}", "conv_in.weight"):  # the new level, and another shape
        assert torch.equal(now[key], before[key])
    assert 200 < copied < len(small)
    assert carry_over(shallow, small) == len(small)


def test_the_unet_is_trained_on_what_the_solvers_undo(scripts):
    clean, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    alphas = schedule.alphas_cumprod(scripts["unet"].SCHEDULE)
    assert alphas[-1] == 0  # the last timestep is noise alone, where a run starts
    for timestep in (0, 500, 999):
        ours = alphas[timestep].expand(3)
        noised, wanted = diffuse(clean, noise, ours)
        signal, level = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
        found, _ = schedule.predicted("v_prediction", wanted, noised, signal, level)
        assert torch.allclose(found, clean, atol=1e-5)


def test_a_noisier_schedule_divides_the_signal_to_noise_ratio(scripts):
    config, noisier = scripts["unet"].SCHEDULE, scripts["unet"].noisier
    before, after = (schedule.alphas_cumprod(c).double() for c in (config, noisier(config, 4.0)))
    assert after[-1] == 0 and noisier(config, 1.0) is config
    ratio = (before / (1 - before))[:-1] / (after / (1 - after))[:-1]
    assert torch.allclose(ratio[:-1], torch.full_like(ratio[:-1], 4.0), rtol=1e-3) and after[-2] > 2**-24
    read = SchedulerConfig.from_dict(json.loads(json.dumps(noisier(config, 4.0).to_dict())))  # it is saved and read
    for name in SCHEDULERS:
        made = scheduler_class(name).from_config(DDIMScheduler(read).config)
        made.set_timesteps(10)
        assert torch.isfinite(made.timesteps.float()).all()


def test_a_portrait_is_told_by_its_colours_and_irises(scripts):
    encoder = scripts["image_encoder"]
    drawn = heads.make_heads(range(40))
    made = encoder.portraits_of(drawn, 96, 8, torch.Generator().manual_seed(0))
    assert made.appearance.shape == (40, sum(encoder.SIZES)) and made.irises.shape == (40, 144, 3)
    whole = dict(zip(encoder.NAMES, made.appearance.split(encoder.SIZES, dim=1), strict=True))
    assert torch.equal(whole["iris"], drawn.iris) and torch.equal(whole["ambient"][:, 0], drawn.ambient)
    assert torch.equal(whole["skin"], drawn.colour[:, 0])
    assert 10 <= made.unchanged.sum() <= 30
    shown = (made.irises.amax(2) > 0).sum(1)
    assert (shown >= 1).all() and (shown <= 12).all()  # of 144 patches those of two eyes
    dark, light = drawn.iris.sum(1).argmin(), drawn.iris.sum(1).argmax()
    assert made.irises[dark].amax() > made.irises[light].amax()


def test_what_is_told_of_a_portrait_is_a_share_of_its_variance(scripts):
    encoder = scripts["image_encoder"]
    drawn = heads.make_heads(range(10))
    held_out = encoder.portraits_of(drawn, 16, 8, torch.Generator())

    class Output(NamedTuple):
        last_hidden_state: torch.Tensor

    def answer(told):
        return encoder.explained(lambda pictures: Output(torch.zeros(10, 5, 4)), lambda hidden: (told, None), held_out)

    right = answer(held_out.appearance)
    assert tuple(right) == encoder.NAMES and set(right.values()) == {1.0}
    mean = answer(held_out.appearance.mean(0).expand(10, -1))
    assert all(abs(share) < 1e-4 for share in mean.values())


def test_the_unet_begins_as_its_parent_and_with_the_taught_encoder(scripts, trained, tmp_path):
    unet, rung = scripts["unet"], scripts["rungs"].RUNGS["test"]
    for name in ("model", "image_encoder"):
        shutil.copytree(trained / name, tmp_path / name)
    parent = tmp_path / "parent"
    old = MultiViewUNet(replace(rung.unet, addition_embed_type=None))
    old.save_pretrained(parent / "unet")
    CLIPVisionEncoder(rung.image_encoder).save_pretrained(parent / "image_encoder")
    pipe = unet.untrained(tmp_path, rung, parent, torch.device("cpu"))
    taught = CLIPVisionEncoder.from_pretrained(trained / "image_encoder").state_dict()
    assert all(torch.equal(value, taught[key]) for key, value in pipe.image_encoder.state_dict().items())
    given = {"pose": torch.randn(2, 12), "image_embeds": torch.randn(1, 5, 96), "num_views": 2}
    sample = torch.randn(2, 16, 16, 16)
    with torch.no_grad():
        assert torch.allclose(pipe.unet(sample, 500, **given), old(sample, 500, **given), atol=1e-5)
    assert pipe.unet.add_embedding is not None


def test_measures_of_parts_that_a_head_has_not_are_not_learned(scripts):
    fitter = scripts["head_fitter"]
    numbers = torch.full((6, len(SHAPE)), 0.5)
    numbers[:5, SHAPE.index("style")] = hairstyle_numbers().float()
    numbers[5, SHAPE.index("beard")] = beard_numbers()[1].float()
    style, bearded = fitter.styles(numbers)
    assert style.tolist() == [0, 1, 2, 3, 4, 2] and bearded.tolist() == [False] * 5 + [True]
    shown = {name: column.tolist() for name, column in zip(MEASURES, fitter.visible(numbers).T, strict=True)}
    assert shown["bun_size"] == [False, False, False, True, False, False]
    assert shown["hairline"] == [False] + [True] * 5 and shown["beard_line"] == bearded.tolist()
    assert shown["skull_width"] == [True] * 6
    right = HeadShape(
        numbers[:, [SHAPE.index(n) for n in MEASURES]], 50 * F.one_hot(style, 5).float(), 50 * (bearded * 2.0 - 1)
    )
    assert fitter.error(right, numbers) < 1e-6
    unseen = right.measures.clone()
    unseen[0, MEASURES.index("bun_size")] = 9
    assert fitter.error(right._replace(measures=unseen), numbers) < 1e-6
    unseen[3, MEASURES.index("bun_size")] = 9
    assert fitter.error(right._replace(measures=unseen), numbers) > 0.1


def test_positions_are_interpolated_when_the_portrait_is_larger(scripts):
    resized = scripts["initial"]._resized
    rows = torch.cat([torch.full((1, 2), 9.0), torch.arange(4.0).repeat_interleave(4)[:, None].repeat(1, 2)])
    assert torch.allclose(resized(rows, 17), rows)
    larger = resized(rows, 1 + 64)
    assert larger.shape == (65, 2) and torch.equal(larger[0], rows[0])
    assert (larger[1:].view(8, 8, 2).diff(dim=0) > 0).all() and larger[1:].view(8, 8, 2).diff(dim=1).abs().max() < 1e-5


def test_the_upsampler_is_trained_on_what_its_loop_undoes(scripts, trained, monkeypatch):
    upsampler = LatentUpsampler.from_pretrained(trained / "model" / "upsampler")
    upsampler.scheduler.set_timesteps(1)
    sigma, last = upsampler.scheduler.sigmas.tolist()
    assert last == 0  # a run of one step ends at what the network makes of the first noise
    clean, noise = torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 16)
    noised, wanted = scripts["upsampler"].diffuse(clean, noise, torch.full((2, 1, 1, 1), sigma))

    def answer(sample, timestep, *prompt):
        assert torch.allclose(sample[:, :8], noised, atol=1e-6)
        return torch.cat([wanted, wanted[:, :1]], dim=1)

    monkeypatch.setattr(upsampler.unet, "forward", answer)
    made = upsampler(torch.zeros(2, 8, 8, 8), noise=noise + clean / sigma, num_inference_steps=1)
    assert torch.allclose(made, clean, atol=1e-5)


def test_a_resumed_run_goes_on_as_the_one_that_was_stopped(scripts, tmp_path):
    train(scripts["vae"], tmp_path / "whole", "--steps", 6)
    train(scripts["vae"], tmp_path / "halves", "--steps", 3)
    train(scripts["vae"], tmp_path / "halves", "--steps", 6)
    whole, halves = (torch.load(tmp_path / name / "vae.pt") for name in ("whole", "halves"))
    assert halves["step"] == 6
    for kind in ("modules", "averaged"):
        for key, value in whole[kind]["vae"].items():
            assert torch.equal(value, halves[kind]["vae"][key]), (kind, key)


def test_the_autoencoder_learns(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr("training.RECORD", 20)
    train(scripts["vae"], tmp_path, "--steps", 80)
    curves = json.loads((tmp_path / "vae.json").read_text())
    losses = [entry["loss"] for entry in curves if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert curves[-1]["images_32"] > 14
    assert {"images_32", "normals_32", "images_64", "latent_std"} <= set(curves[-1])


def test_the_loss_counts_squares_and_contrast_in_small_and_large_windows(scripts, monkeypatch):
    module, random = scripts["vae"], torch.Generator().manual_seed(0)
    made, wanted = torch.rand(2, 2, 3, 64, 64, generator=random) * 2 - 1
    weights = 1 + 8 * torch.rand(2, 1, 64, 64, generator=random)

    def worth(name):
        losses = []
        for weight in (0.0, 1.0):
            monkeypatch.setattr(module, name, weight)
            losses.append(module.distance(made, wanted, weights))
        return (losses[1] - losses[0]).item()

    def energy(picture, window):
        right, down = torch.zeros(2, 64, 64), torch.zeros(2, 64, 64)
        right[:, :, :-1] = (picture[..., 1:] - picture[..., :-1]).square().sum(1)
        down[:, :-1] = (picture[..., 1:, :] - picture[..., :-1, :]).square().sum(1)
        return ((right + down).unfold(1, window, window).unfold(2, window, window).mean((-1, -2)) + 1e-4).sqrt()

    off = {window: (energy(made, window) - energy(wanted, window)).abs() for window in (4, 32)}
    faces = weights[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))  # large windows count alike
    assert worth("CONTRAST_WEIGHT") == pytest.approx(((faces * off[4]).mean() + off[32].mean()).item(), rel=1e-4)
    assert worth("SQUARE_WEIGHT") == pytest.approx((weights * (made - wanted) ** 2).mean().item(), rel=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_the_decoder_alone_goes_on(scripts, trained, tmp_path, whole, monkeypatch):
    model = "model" if whole else "model/vae"
    shutil.copytree(trained / model, tmp_path / model)
    drawn, draw = [], scripts["generated"].GeneratedLatents.draw

    def seen(self, step, count):
        made = draw(self, step, count)
        drawn.append([tuple(tensor.shape) for tensor in made])
        return made

    monkeypatch.setattr("generated.GeneratedLatents.draw", seen)
    before = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    train(scripts["vae"], tmp_path, "--steps", 3, "--decoder-only")
    after = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    assert after.config == before.config  # the latents are scaled as those that a U-Net was trained on
    now = after.state_dict()
    changed = [key for key, value in before.state_dict().items() if not torch.equal(value, now[key])]
    assert changed and all(key.startswith(("decoder.", "post_quant_conv.")) for key in changed)
    shapes = [(2, 8, 32, 32), (2, 3, 64, 64), (2, 1, 64, 64)]  # a quarter of the batch, in the steps 0 and 2
    assert drawn == [shapes] * 2 * whole


def test_the_decoder_learns_from_what_the_model_generates(scripts, trained):
    module, data, device = scripts["generated"], scripts["data"], torch.device("cpu")
    pool = module.GeneratedLatents(trained / "model", device, seed=5)
    assert len(pool.pool) == 2 and pool.size == 64
    latents, images, weights = pool.pool[0]
    random = data.generator(5 + 3, 0)
    head, w2c = data.draw_heads(1, random, device), data.view_cameras(1, 4, random)
    true = heads.render(head, w2c, 64)
    assert torch.equal(images, true.rgb[0] * 2 - 1) and weights.min() == 1
    portrait = as_portrait(heads.render(head, data.portrait_cameras(1, random), 64).rgb[0, 0])
    options = {"generator": 5, "output_type": "pt", "progress_bar": False, **module.OPTIONS}
    made = pool.pipe(portrait, Cameras(w2c[0], 30), list(true.normals[0]), **options).images
    assert torch.allclose((pool.pipe.vae.decode(latents) / 2 + 0.5).clamp(0, 1), made, atol=1e-5)
    for step in range(0, 3 * module.EVERY, module.EVERY):
        pool.draw(step, 2)
    assert len(pool.pool) == 4 and not any(torch.equal(latents, kept) for kept, *_ in pool.pool)  # the oldest went


def test_what_blurs_scores_every_part(scripts, trained):
    pipe = MultiViewDiffusionPipeline.from_pretrained(trained / "model", device="cpu")
    parts = scripts["what_blurs"].Parts(pipe, subjects(1, 32, first=100), subjects(1, 64, first=100))
    lines = {line.name: line for line in parts.lines("held out")}
    assert lines["held out: codec"].psnr > 5 and len(lines) == 14
    # Where there is hardly any noise, even this network leaves what it is given.
    clean = parts.one_step(parts.who[0], 0)
    assert (clean - parts.codec(parts.who[0])).abs().mean() < 0.05
    assert (parts.one_step(parts.who[0], 999) - parts.codec(parts.who[0])).abs().mean() > 0.05


def test_the_unet_learns(scripts, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("training.RECORD", 10)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vae").symlink_to(trained / "model" / "vae")
    train(scripts["unet"], tmp_path, "--steps", 40)
    curves = json.loads((tmp_path / "unet.json").read_text())
    losses = [entry["loss"] for entry in curves if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    assert {"own", "own_face", "fitted", "copy"} <= set(curves[-1])
    before = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    train(scripts["unet"], tmp_path, "--steps", 50)  # goes on, as `gafext train` does
    resumed = json.loads((tmp_path / "unet.json").read_text())
    assert [entry["step"] for entry in resumed if "loss" in entry] == [10, 20, 30, 40, 50]
    assert resumed[:4] == curves[:4] and [entry["step"] for entry in resumed if "own" in entry] == [40, 50]
    after = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_stages_make_a_checkpoint_folder(trained):
    pipe = MultiViewDiffusionPipeline.from_pretrained(trained / "model", device="cpu")
    assert pipe.guidance_scale == 1.5 and pipe.upsampler is not None
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    portrait = subjects(1, 64)[0].portrait
    output = pipe(portrait, num_views=2, num_inference_steps=2, generator=0, progress_bar=False)
    assert [image.size for image in output.images] == [(64, 64)] * 2
    files = list((trained / "model").rglob("*.safetensors"))
    assert len(files) == 7 and pipe.head_detector is not None and pipe.head_fitter is not None
    assert {t.dtype for path in files for t in load_file(path).values()} == {torch.float16}


def test_latents_are_normalised_by_what_was_measured(trained):
    pipe = MultiViewDiffusionPipeline.from_pretrained(trained / "model", device="cpu")
    cameras = orbit(1)
    pictures = heads.render(heads.make_heads(heads.TEST_IDENTITIES[:32]), cameras.w2c, 32).rgb[:, 0]
    latents = pipe.encode(pictures)
    assert latents.mean().abs() < 0.2 and 0.7 < latents.std() < 1.3
