"""Calls as users of diffusers write them: every argument and verb does what it does there."""

import inspect
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers import assert_equal_weights, max_abs_diff
from PIL import Image
from small_checkpoints import SIZE, multi_view_unet, portrait, run, save_checkpoint, save_ip_adapter, save_lora

from gafext import MultiViewDiffusionPipeline, cameras
from gafext.conditions import rows_together
from gafext.errors import CheckpointError, CheckpointNotFoundError, ImageError
from gafext.heads import head_normals
from gafext.noise import view_generators

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' use of NumPy
    pytest.mark.filterwarnings("ignore:.*does not look at the portrait"),
]
LATENT = {"upsample": "none", "output_type": "latent"}


def load(folder, **options):
    return MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu", **options)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "torch.float32"])
def test_a_dtype_by_its_name(checkpoint, name, recwarn):
    assert load(checkpoint, dtype=name).dtype == getattr(torch, name.removeprefix("torch."))
    assert not recwarn.list
    with pytest.warns(FutureWarning, match="torch_dtype is an older name: use dtype") as caught:
        assert load(checkpoint, torch_dtype=name).dtype == getattr(torch, name.removeprefix("torch."))
    assert len(caught) == 1


def test_dtypes_that_are_refused(checkpoint):
    for wrong in (torch.int32, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ValueError, match="dtype: expected"):
            load(checkpoint, dtype=wrong)
    with pytest.raises(ValueError, match="device gpu: not usable here"):
        MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="gpu")
    with pytest.raises(ValueError, match="torch_dtype: expected None beside dtype"):
        load(checkpoint, dtype="float16", torch_dtype=torch.float16)
    for wrong in ("half", "float8", 16):
        with pytest.raises(ValueError, match=r"dtype: expected .*one of \['float32', .*, 'int8', 'int8-bfloat16'\]"):
            load(checkpoint, dtype=wrong)


def test_a_list_of_generators_is_one_per_portrait(pipe):
    generators = [torch.Generator().manual_seed(3), 8]
    both = run(pipe, [portrait(0), portrait(1)], generator=generators, eta=1.0)
    for index, seed in enumerate((3, 8)):
        alone = run(pipe, portrait(index), generator=seed, eta=1.0)
        assert max_abs_diff(both[index].images, alone.images) < 1e-5
        assert both[index].run["seed"] == seed and both[index].run["portrait_index"] == index
    assert torch.equal(run(pipe, generator=[3]).images, run(pipe, generator=3).images)
    for wrong, words in (
        ([1, 2, 3], "expected 2, one per portrait, got a list of 3"),
        ([1, -1], "generator: expected a"),
    ):
        with pytest.raises(ValueError, match=words):
            run(pipe, [portrait(0), portrait(1)], generator=wrong)


def test_several_results_per_portrait(pipe):
    twice = run(pipe, [portrait(0), portrait(1)], num_images_per_prompt=2)
    assert [(one.run["portrait_index"], one.run["image_index"]) for one in twice] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    copies = run(pipe, [portrait(0), portrait(0), portrait(1), portrait(1)])
    assert all(torch.equal(a.images, b.images) for a, b in zip(twice, copies, strict=True))
    assert max_abs_diff(twice[0].images, twice[1].images) > 1e-3
    alone = run(pipe, portrait(0), num_images_per_prompt=2, generator=[4, 5])
    assert max_abs_diff(alone[1].images, run(pipe, portrait(0), generator=5).images) < 1e-5
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_images_per_prompt: expected a whole number above 0"):
            run(pipe, num_images_per_prompt=wrong)


def test_return_dict_false_gives_a_tuple(pipe):
    (images,) = run(pipe, return_dict=False)
    assert torch.equal(images, run(pipe).images)
    (images,) = run(pipe, [portrait(0), portrait(1)], return_dict=False)
    assert len(images) == 2 and torch.equal(images[0], run(pipe, [portrait(0), portrait(1)])[0].images)


def test_the_progress_bar_is_configured_for_all_runs(pipe, capsys):
    run(pipe, progress_bar=True)
    assert "4 views" in capsys.readouterr().err
    pipe.set_progress_bar_config(desc="heads")
    run(pipe, progress_bar=True)
    assert "heads" in capsys.readouterr().err
    run(pipe, progress_bar=False)
    pipe.set_progress_bar_config(disable=True)
    run(pipe, progress_bar=True)
    assert not capsys.readouterr().err


