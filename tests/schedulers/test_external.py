"""Schedulers of diffusers behind our interface, against the same schedulers stepped by hand."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from helpers import fake_model, max_abs_diff, noise_maker

from gafext.config import SD_SCHEDULE
from gafext.noise import view_generators
from gafext.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    as_scheduler,
)
from gafext.schedulers.callbacks import StepCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' use of NumPy

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = {
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "DPM++ SDE": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M Karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "LCM": (diffusers.LCMScheduler, {}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "DDPM": (diffusers.DDPMScheduler, {}),
    "DDIM": (diffusers.DDIMScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "KDPM2 ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "DEIS": (diffusers.DEISMultistepScheduler, {}),
    "TCD": (diffusers.TCDScheduler, {}),
}
STOCHASTIC = ("DPM++ SDE", "LCM", "Euler ancestral", "DDPM", "KDPM2 ancestral", "TCD")
VIEWS = 2  # of the samples that `noise_maker` makes


def make(kind, **changes):
    cls, settings = KINDS[kind]
    return cls(**{**SD, **settings, **changes})


def generators(seed=5):
    return view_generators(seed, portraits=1, views=VIEWS)


def by_hand(kind, *, steps, begin=0, eta=0.0):
    """Every sample of a run, as diffusers' image-to-image pipelines step."""
    scheduler, draw, samples = make(kind), noise_maker(0), []
    scheduler.set_timesteps(steps)
    start, noise = draw().clamp(-1, 1), draw()
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    sample = noise * scheduler.init_noise_sigma
    if begin:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        sample = scheduler.add_noise(start, noise, timesteps[:1].repeat(VIEWS))
    options = {"generator": generators()} if kind in STOCHASTIC or eta else {}
    options |= {"eta": eta} if kind in ("DDIM", "TCD") else {}  # as diffusers' pipelines pass it
    for t in timesteps:
        output = fake_model(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, **options, return_dict=False)[0]
        samples.append(sample)
    return samples


def ours(scheduler, *, steps, begin=0, eta=0.0):
    solver, draw, samples = as_scheduler(scheduler), noise_maker(0), []
    solver.set_timesteps(steps)
    solver.set_begin_index(begin * solver.order)
    start, noise = draw().clamp(-1, 1), draw()
    timesteps, rows = solver.timesteps[begin * solver.order :], generators()
    sample = solver.add_noise(start, noise, timesteps[:1].expand(VIEWS)) if begin else noise * solver.init_noise_sigma
    for t in timesteps.tolist():
        output = fake_model(solver.scale_model_input(sample, t), t)
        sample = solver.step(output, t, sample, eta=eta, generator=rows)
        samples.append(sample)
    return samples


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_schedulers_own(kind, begin):
    expected = by_hand(kind, steps=7, begin=begin)
    scheduler = make(kind)
    first, again = (ours(scheduler, steps=7, begin=begin) for _ in range(2))
    assert len(first) == len(expected) >= 7 - begin
    for mine, theirs in zip(first, expected, strict=True):
        assert max_abs_diff(mine, theirs) <= 1e-6 * theirs.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # no state is left of the first run


def test_eta_reaches_those_that_have_it():
    expected, plain = by_hand("DDIM", steps=5, eta=1.0)[-1], by_hand("DDIM", steps=5)[-1]
    assert max_abs_diff(ours(make("DDIM"), steps=5, eta=1.0)[-1], expected) < 1e-5
    assert max_abs_diff(expected, plain) > 1e-2
    assert torch.equal(ours(make("UniPC"), steps=5, eta=1.0)[-1], ours(make("UniPC"), steps=5)[-1])


def test_noise_of_a_view_does_not_depend_on_the_number_of_views():
    few, many = (view_generators(7, portraits=2, views=views) for views in (2, 3))
    few, many = ([torch.randn(4, generator=each) for each in made] for made in (few, many))
    assert all(torch.equal(few[a], many[b]) for a, b in ((0, 0), (1, 1), (2, 3), (3, 4)))
    assert not torch.equal(few[0], few[2]) and not torch.equal(few[0], few[1])
    alone = [torch.randn(4, generator=each) for each in view_generators((3, 7), portraits=2, views=2)]
    assert torch.equal(alone[2], few[0]) and torch.equal(alone[3], few[1])


