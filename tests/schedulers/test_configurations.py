"""Configurations that another solver's class wrote: the solvers keep of them what diffusers' classes keep."""

import diffusers
import pytest
import torch
from helpers import fake_model, max_abs_diff, noise_maker, write_scheduler

from gafext.errors import CheckpointError
from gafext.schedulers import (
    SCHEDULERS,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    Scheduler,
    scheduler_from_pretrained,
)

DPM = "DPMSolverMultistepScheduler"
EULER = "EulerDiscreteScheduler"
UNIPC = "UniPCMultistepScheduler"
SINGLE = "DPMSolverSinglestepScheduler"
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = {"dpm++": DPM, "euler": EULER, "euler-a": "EulerAncestralDiscreteScheduler"}
KARRAS = {"use_karras_sigmas": True}
ENDS = {"final_sigmas_type": "sigma_min", "lower_order_final": False}

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__:DeprecationWarning", "ignore:__array_wrap__:DeprecationWarning"
)  # of diffusers' use of NumPy


def end_of_run(solver, steps):
    """The last sample of a run; noise comes from a generator of each step's own."""
    solver.set_timesteps(steps)
    sample = noise_maker()() * solver.init_noise_sigma
    for index, t in enumerate(solver.timesteps):
        output = fake_model(solver.scale_model_input(sample, t), t)
        generator = torch.Generator().manual_seed(index)
        if isinstance(solver, Scheduler):
            noise = torch.randn(sample.shape, generator=generator)
            sample = solver.step(output, t, sample, noise=noise)
        else:
            sample = solver.step(output, t, sample, generator=generator).prev_sample
    return sample


def assert_same_run(ours, theirs, steps=10, tolerance=1e-4):
    """The timesteps, the noise levels and the end of a run are diffusers'."""
    mine, other = end_of_run(ours, steps), end_of_run(theirs, steps)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    assert mine.isfinite().all() and max_abs_diff(mine, other) < tolerance


WRITTEN = [
    ("dpm++", EULER, KARRAS),
    ("dpm++", EULER, {"final_sigmas_type": "sigma_min"}),
    ("dpm++", EULER, {"sigma_min": 0.1, "sigma_max": 5.0, "interpolation_type": "log_linear"}),
    ("dpm++", UNIPC, ENDS),
    ("dpm++", UNIPC, {**KARRAS, "solver_order": 1}),
    ("dpm++", "HeunDiscreteScheduler", KARRAS),
    ("dpm++", "KDPM2DiscreteScheduler", KARRAS),
    ("dpm++", SINGLE, {**KARRAS, **ENDS}),
    ("dpm++", "DDPMScheduler", {}),
    ("euler", DPM, {**KARRAS, **ENDS}),
    ("euler", UNIPC, {"final_sigmas_type": "sigma_min", "sigma_min": 0.1}),
    ("euler", "HeunDiscreteScheduler", KARRAS),
    ("euler-a", DPM, KARRAS),
]


@pytest.mark.parametrize(("name", "writer", "settings"), WRITTEN, ids=str)
def test_settings_that_both_have_are_kept(tmp_path, name, writer, settings):
    written = getattr(diffusers, writer)(**SD, **settings)
    written.save_pretrained(tmp_path)
    other = getattr(diffusers, NAMES[name])
    assert_same_run(scheduler_from_pretrained(tmp_path, name=name), other.from_pretrained(tmp_path))
    config = {"_class_name": writer, **written.config}  # it lists what was left at the writer's defaults
    assert_same_run(SCHEDULERS[name].from_config(config), other.from_config(config))


def test_a_file_of_deis_is_read_as_dpm_solver(tmp_path):
    """diffusers means to read its names of the algorithm so, but refuses them at the default final σ."""
    diffusers.DEISMultistepScheduler(**SD, **KARRAS).save_pretrained(tmp_path)
    ours = scheduler_from_pretrained(tmp_path, name="dpm++")
    assert_same_run(ours, diffusers.DPMSolverMultistepScheduler(**SD, **KARRAS))