# Schedulers of diffusers.

SCHEDULERS = {
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "DPM++ SDE": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "LCM": (diffusers.LCMScheduler, {}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
}


@torch.no_grad()
def denoised_by_hand(pipe, scheduler, latents, *, renders=None, begin=0):
    """The loop of diffusers' pipelines around our U-Net, without guidance; seed 0."""
    orbit = cameras.orbit(4)
    normals = pipe.encode(head_normals(orbit, 4 * SIZE))
    tokens = pipe.encode_portraits([portrait()]).conditional
    scheduler.set_timesteps(6)
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    sample = latents * scheduler.init_noise_sigma
    if renders is not None:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        sample = scheduler.add_noise(pipe.encode(renders), latents, timesteps[:1].repeat(4))
    options = {"generator": view_generators(0, portraits=1, views=4)}
    options = options if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in timesteps:
        scaled = torch.cat([scheduler.scale_model_input(sample, t), normals], dim=1)
        output = pipe.unet(scaled, t, pose=orbit.pose(12), image_embeds=tokens, num_views=4)
        sample = scheduler.step(output, t, sample, **options).prev_sample
    return sample


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_of_diffusers_steps(pipe, name):
    """Made from the configuration of ours, as in diffusers' documentation; from noise and from renders."""
    kind, settings = SCHEDULERS[name]
    latents = torch.randn(4, 4, SIZE, SIZE)
    by_hand = kind.from_config(pipe.scheduler.config, **settings)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    assert isinstance(pipe.scheduler, kind)
    options = {"latents": latents, "num_inference_steps": 6, "guidance_scale": 1.0, **LATENT}
    ours = run(pipe, **options)
    expected = denoised_by_hand(pipe, by_hand, latents)
    assert max_abs_diff(ours.images, expected) < 1e-4 * max(1.0, expected.abs().max().item())
    assert ours.run["scheduler"]["beta_schedule"] == "scaled_linear"

    renders = (torch.rand(4, 3, 32, 32) * 255).round() / 255
    ours = run(pipe, renders=renders, strength=0.5, **options).images
    expected = denoised_by_hand(pipe, by_hand, latents, renders=renders, begin=3)
    assert max_abs_diff(ours, expected) < 1e-4 * max(1.0, expected.abs().max().item())


def test_a_scheduler_of_diffusers_is_an_argument_of_from_pretrained(checkpoint):
    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear")
    pipe = load(checkpoint, scheduler=scheduler)
    assert pipe.scheduler is scheduler and pipe.components["scheduler"] is scheduler
    assert run(pipe).run["scheduler"]["original_inference_steps"] == 50


def test_a_scheduler_that_cannot_step_is_refused_at_once(pipe):
    before = pipe.scheduler
    with pytest.raises(ValueError, match="scheduler: expected one of gafext's, or of diffusers'"):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert pipe.scheduler is before


def test_a_pipeline_with_a_scheduler_of_diffusers_is_saved(pipe, tmp_path):
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    saved = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "scheduler")
    assert saved.config.steps_offset == pipe.scheduler.config.steps_offset == 1
    run(load(tmp_path))  # over the same noise schedule, with a solver of ours


# Callbacks.


@pytest.mark.parametrize("scheduler", ["ours", "UniPC"])
def test_callbacks_see_the_clean_prediction_and_replace_it(pipe, scheduler):
    """As for splats that are refitted at every step: decode, refit, encode, go on from there."""
    if scheduler == "UniPC":
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    inputs, seen = ["latents", "pred_original_sample"], []

    def note(pipe, step, timestep, tensors):
        seen.append((step, timestep, tensors))
        return tensors

    options = {"num_inference_steps": 4, **LATENT}
    plain = run(pipe, **options).images
    noted = run(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=inputs, **options).images
    assert torch.equal(noted, plain)
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and all(set(tensors) == set(inputs) for *_, tensors in seen)
    pictures = pipe.decode(seen[-1][2]["pred_original_sample"])
    assert pictures.shape == (4, 3, 32, 32)

    refitted = pipe.encode(torch.full((4, 3, 32, 32), 0.5))

    def refit(pipe, step, timestep, tensors):
        return {"pred_original_sample": refitted}

    ends = run(pipe, callback_on_step_end=refit, callback_on_step_end_tensor_inputs=inputs[1:], **options).images
    assert (ends - refitted).abs().mean() < 0.1 * (plain - refitted).abs().mean()
    with pytest.raises(ValueError, match="expected pred_original_sample of shape"):
        run(pipe, callback_on_step_end=lambda *_: {"pred_original_sample": refitted[:1]}, **options)