def test_a_run_from_its_beginning_adds_noise_at_any_timestep():
    """diffusers' own `set_begin_index` would fix the level to that of the first."""
    solver = as_scheduler(make("UniPC"))
    solver.set_timesteps(5)
    solver.set_begin_index(0)
    clean, noise, t = torch.zeros(VIEWS, 4), torch.ones(VIEWS, 4), solver.timesteps[3]
    level = (1 - solver.scheduler.alphas_cumprod[t]).sqrt()
    assert max_abs_diff(solver.add_noise(clean, noise, t), level.expand(VIEWS, 4)) < 1e-5


def test_our_configurations_make_diffusers_schedulers_and_the_other_way_round():
    config = DDIMScheduler(SD_SCHEDULE).config
    theirs = diffusers.UniPCMultistepScheduler.from_config(config)
    assert theirs.config.beta_end == 0.012 and theirs.config.steps_offset == 1
    back = DPMSolverMultistepScheduler.from_config(theirs.config)
    assert back.config.beta_schedule == "scaled_linear" and back.config.steps_offset == 1


def test_what_is_no_diffusion_scheduler_is_refused():
    with pytest.raises(ValueError, match="scheduler: expected one of .*FlowMatchEuler.* without .*scale_model_input"):
        as_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="got str without config"):
        as_scheduler("unipc")
    with pytest.raises(ValueError, match="num_inference_steps: expected a whole number from 1 to 1000, got 0"):
        as_scheduler(make("UniPC")).set_timesteps(0)


@pytest.mark.parametrize("kind", ["UniPC", "Euler", "Heun", "DPM++ SDE"])
def test_noise_levels_that_are_infinite_are_refused(kind):
    betas = [0.01] * 999 + [1.0]
    with pytest.raises(ValueError, match="scheduler: expected finite noise levels, .* use gafext's 'dpm\\+\\+'"):
        as_scheduler(make(kind, trained_betas=betas)).set_timesteps(5)
    as_scheduler(make("DDIM", trained_betas=betas, prediction_type="v_prediction")).set_timesteps(5)


# The clean prediction.


PREDICTIONS = [
    (kind, prediction_type)
    for kind in ("DDIM", "Euler", "Euler ancestral", "DDPM")
    for prediction_type in ("epsilon", "v_prediction", "sample")
    if (kind, prediction_type) != ("Euler ancestral", "sample")  # diffusers has no such step
]


@pytest.mark.parametrize(("kind", "prediction_type"), PREDICTIONS)
def test_the_clean_prediction_is_that_of_diffusers(kind, prediction_type):
    """Of diffusers' scheduler behind our interface, and of ours where there is one of the same name."""
    settings = {"clip_sample": False} if kind in ("DDIM", "DDPM") else {}
    theirs = make(kind, prediction_type=prediction_type, **settings)
    solvers = [as_scheduler(make(kind, prediction_type=prediction_type, **settings))]
    if kind in ("DDIM", "Euler"):
        solvers.append({"DDIM": DDIMScheduler, "Euler": EulerDiscreteScheduler}[kind].from_config(theirs.config))
    for solver in (theirs, *solvers):
        solver.set_timesteps(4)
    sample = noise_maker(1)() * theirs.init_noise_sigma
    for t in theirs.timesteps:
        output = fake_model(theirs.scale_model_input(sample, t), t)
        made = []
        for solver in solvers:
            solver.scale_model_input(sample, t.item())
            clean = solver.pred_original_sample(output, t.item(), sample)
            assert max_abs_diff(solver.model_output_for(clean, t.item(), sample), output) < 1e-2
            solver.step(output, t.item(), sample, generator=generators())
            made.append(clean)
        result = theirs.step(output, t, sample, generator=generators())
        for clean in made:
            expected = result.pred_original_sample
            assert max_abs_diff(clean, expected) < 1e-4 * max(1, expected.abs().max().item())
        sample = result.prev_sample


