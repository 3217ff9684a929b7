"""DPM-Solver++ and Euler against diffusers' schedulers."""

import dataclasses
import warnings

import diffusers
import pytest
import torch
from helpers import fake_model, max_abs_diff, noise_maker, write_scheduler

from gafext.config import SD_SCHEDULE
from gafext.errors import CheckpointError
from gafext.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    scheduler_from_pretrained,
)

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NAMES = {"dpm++": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}
TOLERANCE = 1e-4
SHAPE = (2, 4, 5, 3)


def pair(name, **changes):
    """Our solver and diffusers', of one configuration."""
    ours, settings = SCHEDULERS[name], {**SD, **changes}
    return ours(ours.config_class(**settings)), getattr(diffusers, NAMES[name])(**settings)


def pair_at(name, steps):
    solver, _ = pair(name)
    solver.set_timesteps(steps)
    return solver


def trajectory_difference(ours, theirs, *, steps, begin=0, seed=0):
    """The largest difference after any step, each solver on its own path, relative to samples that are over 1.

    From `begin` on, the run starts as image-to-image does. From zero signal (σ = 4096) diffusers' Euler rounds the
    difference of two large numbers: there a hundredth of the first sample counts as 1.
    """
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.dtype == theirs.timesteps.dtype and len(ours.sigmas) == steps + 1
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    theirs.set_begin_index(begin)
    draw, worst, unit = noise_maker(seed), 0.0, ours.init_noise_sigma / 100
    start, noise = draw().clamp(-1, 1), draw()
    mine, other = noise * ours.init_noise_sigma, noise * theirs.init_noise_sigma
    if begin:
        mine = ours.add_noise(start, noise, ours.timesteps[begin])
        other = theirs.add_noise(start, noise, theirs.timesteps[begin : begin + 1])
        assert max_abs_diff(mine, other) < 1e-5
    for t, their_t in zip(ours.timesteps[begin:].tolist(), theirs.timesteps[begin:], strict=True):
        mine = ours.step(fake_model(ours.scale_model_input(mine, t), their_t), t, mine)
        other = theirs.step(fake_model(theirs.scale_model_input(other, their_t), their_t), their_t, other).prev_sample
        worst = max(worst, max_abs_diff(mine, other) / max(1.0, other.abs().max().item(), unit))
    return worst


pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' use of NumPy


@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 20])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_trajectory(name, timestep_spacing, prediction_type, steps):
    solvers = pair(name, timestep_spacing=timestep_spacing, prediction_type=prediction_type)
    assert trajectory_difference(*solvers, steps=steps) < TOLERANCE


