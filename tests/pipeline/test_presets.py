"""Guidance in an interval of noise levels, solvers of one run, and presets."""

import math
from dataclasses import replace

import diffusers
import pytest
import torch
from helpers import max_abs_diff
from small_checkpoints import (
    SIZE,
    assert_conditional_pass_alone,
    count_rows,
    portrait,
    run,
    save_checkpoint,
    save_ip_adapter,
)

import gafext
from gafext.noise import view_generators, view_noise
from gafext.predictor import Predictor
from gafext.schedulers import DPMSolverMultistepScheduler
from gafext.schedulers.plan import PRESETS

INTERVAL = (0.5, 5.0)
LATENT = {"upsample": "none", "output_type": "latent"}
OTHERS = {
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
}


def guided_by_hand(pipe, made):
    """The loop with both passes at every step, at guidance 1 outside the interval; and the rows that it needs."""
    table = ((1 - pipe.scheduler.alphas_cumprod) / pipe.scheduler.alphas_cumprod).sqrt()
    latents, rows = made.latents, []
    made.solver.set_timesteps(made.num_inference_steps)
    made.solver.set_begin_index(len(made.solver.timesteps) - len(made.timesteps))
    views = {"portraits": made.num_portraits, "views": made.num_views}
    generators = view_generators(made.seed, **views)
    for step, t in enumerate(made.timesteps.tolist()):
        low = int(t)
        sigma = torch.lerp(table[low], table[min(low + 1, 999)], t - low).item()
        inside = INTERVAL[0] < sigma <= INTERVAL[1]
        rows.append((2 if inside else 1) * len(latents))
        both = replace(made, guidance_interval=None, guidance_scale=made.guidance_scale if inside else 1.0)
        noise = view_noise(made.seed, **views, shape=latents.shape[1:], step=step + 1)
        output = Predictor(pipe.unet, both)(latents, t)
        latents = made.solver.step(output, t, latents, eta=made.eta, noise=noise, generator=generators)
    return latents, rows


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "euler-a", "lcm", *OTHERS])
@torch.no_grad()
def test_outside_the_interval_only_the_conditional_half_runs(pipe, name):
    options = {"num_inference_steps": 6, "generator": 3, "guidance_interval": INTERVAL, "guidance_scale": 4.0, **LATENT}
    if name in OTHERS:
        pipe.scheduler = OTHERS[name].from_config(pipe.scheduler.config)
    else:
        options["scheduler"] = name
    expected, rows = guided_by_hand(pipe, pipe.prepare([portrait(0), portrait(1)], num_views=2, **options))
    assert {4, 8} == set(rows)
    seen = count_rows(pipe)
    ours = torch.cat([output.images for output in run(pipe, [portrait(0), portrait(1)], num_views=2, **options)])
    assert seen == rows
    assert max_abs_diff(ours, expected) < 1e-4 * max(1.0, expected.abs().max().item())


@torch.no_grad()
def test_the_interval_of_a_run_from_renders_and_in_steps(pipe):
    options = {"renders": torch.rand(4, 3, 32, 32), "strength": 0.5, "num_inference_steps": 8, "generator": 1}
    made = pipe.prepare(portrait(), guidance_interval=INTERVAL, **options)
    expected, rows = guided_by_hand(pipe, made)
    seen, steps = count_rows(pipe), list(pipe.steps(made))
    assert seen == rows and len(steps) == 4
    assert max_abs_diff(steps[-1][1], expected) < 1e-4


def test_an_interval_of_all_noise_levels_is_no_interval(pipe):
    expected = run(pipe)
    ours = run(pipe, guidance_interval=(0, math.inf))
    assert torch.equal(ours.images, expected.images)
    assert expected.run["guidance_interval"] is None and ours.run["guidance_interval"] == (0, math.inf)


def test_callbacks_see_every_step_of_an_interval(pipe):
    seen = []

    def note(pipe, step, timestep, kwargs):
        seen.append((step, kwargs["latents"].shape, kwargs["pred_original_sample"].shape))

    names = ["latents", "pred_original_sample"]
    options = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names, "num_inference_steps": 5}
    run(pipe, guidance_interval=INTERVAL, **options)
    assert seen == [(step, (4, 4, SIZE, SIZE), (4, 4, SIZE, SIZE)) for step in range(5)]