def test_tensors_that_a_callback_cannot_have(pipe):
    with pytest.raises(
        ValueError, match=r"callback_on_step_end_tensor_inputs: .*\['latents', 'pred_original_sample'\]"
    ):
        run(pipe, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["prompt_embeds"])


# Adapters.


@pytest.fixture
def stock(tmp_path):
    save_checkpoint(tmp_path / "model", multi_view=False)
    return load(tmp_path / "model")


def test_a_lora_of_an_ip_adapter_that_is_replaced(stock, tmp_path):
    adapters = [save_ip_adapter(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    stock.load_ip_adapter(adapters[1])
    expected = {name: x.clone() for name, x in stock.unet.state_dict().items()}
    stock.load_ip_adapter(adapters[0])
    stock._before_lora = {name: x.clone() for name, x in stock.unet.state_dict().items() if "_ip." in name}
    stock.load_ip_adapter(adapters[1])
    stock.unload_lora_weights()
    assert_equal_weights(stock.unet, expected)


def test_unloading_a_lora_gives_the_weights_back_bit_for_bit(stock, tmp_path):
    before = {name: value.clone() for name, value in stock.unet.state_dict().items()}
    expected, origin = run(stock).images, dict(stock.origin)
    stock.unload_lora_weights()  # nothing to unload
    save_lora(tmp_path / "a.safetensors")
    save_lora(tmp_path / "b.safetensors")
    stock.load_lora_weights(tmp_path / "a.safetensors", scale=3.0)
    stock.load_lora_weights(tmp_path, weight_name="b.safetensors", scale=0.1)
    output = run(stock)
    assert max_abs_diff(output.images, expected) > 1e-4
    merged = [("a.safetensors", 3.0), ("b.safetensors", 0.1)]
    assert output.run["lora"] == [{"file": str(tmp_path / name), "scale": scale} for name, scale in merged]
    stock.unload_lora_weights()
    assert_equal_weights(stock.unet, before)
    assert torch.equal(run(stock).images, expected) and stock.origin == origin


def test_the_scale_of_an_ip_adapter_and_unloading_it(stock, tmp_path):
    expected, origin, config = run(stock).images, dict(stock.origin), stock.unet.config
    (tmp_path / "models").mkdir()
    adapter = save_ip_adapter(tmp_path / "models" / "adapter.safetensors")
    with pytest.raises(ValueError, match="set_ip_adapter_scale: expected a U-Net with an IP-Adapter"):
        stock.set_ip_adapter_scale(0.5)
    with pytest.raises(ValueError, match="unload_ip_adapter: expected an IP-Adapter from load_ip_adapter"):
        stock.unload_ip_adapter()
    stock.load_ip_adapter(tmp_path, subfolder="models", weight_name="adapter.safetensors")
    full = run(stock).images
    stock.set_ip_adapter_scale(0.3)
    again = load(tmp_path / "model", ip_adapter=adapter, ip_adapter_scale=0.3)
    ours, theirs = run(stock), run(again)
    assert torch.equal(ours.images, theirs.images) and ours.run == theirs.run
    assert max_abs_diff(ours.images, full) > 1e-5
    stock.set_ip_adapter_scale(0)
    assert max_abs_diff(run(stock, guidance_scale=1.0).images, expected) < 1e-5
    for wrong in (float("nan"), [0.5], {"down": 1}):
        with pytest.raises(ValueError, match="scale: expected a finite number"):
            stock.set_ip_adapter_scale(wrong)
    stock.unload_ip_adapter()
    assert stock.unet.config == config and stock.origin == origin
    assert torch.equal(run(stock).images, expected)
    stock.load_ip_adapter(adapter)
    assert torch.equal(run(stock).images, full)


def test_an_adapter_that_is_nowhere(stock, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # its variable is read at import
    with pytest.raises(CheckpointNotFoundError, match=r"none.safetensors: no such file"):
        stock.load_lora_weights(tmp_path, weight_name="none.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"models/a.safetensors: no such file, and the hub says"):
        stock.load_ip_adapter("nobody/nothing", subfolder="models", weight_name="a.safetensors")
    with pytest.raises(ValueError, match="weight_name: expected the name of the file in"):
        stock.load_ip_adapter(tmp_path, subfolder="models")
    save_lora(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"got a folder; pass weight_name=, of: pytorch_lora_weights.safetensors"):
        stock.load_lora_weights(tmp_path)
    with pytest.raises(CheckpointError, match="or weight_name= beside a folder or hub id, got neither"):
        stock.load_lora_weights("owner/lcm-lora")


def test_pefts_settings_come_from_the_hub_with_its_weights(stock, monkeypatch, tmp_path):
    def download(repository, name):
        asked.append(name)
        if not (tmp_path / name).is_file():
            raise FileNotFoundError(name)
        return str(tmp_path / name)

    asked = []
    save_lora(tmp_path / "adapter_model.safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    for settings in (False, True):
        if settings:
            (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16, "r": 8}')
        stock.load_lora_weights("owner/name", weight_name="adapter_model.safetensors")
        stock.unload_lora_weights()
    assert asked == ["adapter_config.json", "adapter_model.safetensors"] * 2


# Memory of the autoencoder; offloading is in tests/models/test_offload.py.


def test_slicing_and_tiling_of_the_autoencoder(pipe):
    sizes = []
    pipe.vae.decoder.conv_out.register_forward_pre_hook(
        lambda module, args: sizes.append((args[0].shape[0], args[0].shape[-1]))
    )
    whole = run(pipe).images
    width = whole.shape[-1]
    assert sizes == [(1, width)] * 4
    pipe.disable_vae_slicing()
    sizes.clear()
    assert max_abs_diff(run(pipe).images, whole) < 1e-5
    assert sizes == [(4, width)]
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling(32)
    sizes.clear()
    tiles = run(pipe).images
    assert sizes == [(1, width // 2)] * 4 * (9 + 1)  # 9 tiles, and a reduced copy whose statistics they share
    assert tiles.shape == whole.shape and 1e-4 < (tiles - whole).abs().mean() < 0.2
    pipe.disable_vae_tiling()
    assert torch.equal(run(pipe).images, whole)


# Portraits.


def cut_out(image):
    """Stands for rembg: everything in the left half is background."""
    image = image.convert("RGBA")
    image.paste((0, 255, 0, 0), (0, 0, image.width // 2, image.height))
    return image


def plain(image, colour):
    """What `cut_out` leaves, on a colour."""
    image = image.copy()
    image.paste(colour, (0, 0, image.width // 2, image.height))
    return image


def test_a_busy_background_warns_and_matte_removes_it(pipe, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64), 0)
    with pytest.warns(UserWarning, match=r"image\[1\]: the background is not plain.* matte=True \(--matte\)") as caught:
        run(pipe, [Image.new("RGB", (64, 64), "navy"), noise])
    assert len(caught) == 1
    with pytest.raises(ImageError, match=r"pip install gafext\[matte\]"):
        monkeypatch.setitem(sys.modules, "rembg", None)
        run(pipe, noise, matte=True)
    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=cut_out))
    ours = run(pipe, noise, matte=True).images
    assert torch.equal(ours, run(pipe, plain(noise, "white")).images)
    assert max_abs_diff(ours, run(pipe, noise).images) > 1e-4


def test_transparency_is_composited_on_the_familys_background(pipe):
    """White for GAF's, and the mean of the greys that ImageDream was trained on."""
    unet = multi_view_unet(cross_view="dense", in_channels=4, projection_class_embeddings_input_dim=16)
    dense = MultiViewDiffusionPipeline(**{**pipe.components, "unet": unet})
    image = portrait(size=(32, 32))
    for each, colour, other in ((pipe, "white", "gray"), (dense, (127, 127, 127), "white")):
        ours = run(each, cut_out(image)).images
        assert torch.equal(ours, run(each, plain(image, colour)).images)
        assert not torch.equal(ours, run(each, plain(image, other)).images)


def test_views_that_are_encoded_together_equal_those_that_are_not(pipe):
    views = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = pipe.encode(views)
    assert max_abs_diff(pipe.encode(views, together=4), alone) < 1e-5 * max(1, alone.abs().max())
    assert max_abs_diff(pipe.encode(views.flip(0), together=3), alone.flip(0)) < 1e-5 * max(1, alone.abs().max())


def test_as_many_views_are_computed_together_as_fit_and_divide_them():
    assert [rows_together(6, 10, most=most) for most in (5, 10, 29, 30, 55, 60, 1000)] == [1, 1, 2, 3, 3, 6, 6]