def test_settings_left_at_the_writers_default_get_this_solvers():
    """Singlestep's `lower_order_final` is false: a file has it, a configuration in memory lists it as left."""
    config = {"_class_name": SINGLE, **diffusers.DPMSolverSinglestepScheduler(**SD).config}
    assert DPMSolverMultistepScheduler.from_config(config).config.lower_order_final
    assert not DPMSolverMultistepScheduler.from_config({**config, "_use_default_values": None}).config.lower_order_final


def test_the_noise_schedule_stays_the_writers_also_where_it_is_its_default():
    """diffusers would take this solver's betas, which the network was not trained with."""
    written = diffusers.LCMScheduler()
    assert torch.equal(EulerDiscreteScheduler.from_config(written.config).alphas_cumprod, written.alphas_cumprod)


@pytest.mark.parametrize(
    ("name", "writer", "settings", "message"),
    [
        ("dpm++", EULER, {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ("dpm++", UNIPC, {"solver_order": 3}, "solver_order=3: expected 1 or 2"),
        ("dpm++", SINGLE, {"solver_type": "heun"}, "solver_type='heun'"),
        ("dpm++", "DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("dpm++", EULER, {**KARRAS, "sigma_min": 0.1}, r"sigma_min=0\.1"),  # diffusers' hidden setting has an effect
        ("euler", "HeunDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        ("euler", UNIPC, {**KARRAS, "sigma_max": 5.0}, r"sigma_max=5\.0"),
    ],
)
def test_kept_settings_that_are_not_supported_are_refused(tmp_path, name, writer, settings, message):
    with pytest.raises(CheckpointError, match=message):
        scheduler_from_pretrained(write_scheduler(tmp_path, _class_name=writer, **settings), name=name)


def test_changes_replace_settings_also_those_left_at_a_default():
    config = diffusers.EulerDiscreteScheduler(**SD).config  # lists use_karras_sigmas as left at its default
    changes = {**KARRAS, "beta_end": 0.013, "timestep_spacing": "trailing"}
    for name in ("dpm++", "euler"):
        ours = SCHEDULERS[name].from_config(config, **changes)
        assert_same_run(ours, getattr(diffusers, NAMES[name]).from_config(config, **changes))
        assert ours.config.use_karras_sigmas and ours.config.timestep_spacing == "trailing"
    assert (
        EulerDiscreteScheduler.from_config(config, timestep_spacing="leading").config["timestep_spacing"] == "leading"
    )
    with pytest.raises(CheckpointError, match="karras=True is not known here"):
        DPMSolverMultistepScheduler.from_config(config, karras=True)


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("name", NAMES)
def test_the_standard_linear_betas_from_zero_signal(name, steps):
    """The last noise level, σ = 4096, lies below the one before. diffusers' Euler rounds: see test_solvers.py."""
    theirs = getattr(diffusers, NAMES[name])(**ZERO_SNR)
    assert_same_run(SCHEDULERS[name].from_config(theirs.config), theirs, steps, 1e-4 if name == "dpm++" else 2e-3)


@pytest.mark.parametrize("name", ["dpm++", "euler"])
def test_karras_noise_levels_from_zero_signal(name):
    theirs = getattr(diffusers, NAMES[name])(**ZERO_SNR, **KARRAS)
    ours = SCHEDULERS[name].from_config(theirs.config)
    for steps in (2, 10, 50):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_steps_to_more_noise_add_none():
    """A run of many steps rises from the floor before it falls."""
    ours = DPMSolverMultistepScheduler.from_config(ZERO_SNR)
    ours.set_timesteps(1000)
    sample, noise = noise_maker()(), noise_maker(1)()
    assert ours.sigmas[1] > ours.sigmas[0]
    assert ours.step(sample, 999, sample, eta=1.0, noise=noise).isfinite().all()
    assert not EulerAncestralDiscreteScheduler.from_config(ZERO_SNR).sigmas.diff()[1:].gt(0).any()


@pytest.mark.parametrize("total", [50, 250, 500, 1000, 2000])
def test_karras_timesteps_of_a_cosine_schedule(total):
    """diffusers truncates them, and its logarithms, of float32, decide on the first."""
    settings = {"beta_schedule": "squaredcos_cap_v2", **KARRAS, "num_train_timesteps": total}
    theirs = diffusers.DPMSolverMultistepScheduler(**settings)
    ours = DPMSolverMultistepScheduler.from_config(settings)
    for steps in (1, 2, 5, 20, 33, 49):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
