"""LCM and Euler-ancestral against diffusers' schedulers, which add noise at every step: the same noise for both."""

import diffusers
import pytest
import torch
from helpers import fake_model, max_abs_diff, noise_maker, write_scheduler

from gafext.errors import CheckpointError
from gafext.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    scheduler_from_pretrained,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = {"lcm": "LCMScheduler", "euler-a": "EulerAncestralDiscreteScheduler"}
TOLERANCE = 1e-5
SHAPE = (2, 4, 5, 3)  # of the samples that `noise_maker` makes
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' use of NumPy

CASES = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "other betas": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
}
SETTINGS = [(name, changes) for name in NAMES for changes in CASES.values()]
SETTINGS += [
    ("lcm", ZERO_SNR),
    ("lcm", {"prediction_type": "sample"}),
    ("lcm", {"original_inference_steps": 100}),
    ("lcm", {"timestep_scaling": 0.01}),  # the boundary condition shows
    ("lcm", {"clip_sample": True, "clip_sample_range": 0.5}),
    ("euler-a", {"num_train_timesteps": 100}),
]


def pair(name, **changes):
    """Our solver and diffusers', of one configuration."""
    theirs = getattr(diffusers, NAMES[name])(**{**SD, **changes})
    return SCHEDULERS[name].from_config(theirs.config), theirs


def trajectory_difference(ours, theirs, *, steps, begin=0):
    """The largest difference after any step, each solver on its own path, relative to samples that are over 1."""
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    draw, worst = noise_maker(), 0.0
    start, noise = draw().clamp(-1, 1), draw()
    mine, other = noise * ours.init_noise_sigma, noise * theirs.init_noise_sigma
    if begin:
        theirs.set_begin_index(begin)
        mine = ours.add_noise(start, noise, ours.timesteps[begin])
        other = theirs.add_noise(start, noise, theirs.timesteps[begin : begin + 1])
        assert max_abs_diff(mine, other) < TOLERANCE
    for index, their_t in enumerate(theirs.timesteps[begin:]):
        t = ours.timesteps[begin + index].item()
        fresh, seeded = (torch.Generator().manual_seed(index) for _ in range(2))
        output = fake_model(ours.scale_model_input(mine, t), their_t)
        mine = ours.step(output, t, mine, noise=torch.randn(SHAPE, generator=fresh))
        output = fake_model(theirs.scale_model_input(other, their_t), their_t)
        other = theirs.step(output, their_t, other, generator=seeded).prev_sample
        worst = max(worst, max_abs_diff(mine, other) / max(1.0, other.abs().max().item()))
    return worst


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 20])
@pytest.mark.parametrize(("name", "changes"), SETTINGS, ids=str)
def test_trajectory(name, changes, steps):
    assert trajectory_difference(*pair(name, **changes), steps=steps) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ancestral_steps_from_zero_signal(steps):
    """At σ = 4096 diffusers subtracts two large float32: its rounding shows, as it does in `EulerDiscreteScheduler`."""
    assert trajectory_difference(*pair("euler-a", **ZERO_SNR), steps=steps) < 5e-4


@pytest.mark.parametrize("begin", [1, 5, 7])
@pytest.mark.parametrize("name", NAMES)
def test_trajectory_that_starts_part_way(name, begin):
    assert trajectory_difference(*pair(name), steps=8, begin=begin) < TOLERANCE


def test_timesteps_of_lcm_for_every_count():
    for original in (7, 30, 50):
        ours, theirs = pair("lcm", original_inference_steps=original)
        for count in range(1, original + 1):
            ours.set_timesteps(count)
            theirs.set_timesteps(count)
            assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("name", NAMES)