@pytest.mark.parametrize("begin", [1, 9, 18, 19])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_trajectory_that_starts_part_way(name, timestep_spacing, prediction_type, begin):
    solvers = pair(name, timestep_spacing=timestep_spacing, prediction_type=prediction_type)
    assert trajectory_difference(*solvers, steps=20, begin=begin) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 14, 20])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dpm++", {"final_sigmas_type": "sigma_min"}),
        ("dpm++", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpm++", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpm++", {"solver_order": 1}),
        ("dpm++", {"use_karras_sigmas": True}),
        ("dpm++", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpm++", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        ("dpm++", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
        ("dpm++", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"use_karras_sigmas": True}),
        ("euler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        ("euler", {"num_train_timesteps": 100}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_trajectory_of_other_settings(name, changes, steps):
    ours, theirs = pair(name, **changes)
    assert trajectory_difference(ours, theirs, steps=steps, seed=3) < TOLERANCE


@pytest.mark.parametrize("steps", [14, 15, 16])
def test_the_last_step_of_few_is_of_first_order(steps):
    ours, theirs = pair("dpm++", final_sigmas_type="sigma_min")
    assert trajectory_difference(ours, theirs, steps=steps, seed=3) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_network_gives_back_the_clean_sample(name):
    """For one known sample the predicted noise is exact, so any number of steps must land on it."""
    for prediction_type in PREDICTIONS:
        config = dataclasses.replace(SD_SCHEDULE, prediction_type=prediction_type)
        scheduler = SCHEDULERS[name].from_config(config)
        scheduler.set_timesteps(7)
        clean, noise = (noise_maker(seed)() for seed in (1, 2))
        sample = scheduler.add_noise(clean, noise, scheduler.timesteps[0])
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(sample, t)
            signal = scheduler.alphas_cumprod[int(t)].sqrt()
            level = (1 - signal**2).sqrt()
            epsilon = (seen - signal * clean) / level
            output = {"epsilon": epsilon, "sample": clean, "v_prediction": signal * epsilon - level * clean}
            sample = scheduler.step(output[prediction_type], t, sample, eta=0.0)
        # DDIM ends on the first training step, which still has some noise (set_alpha_to_one is false).
        assert max_abs_diff(sample, clean) < (0.15 if name == "ddim" else 1e-4)


@pytest.mark.parametrize("changes", [{}, {"final_sigmas_type": "sigma_min"}, {"timestep_spacing": "leading"}])
def test_eta_1_is_the_sde_solver(changes):
    ours, _ = pair("dpm++", **changes)
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++", **changes)
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    draw = noise_maker()
    mine = other = draw()
    for t in theirs.timesteps:
        noise = draw()
        mine = ours.step(fake_model(mine, t), t, mine, eta=1.0, noise=noise)
        other = theirs.step(fake_model(other, t), t, other, variance_noise=noise).prev_sample
        assert max_abs_diff(mine, other) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_eta_adds_only_its_noise(name):
    """Between 0 and 1, signal and variance after a step are those of the next level, whatever eta."""
    solver, _ = pair(name)
    solver.set_timesteps(10)
    t, after = solver.timesteps[4].item(), solver.timesteps[5].item()
    zero, one = torch.zeros(1), torch.ones(1)
    signal, level = (solver.add_noise(a, b, t) for a, b in ((one, zero), (zero, one)))
    expected_signal, expected = (solver.add_noise(a, b, after) for a, b in ((one, zero), (zero, one)))
    for eta in (0.0, 0.3, 1.0):  # the clean sample is 0: what is left is noise, kept and new
        kept = solver.step(one, t, level, eta=eta, noise=zero)
        new = solver.step(one, t, level, eta=eta, noise=one) - kept
        assert (kept**2 + new**2).sqrt().item() == pytest.approx(expected.item(), rel=1e-5)
        assert (new.item() > 0) == (eta > 0)
        solver.set_timesteps(10)  # without what it has seen
        without_noise = solver.step(zero, t, signal, eta=eta, noise=zero)
        assert without_noise.item() == pytest.approx(expected_signal.item(), rel=1e-5)
        solver.set_timesteps(10)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_forgets_the_last_one(name):
    def run(solver, count, begin=0):
        sample = noise_maker()()
        for t in solver.timesteps[begin:count].tolist():
            sample = solver.step(fake_model(sample, t), t, sample)
        return sample

    fresh, used = (pair(name)[0] for _ in range(2))
    for solver in (fresh, used):
        solver.set_timesteps(8)
    expected, part_way = run(fresh, 8), run(pair_at(name, 8), 8, begin=3)
    run(used, 5)  # broken off
    assert torch.equal(run(used, 8), expected)  # begun anew without set_timesteps
    run(used, 5)
    assert torch.equal(run(used, 8, begin=3), part_way)
    run(used, 5)
    used.set_timesteps(8)
    assert torch.equal(run(used, 8), expected)


def test_second_order_does_something():
    first, second = pair("dpm++", solver_order=1)[0], pair("dpm++")[0]
    samples = []
    for solver in (first, second):
        solver.set_timesteps(5)
        sample = noise_maker()()
        for t in solver.timesteps[:2]:
            sample = solver.step(fake_model(sample, t), t, sample)
        samples.append(sample)
    assert max_abs_diff(*samples) > 1e-3


def test_a_network_that_reuses_its_output():
    outputs = []
    for reuse in (False, True):
        solver = SCHEDULERS["dpm++"].from_config(dataclasses.replace(SD_SCHEDULE, prediction_type="sample"))
        solver.set_timesteps(6)
        sample, memory = noise_maker()(), torch.empty(SHAPE)
        for t in solver.timesteps:
            output = fake_model(sample, t)
            sample = solver.step(memory.copy_(output) if reuse else output, t, sample)
        outputs.append(sample)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_inputs_are_computed_in_float32(name, dtype):
    half, wide = pair_at(name, 10), pair_at(name, 10)
    for t in half.timesteps[:3]:
        sample, output, noise = (noise_maker(seed)().to(dtype) for seed in range(3))
        expected = wide.step(output.float(), t, sample.float(), eta=0.5, noise=noise.float())
        assert torch.equal(half.step(output, t, sample, eta=0.5, noise=noise), expected.to(dtype))
    assert half.scale_model_input(sample, t).dtype == half.add_noise(sample, noise, t).dtype == dtype


def test_karras_timesteps_that_repeat_are_all_taken():
    solver, theirs = pair("dpm++", use_karras_sigmas=True)
    solver.set_timesteps(60)
    assert len(set(solver.timesteps.tolist())) < 60
    assert trajectory_difference(solver, theirs, steps=60) < TOLERANCE


@pytest.mark.parametrize(("steps", "begin"), [(50, 48), (100, 99), (100, 94)])
def test_a_run_that_starts_at_a_timestep_which_repeats(steps, begin):
    solver, theirs = pair("dpm++", use_karras_sigmas=True)
    for either in (solver, theirs):
        either.set_timesteps(steps)
        either.set_begin_index(begin)
    times = solver.timesteps.tolist()
    assert times[begin] == times[begin - 1]
    clean, noise = noise_maker()(), noise_maker(1)()
    mine = solver.add_noise(clean, noise, times[begin])
    other = theirs.add_noise(clean, noise, theirs.timesteps[begin : begin + 1])
    assert max_abs_diff(mine, other) < 1e-5
    for index, t in enumerate(times[begin:], begin):
        assert solver.sigma(t) == pytest.approx(theirs.sigmas[index].item())
        mine = solver.step(fake_model(mine, t), t, mine)
        other = theirs.step(fake_model(other, t), t, other).prev_sample
        assert max_abs_diff(mine, other) < 1e-5
    solver.set_timesteps(5)  # begins at its first timestep again
    assert solver.sigma(solver.timesteps[0]) == pytest.approx(solver.sigmas[0].item())


@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_count(name, timestep_spacing):
    solver, _ = pair(name, timestep_spacing=timestep_spacing)
    for count in [*range(1, 100), 333, 500, 998, 999]:
        solver.set_timesteps(count)
        times = solver.timesteps.tolist()
        assert len(times) == len(set(times)) == count and times == sorted(times, reverse=True)
        assert times[-1] >= 0 and times[0] <= 999
        assert len(solver.sigmas) == count + 1 and (solver.sigmas.diff() < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_messages(name):
    solver, _ = pair(name)
    sample = torch.zeros(1, 4, 2, 2)
    for call in (solver.step, lambda a, t, _: solver.add_noise(a, a, t)):
        with pytest.raises(ValueError, match="set_timesteps"):
            call(sample, 999, sample)
    for steps in (0, 1001, 2.5, True):
        with pytest.raises(ValueError, match=r"num_inference_steps: expected a whole number from 1 to (999|1000), got"):
            solver.set_timesteps(steps)
    solver.set_timesteps(5)
    with pytest.raises(ValueError, match=r"t: expected one of the timesteps \[999.*\], got 500"):
        solver.step(sample, 500, sample)
    with pytest.raises(ValueError, match=r"t: expected one of the timesteps \[999.*\], got 500"):
        solver.add_noise(sample, sample, 500)
    with pytest.raises(ValueError, match=r"noise: expected a tensor of shape \[1, 4, 2, 2\] .*got None"):
        solver.step(sample, 999, sample, eta=0.5)
    with pytest.raises(ValueError, match=r"eta: expected 0\.0 to 1\.0, got 1\.5"):
        solver.step(sample, 999, sample, eta=1.5, noise=sample)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("writer", ["DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", *NAMES.values()])
def test_by_name_over_the_schedule_of_any_file(tmp_path, name, writer):
    """As diffusers' class loads another solver's file, which is how its users change solvers."""
    getattr(diffusers, writer)(**SD, prediction_type="v_prediction").save_pretrained(tmp_path)
    ours = scheduler_from_pretrained(tmp_path, name=name)
    assert type(ours) is SCHEDULERS[name]
    theirs = getattr(diffusers, NAMES[name]).from_pretrained(tmp_path)
    assert trajectory_difference(ours, theirs, steps=10) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_by_name_over_a_file_that_leaves_keys_out(tmp_path, name):
    """Stable Diffusion 2.1's published file names no timestep spacing: diffusers then takes the new solver's."""
    folder = write_scheduler(tmp_path, _class_name="DDIMScheduler", **SD, set_alpha_to_one=False, clip_sample=False)
    theirs = getattr(diffusers, NAMES[name]).from_pretrained(folder)
    assert trajectory_difference(scheduler_from_pretrained(folder, name=name), theirs, steps=10) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("writer", ["DDIMScheduler", "PNDMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"])
def test_diffusers_configuration_of_a_file_that_leaves_keys_out(tmp_path, name, writer):
    """It has the keys, of the writer's values, and a list of them."""
    folder = write_scheduler(tmp_path, _class_name=writer, **SD)
    for config in (getattr(diffusers, writer).from_pretrained(folder).config, getattr(diffusers, writer)(**SD).config):
        assert "timestep_spacing" in config["_use_default_values"]
        theirs = getattr(diffusers, NAMES[name]).from_config(config)
        assert trajectory_difference(SCHEDULERS[name].from_config(config), theirs, steps=10) < TOLERANCE


@pytest.mark.parametrize(
    ("writer", "expected"),
    [
        ("DDIMScheduler", DDIMScheduler),
        ("PNDMScheduler", DDIMScheduler),
        ("UniPCMultistepScheduler", DDIMScheduler),
        ("DPMSolverMultistepScheduler", DPMSolverMultistepScheduler),
        ("EulerDiscreteScheduler", EulerDiscreteScheduler),
    ],
)
def test_the_file_chooses_the_solver(tmp_path, writer, expected):
    theirs = getattr(diffusers, writer)(**SD)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = scheduler_from_pretrained(tmp_path)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (writer != expected.__name__) and all(f"{writer} is read as DDIM" in text for text in said)
    assert type(ours) is expected and type(scheduler_from_pretrained(tmp_path, name="ddim")) is DDIMScheduler
    ours.save_pretrained(tmp_path / "saved")
    again = scheduler_from_pretrained(tmp_path / "saved")
    assert type(again) is expected and again.config == ours.config
    if writer in NAMES.values():
        loaded = getattr(diffusers, writer).from_pretrained(tmp_path / "saved")
        assert trajectory_difference(again, loaded, steps=10) < TOLERANCE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm_type": "sde-dpmsolver++"}, r"algorithm_type='sde-dpmsolver\+\+'.*'ddim'"),
        ({"solver_order": 3}, "solver_order=3: expected 1 or 2"),
        ({"solver_type": "heun"}, "solver_type='heun'"),
        ({"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ({"lambda_min_clipped": -5.1}, r"lambda_min_clipped=-5\.1"),
        ({"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 5.0}, r"sigma_min=0\.1.*sigma_max=5\.0"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1"),
        ({"beta_start": 1e-9}, "beta_start=1e-09"),
        ({"beta_start": 0.9, "beta_end": 0.99}, "noise that grows with every timestep"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "cubic"}, "interpolation_type='cubic'"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 9.0}, r"sigma_max=9\.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name='FlowMatchEulerDiscreteScheduler'"),
    ],
)
def test_files_that_are_refused(tmp_path, values, message):
    folder = write_scheduler(tmp_path, **{"_class_name": "DPMSolverMultistepScheduler", **values})
    with pytest.raises(CheckpointError, match=message) as caught:
        scheduler_from_pretrained(folder)
    assert "scheduler_config.json" in str(caught.value)


def test_names_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"scheduler: expected one of \['ddim', 'dpm\+\+', .*\], got 'heun'"):
        scheduler_from_pretrained(write_scheduler(tmp_path, _class_name="DDIMScheduler"), name="heun")