@pytest.mark.filterwarnings("ignore:.*does not look at the portrait")
def test_the_conditional_pass_alone(pipe, tmp_path):
    """Where the unconditional pass has no image, where it has tokens of its own, and with texts of the views."""
    assert_conditional_pass_alone(pipe)
    pipe.prompt_embeds = torch.randn(4, 3, 40)
    assert_conditional_pass_alone(pipe)
    save_checkpoint(tmp_path / "stock", multi_view=False)
    adapter = save_ip_adapter(tmp_path / "adapter.safetensors")
    other = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "stock", device="cpu", ip_adapter=adapter)
    other.prompt_embeds = torch.randn(1, 3, 40)
    assert_conditional_pass_alone(other)


@pytest.mark.parametrize("interval", [(2, 1), (1, 1), (-1, 2), (1,), (0, 1, 2), "ab", 3.0, (math.nan, 1), ("a", "b")])
def test_intervals_that_are_none(pipe, interval):
    with pytest.raises(ValueError, match=r"guidance_interval: expected noise levels \(a, b\) with 0 <= a < b, got"):
        pipe.prepare(portrait(), guidance_interval=interval)


def test_a_run_may_have_a_solver_of_its_own(pipe, checkpoint):
    own = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
    own.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    expected, before = run(own, num_inference_steps=4), pipe.scheduler
    ours = run(pipe, num_inference_steps=4, scheduler="dpm++")
    assert torch.equal(ours.images, expected.images) and ours.run == expected.run
    assert pipe.scheduler is before
    with pytest.raises(ValueError, match="scheduler: expected one of .*'euler-a', 'lcm'.*, got 'heun'"):
        run(pipe, scheduler="heun")


@pytest.mark.parametrize("name", ["euler-a", "lcm"])
def test_solvers_that_add_noise_do_so_unless_told_not_to(pipe, name):
    options = {"scheduler": name, "num_inference_steps": 3, **LATENT}
    usual, full, none = (run(pipe, **options, **eta) for eta in ({}, {"eta": 1.0}, {"eta": 0.0}))
    assert usual.run["eta"] == 1.0 and none.run["eta"] == 0.0
    assert torch.equal(usual.images, full.images) and max_abs_diff(usual.images, none.images) > 1e-2
    assert torch.equal(run(pipe, **options).images, usual.images)


def test_without_a_preset_it_is_quality(pipe):
    made, quality = pipe.prepare(portrait()), pipe.prepare(portrait(), preset="quality")
    assert made.solver is quality.solver is pipe.scheduler
    assert len(made.timesteps) == len(quality.timesteps) == 50
    assert made.guidance_interval is quality.guidance_interval is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_options(pipe, name):
    made, given = (pipe.prepare(portrait(), generator=0, **options) for options in ({"preset": name}, PRESETS[name]))
    assert torch.equal(made.timesteps, given.timesteps) and made.guidance_interval == given.guidance_interval
    assert made.solver.config == given.solver.config and made.describe(0) == given.describe(0)


def test_options_take_precedence_over_the_preset(pipe):
    options = {"num_inference_steps": 4, "scheduler": "euler", "guidance_interval": (0, math.inf)}
    made = pipe.prepare(portrait(), preset="fast", **options)
    assert len(made.timesteps) == 4 and type(made.solver).__name__ == "EulerDiscreteScheduler"
    assert made.guidance_interval == (0, math.inf)
    made = pipe.prepare(portrait(), preset="fast", num_inference_steps=4)
    assert len(made.timesteps) == 4 and made.guidance_interval == PRESETS["fast"]["guidance_interval"]
    with pytest.raises(ValueError, match=r"preset: expected one of \['quality', 'balanced', 'fast'\], got 'turbo'"):
        pipe.prepare(portrait(), preset="turbo")


@pytest.mark.parametrize("kind", [diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler])
def test_a_solver_over_the_noise_schedule_of_a_scheduler_made_by_hand(kind, pipe):
    noise = {name: pipe.scheduler.config[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    pipe.scheduler = kind(**noise, prediction_type=pipe.scheduler.config.prediction_type)
    assert "_class_name" not in pipe.scheduler.config
    for options in ({"scheduler": "dpm++", "num_inference_steps": 2}, {"preset": "fast"}):
        solver = pipe.prepare(portrait(), num_views=2, **options).solver
        assert isinstance(solver, DPMSolverMultistepScheduler) and solver.config.beta_end == noise["beta_end"]