def test_less_eta_is_less_noise(name):
    """At 0 the step is deterministic; in between, what is left of the noise and the new noise make up the level."""
    solver, _ = pair(name)
    solver.set_timesteps(6)
    t, after = solver.timesteps[2].item(), solver.timesteps[3].item()
    zero, one = torch.zeros(1), torch.ones(1)
    level, expected = (solver.add_noise(zero, one, at) for at in (t, after))
    news = []
    for eta in (0.0, 0.3, 1.0):  # the clean sample is 0: what is left is noise, kept and new
        kept = solver.step(one, t, level, eta=eta, noise=zero)
        new = solver.step(one, t, level, eta=eta, noise=one) - kept
        assert (kept**2 + new**2).sqrt().item() == pytest.approx(expected.item(), rel=1e-5)
        news.append(new.item())
    assert news[0] == 0 < news[1] < news[2]
    if name == "lcm":  # all of the noise is new
        assert news[2] == pytest.approx(expected.item())
    assert torch.equal(solver.step(one, t, level, noise=one), solver.step(one, t, level, eta=1.0, noise=one))
    with pytest.raises(ValueError, match=r"noise: expected a tensor of shape \[1\] at eta=1\.0, got None"):
        solver.step(one, t, level)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("writer", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", *NAMES.values()])
def test_by_name_over_the_schedule_of_any_file(tmp_path, name, writer):
    """As diffusers' class loads another solver's file, which is how its users change solvers."""
    settings = {"clip_sample": False} if writer == "DDIMScheduler" else {}
    getattr(diffusers, writer)(**SD, **settings, prediction_type="v_prediction").save_pretrained(tmp_path)
    ours = scheduler_from_pretrained(tmp_path, name=name)
    assert type(ours) is SCHEDULERS[name]
    theirs = getattr(diffusers, NAMES[name]).from_pretrained(tmp_path)
    assert trajectory_difference(ours, theirs, steps=6) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_file_chooses_the_solver(tmp_path, name):
    theirs = getattr(diffusers, NAMES[name])(**SD)
    theirs.save_pretrained(tmp_path)
    ours = scheduler_from_pretrained(tmp_path)
    assert type(ours) is SCHEDULERS[name] and type(scheduler_from_pretrained(tmp_path, name="ddim")) is DDIMScheduler
    ours.save_pretrained(tmp_path / "saved")
    again = scheduler_from_pretrained(tmp_path / "saved")
    assert type(again) is type(ours) and again.config == ours.config
    loaded, unused = getattr(diffusers, NAMES[name]).from_pretrained(tmp_path / "saved", return_unused_kwargs=True)
    assert unused.keys() == {"_class_name"} and trajectory_difference(again, loaded, steps=6) < TOLERANCE


def test_a_file_of_lcm_that_names_no_betas(tmp_path):
    """Its defaults are not those of the other schedulers."""
    folder = write_scheduler(tmp_path, _class_name="LCMScheduler")
    expected = pair("lcm", **SD)[1].alphas_cumprod
    for name in ("lcm", "ddim"):
        ours = scheduler_from_pretrained(folder, name=name)
        assert torch.equal(ours.alphas_cumprod, expected) and not ours.config["clip_sample"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"original_inference_steps": 0}, "original_inference_steps=0: expected 1 to 1000"),
        ({"original_inference_steps": 1001}, "original_inference_steps=1001: expected 1 to 1000"),
        ({"timestep_scaling": 0.0}, r"timestep_scaling=0\.0: expected over 0"),
        ({"thresholding": True}, "thresholding=True"),
    ],
)
def test_files_of_lcm_that_are_refused(tmp_path, values, message):
    with pytest.raises(CheckpointError, match=message):
        scheduler_from_pretrained(write_scheduler(tmp_path, _class_name="LCMScheduler", **values))


def test_steps_that_are_refused():
    lcm, _ = pair("lcm")
    with pytest.raises(ValueError, match="num_inference_steps: expected a whole number from 1 to 50, got 51"):
        lcm.set_timesteps(51)
    zero_snr = LCMScheduler.from_config({**SD, "rescale_betas_zero_snr": True})
    with pytest.raises(ValueError, match="prediction_type: expected 'v_prediction' or 'sample', got 'epsilon'"):
        zero_snr.set_timesteps(4)
    assert issubclass(EulerAncestralDiscreteScheduler, SCHEDULERS["euler"])
