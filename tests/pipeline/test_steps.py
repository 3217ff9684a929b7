"""The pipeline's verbs by themselves, its components, and adapters that are loaded into it."""

import itertools

import diffusers
import pytest
import torch
from helpers import UNET_WEIGHTS, assert_equal_weights, edit_weights
from safetensors.torch import load_file
from small_checkpoints import SIZE, portrait, run, save_checkpoint, save_ip_adapter, save_lora

from gafext import MultiViewDiffusionPipeline, schedulers
from gafext.errors import CheckpointError
from gafext.schedulers import SCHEDULERS

CASES = {
    "one portrait": {},
    "a list of portraits": {"image": [portrait(0), portrait(1)], "num_views": 2},
    "renders": {"renders": torch.rand(4, 3, 32, 32), "strength": 0.5, "num_inference_steps": 4},
    "eta": {"eta": 1.0, "num_inference_steps": 3},
    "guidance and latents": {"guidance_scale": 2.0, "latents": torch.randn(4, 4, SIZE, SIZE), "upsample": "none"},
}


def arguments(case):
    return {"image": portrait(), "num_inference_steps": 2, "generator": 3, "output_type": "pt", **CASES[case]}


@pytest.mark.parametrize("case", CASES)
def test_the_verbs_by_themselves_give_the_calls_views_bit_for_bit(pipe, case):
    expected = pipe(**arguments(case), progress_bar=False)
    made = pipe.prepare(**arguments(case))
    results = [pipe.finish(made, pipe.denoise(made))]
    *_, (timestep, latents) = pipe.steps(made)
    assert timestep == made.timesteps[-1]
    results.append(pipe.finish(made, latents))
    for result in results:
        assert isinstance(result, list) == isinstance(expected, list) == (case == "a list of portraits")
        pairs = zip(result, expected, strict=True) if isinstance(expected, list) else [(result, expected)]
        for ours, theirs in pairs:
            assert torch.equal(ours.images, theirs.images) and ours.run == theirs.run


def test_a_run_says_what_was_prepared(pipe):
    made = pipe.prepare([portrait(0), portrait(1)], num_views=3, num_inference_steps=2, generator=5, eta=0.5)
    assert (made.num_portraits, made.num_views, made.seed, made.eta) == (2, 3, 5, 0.5)
    assert made.latents.shape == (6, 4, SIZE, SIZE) and len(made.timesteps) == 2 and made.is_batch
    before = made.latents.clone()
    assert len(list(pipe.steps(made))) == 2
    assert torch.equal(made.latents, before)


def test_latents_may_be_changed_between_the_steps(pipe):
    made = pipe.prepare(portrait(), num_inference_steps=2, generator=0, output_type="latent", upsample="none")
    for _, latents in pipe.steps(made):
        latents.zero_()
    assert not pipe.finish(made, latents).images.any()
    _, stopped = next(pipe.steps(made))
    seen = []
    pipe.denoise(made, callback_on_step_end=lambda pipe, step, t, kwargs: seen.append(kwargs["latents"].clone()))
    assert len(seen) == 2 and torch.equal(stopped, seen[0])


@pytest.mark.parametrize(
    "scheduler",
    [*(kind.__name__ for kind in SCHEDULERS.values()), "diffusers"],
)
def test_two_runs_step_in_turns(pipe, scheduler):
    """Of different lengths, with solvers that remember their last step."""
    if scheduler == "diffusers":
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    else:
        pipe.scheduler = getattr(schedulers, scheduler).from_config(pipe.scheduler.config)
    runs = [
        pipe.prepare(portrait(seed), num_views=2, num_inference_steps=count, generator=seed, upsample="none")
        for seed, count in ((0, 4), (1, 3))
    ]
    alone = [[latents.clone() for _, latents in pipe.steps(each)] for each in runs]
    for steps in itertools.zip_longest(*(pipe.steps(each) for each in runs)):
        for step, expected in zip(steps, alone, strict=True):
            assert step is None or torch.equal(step[1], expected.pop(0))
    assert not any(alone)


def test_components_rebuild_an_equal_pipeline(pipe):
    pipe.guidance_scale, pipe.prompt_embeds = 3.5, torch.randn(1, 3, 40)
    again = MultiViewDiffusionPipeline(**pipe.components)
    assert again.components.keys() == pipe.components.keys()
    assert all(again.components[name] is part for name, part in pipe.components.items())
    assert torch.equal(run(again).images, run(pipe).images)


@pytest.fixture
def stock(tmp_path):
    """A checkpoint whose U-Net does not look at the portrait."""
    return save_checkpoint(tmp_path, multi_view=False)


def load(folder, **options):
    return MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu", **options)


@pytest.mark.filterwarnings("ignore:.*does not look at the portrait")
def test_adapters_loaded_later_equal_those_of_from_pretrained(stock, tmp_path):
    lora, adapter = save_lora(tmp_path / "lora.safetensors"), save_ip_adapter(tmp_path / "adapter.safetensors")
    for options in (
        {"lora": lora, "lora_scale": 0.5},
        {"ip_adapter": adapter, "ip_adapter_scale": 0.7},
        {"ip_adapter": adapter, "lora": lora},
    ):
        at_once, later = load(stock, **options), load(stock)
        if "ip_adapter" in options:
            later.load_ip_adapter(adapter, scale=options.get("ip_adapter_scale", 1.0))
        if "lora" in options:
            later.load_lora_weights(lora, scale=options.get("lora_scale", 1.0))
        assert later.unet.config == at_once.unet.config
        assert_equal_weights(later.unet, at_once.unet)
        ours, theirs = run(later), run(at_once)
        assert torch.equal(ours.images, theirs.images) and ours.run == theirs.run


MISFITS = {
    "a width that the image encoder does not have": lambda path: save_ip_adapter(path, embeds=24),
    "a missing tensor": lambda path: edit_weights(
        save_ip_adapter(path), lambda t: t.pop("ip_adapter.1.to_k_ip.weight")
    ),
    "channels of another U-Net": lambda path: save_ip_adapter(path, attentions=(32, 32, 32, 32)),
    "no adapter": save_lora,
}


@pytest.mark.filterwarnings("ignore:.*does not look at the portrait")
@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_changes_nothing(stock, tmp_path, misfit):
    MISFITS[misfit](tmp_path / "adapter.safetensors")
    pipe = load(stock)
    config, weights, origin = pipe.unet.config, load_file(stock / "unet" / UNET_WEIGHTS), dict(pipe.origin)
    expected = run(pipe)
    with pytest.raises(CheckpointError):
        pipe.load_ip_adapter(tmp_path / "adapter.safetensors")
    assert pipe.unet.config is config and pipe.unet.image_projection is None and pipe.origin == origin
    assert_equal_weights(pipe.unet, weights)
    after = run(pipe)
    assert torch.equal(after.images, expected.images) and after.run == expected.run