def test_a_clipped_prediction_is_clipped():
    solver = DDIMScheduler.from_config({**SD, "clip_sample": True, "_class_name": "DDIMScheduler"})
    solver.set_timesteps(3)
    sample = 3 * noise_maker(0)()
    clean = solver.pred_original_sample(torch.zeros_like(sample), 667, sample)
    assert clean.abs().max() == 1


SOLVERS = {
    "ours, DDIM": lambda: DDIMScheduler(SD_SCHEDULE),
    "ours, DPM++": lambda: DPMSolverMultistepScheduler.from_config(SD_SCHEDULE),
    **{
        kind: (lambda kind=kind: as_scheduler(make(kind))) for kind in ("UniPC", "DPM++ SDE", "Euler ancestral", "DEIS")
    },
}


def walk(solver, callback=None, names=("latents",)):
    """The result of a run with a callback."""
    solver.set_timesteps(5)
    rows, stepped = generators(), StepCallback(callback, names)
    sample = noise_maker(3)() * solver.init_noise_sigma
    for index, t in enumerate(solver.timesteps.tolist()):
        output = fake_model(solver.scale_model_input(sample, t), t)
        sample = stepped.step(None, solver, index, output, t, sample, eta=0.0, noise=None, generator=rows)
    return sample


BOTH = ("latents", "pred_original_sample")


@pytest.mark.parametrize("kind", [*SOLVERS, "PNDM with Runge-Kutta"])
def test_a_callback_that_returns_what_it_got_changes_nothing(kind):
    solvers = {**SOLVERS, "PNDM with Runge-Kutta": lambda: as_scheduler(make("PNDM", skip_prk_steps=False))}
    make_solver, scale = solvers[kind], 1e-4
    plain = walk(make_solver())
    assert torch.equal(walk(make_solver(), lambda p, i, t, tensors: tensors, BOTH), plain)

    def nearly(p, i, t, tensors):  # differs, so that every step is taken again
        return {"pred_original_sample": tensors["pred_original_sample"] * (1 + 1e-7)}

    assert max_abs_diff(walk(make_solver(), nearly, BOTH), plain) < scale * max(1, plain.abs().max().item())


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_returned_clean_prediction_is_where_the_run_ends(kind):
    """With the same prediction at every step, all solvers end at it; the dict may be the one that was passed."""
    target = noise_maker(9)().clamp(-1, 1)

    def replace(p, i, t, tensors):
        assert set(tensors) == set(BOTH)
        tensors["pred_original_sample"] = target
        return tensors

    end = walk(SOLVERS[kind](), replace, BOTH)
    limit = 0.05 if kind in ("ours, DDIM",) else 0.02  # DDIM ends above zero noise
    assert (end - target).abs().mean() < limit
    assert (walk(SOLVERS[kind]()) - target).abs().mean() > 0.2


def test_a_step_taken_again_is_the_step_of_the_returned_prediction():
    """One step of DDIM by its formula, and returned latents win over it."""
    solver = DDIMScheduler(SD_SCHEDULE)
    solver.set_timesteps(5)
    sample, output, clean = (draw() for draw in [noise_maker(2)] * 3)
    t = solver.timesteps[1].item()
    alpha, before = solver.alphas_cumprod[t], solver.alphas_cumprod[t - 200]
    epsilon = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    expected = before.sqrt() * clean + (1 - before).sqrt() * epsilon

    def step(returned):
        callback = StepCallback(lambda *_: returned, BOTH)
        return callback.step(None, solver, 0, output, t, sample, eta=0.0, noise=None, generator=[])

    assert max_abs_diff(step({"pred_original_sample": clean}), expected) < 1e-5
    assert max_abs_diff(step(None), expected) > 1e-2
    zeros = torch.zeros_like(sample, dtype=torch.float64)
    assert torch.equal(step({"pred_original_sample": clean, "latents": zeros}), zeros.float())


def test_tensor_inputs_are_checked_and_may_come_from_the_callback():
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs: expected .*got \['prompt_embeds'\]"):
        StepCallback(print, ["prompt_embeds"])
    callback = SimpleNamespace(tensor_inputs=["pred_original_sample"])
    assert StepCallback(callback).names == ("pred_original_sample",)
