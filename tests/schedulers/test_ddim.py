"""DDIM against diffusers' DDIMScheduler."""

import dataclasses

import diffusers
import pytest
import torch
from helpers import fake_model, max_abs_diff, noise_maker, write_scheduler

from gafext.config import SD_SCHEDULE, SchedulerConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.schedulers import DDIMScheduler

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def pair(**changes):
    """Our scheduler and diffusers', of one configuration."""
    config = dataclasses.replace(SD_SCHEDULE, **changes)
    return DDIMScheduler(config), diffusers.DDIMScheduler(**dataclasses.asdict(config))


def trajectory_difference(ours, theirs, *, steps, eta=0.0, seed=0):
    """The largest difference after any step, each scheduler following its own path."""
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.timesteps.dtype == torch.int64
    draw, worst = noise_maker(seed), 0.0
    mine = other = draw()
    for t in ours.timesteps:
        noise = draw() if eta else None
        mine = ours.step(fake_model(mine, t), t, mine, eta=eta, noise=noise)
        other = theirs.step(fake_model(other, t), t, other, eta=eta, variance_noise=noise).prev_sample
        worst = max(worst, max_abs_diff(mine, other))
    return worst


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_trajectory(timestep_spacing, prediction_type, eta, steps):
    schedulers = pair(timestep_spacing=timestep_spacing, prediction_type=prediction_type)
    assert trajectory_difference(*schedulers, steps=steps, eta=eta) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": tuple(torch.linspace(1e-4, 0.03, 1000).tolist())},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.5, "prediction_type": "v_prediction"},
        {"set_alpha_to_one": True},
        {"steps_offset": 0, "set_alpha_to_one": True},
        {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 100},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectory_of_other_configurations(changes, eta):
    ours, theirs = pair(**changes)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=0)
    assert trajectory_difference(ours, theirs, steps=20, eta=eta, seed=3) < 1e-6


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_trajectory_from_zero_signal(prediction_type):
    changes = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": prediction_type,
    }
    ours, theirs = pair(**changes)
    assert ours.alphas_cumprod[999] == 0
    assert trajectory_difference(ours, theirs, steps=20) < 1e-6
    # Here diffusers takes the root of a rounding error below zero: at eta 1 its first step is NaN.
    sample = noise_maker()()
    result = ours.step(sample, 999, sample, eta=1.0, noise=sample)
    assert max_abs_diff(result, ours.step(sample, 999, sample, eta=0.999999, noise=sample)) < 1e-2


def test_five_steps_of_stable_diffusion():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert scheduler.init_noise_sigma == 1.0


@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_timesteps_of_every_count(timestep_spacing):
    ours, theirs = pair(timestep_spacing=timestep_spacing)
    for count in range(1, 1001):
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        mine, other = ours.timesteps.tolist(), theirs.timesteps.tolist()
        # Two slips of diffusers: a trailing run that gains a step at -1, and 1000 leading steps from 1000 on.
        if other != mine:
            assert other[-1] == -1 or other[0] == 1000
            assert len(mine) == count and mine == sorted(set(mine) & set(range(1000)), reverse=True)


@pytest.mark.parametrize("timesteps", [[0, 999], [500, 3], [17], 250])
def test_add_noise(timesteps):
    ours, theirs = pair()
    sample, noise = (noise_maker(seed)() for seed in (1, 2))
    expected = theirs.add_noise(sample, noise, torch.as_tensor(timesteps))
    given = timesteps if isinstance(timesteps, int) else torch.tensor(timesteps)
    assert max_abs_diff(ours.add_noise(sample, noise, given), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_half_inputs_are_computed_in_float32(dtype, prediction_type):
    ours, theirs = pair(prediction_type=prediction_type)
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    sample, output, noise = (noise_maker(seed)().to(dtype) for seed in range(3))
    for t in (981, 1):
        result = ours.step(output, t, sample, eta=1.0, noise=noise)
        wide = theirs.step(output.float(), t, sample.float(), eta=1.0, variance_noise=noise.float()).prev_sample
        assert result.dtype == dtype
        assert torch.equal(result, wide.to(dtype))
    noised = ours.add_noise(sample, noise, torch.tensor([10, 900]))
    wide = theirs.add_noise(sample.float(), noise.float(), torch.tensor([10, 900]))
    assert noised.dtype == dtype
    assert torch.equal(noised, wide.to(dtype))


def test_the_sample_decides_the_dtype_and_doubles_stay_doubles():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    sample = noise_maker()()
    assert scheduler.step(sample.half(), 901, sample).dtype == torch.float32
    assert scheduler.step(sample.double(), 901, sample.double()).dtype == torch.float64


def test_steps_touch_no_global_generator():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    sample, state = noise_maker()(), torch.get_rng_state()
    scheduler.step(sample, 901, sample, eta=1.0, noise=sample)
    scheduler.add_noise(sample, sample, 5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None])
def test_impossible_step_counts(steps):
    with pytest.raises(ValueError, match=r"num_inference_steps: expected a whole number from 1 to 1000, got"):
        DDIMScheduler().set_timesteps(steps)


def test_no_more_steps_than_training_had():
    with pytest.raises(ValueError, match="from 1 to 100, got 101"):
        DDIMScheduler(dataclasses.replace(SD_SCHEDULE, num_train_timesteps=100)).set_timesteps(101)
    with pytest.raises(ValueError, match="from 1 to 1000, got 1001"):
        DDIMScheduler(dataclasses.replace(SD_SCHEDULE, num_train_timesteps=4000)).set_timesteps(1001)


def test_a_thousand_steps_run():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(1000)
    sample = noise_maker()()
    for t in scheduler.timesteps:
        sample = scheduler.step(fake_model(sample, t), t, sample)
    assert sample.isfinite().all()


def test_epsilon_cannot_start_from_zero_signal():
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="prediction_type: expected 'v_prediction'"):
        pair(**changes)[0].set_timesteps(10)


def test_step_says_what_is_wrong():
    scheduler, sample = DDIMScheduler(), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(sample, 801, sample)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"t: expected one of the timesteps \[801, 601, 401, 201, 1\], got 800"):
        scheduler.step(sample, 800, sample)
    with pytest.raises(ValueError, match=r"model_output: expected .*\[1, 4, 2, 2\], got \[1, 8, 2, 2\]"):
        scheduler.step(torch.zeros(1, 8, 2, 2), 801, sample)
    with pytest.raises(ValueError, match=r"eta: expected 0\.0 to 1\.0, got 1\.5"):
        scheduler.step(sample, 801, sample, eta=1.5, noise=sample)
    with pytest.raises(ValueError, match=r"noise: expected a tensor of shape \[1, 4, 2, 2\] .*got None"):
        scheduler.step(sample, 801, sample, eta=1.0)
    with pytest.raises(ValueError, match=r"noise: expected .*got \[4, 2, 2\]"):
        scheduler.step(sample, 801, sample, eta=1.0, noise=sample[0])


@pytest.mark.parametrize("timesteps", [1000, -1, [1, 2, 3], [0.5, 1.5]])
def test_add_noise_checks_its_timesteps(timesteps):
    sample = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="timesteps: expected"):
        DDIMScheduler().add_noise(sample, sample, torch.tensor(timesteps))


def test_add_noise_refuses_to_broadcast():
    with pytest.raises(ValueError, match="noise: expected"):
        DDIMScheduler().add_noise(torch.zeros(2, 4, 2, 2), torch.zeros(1, 4, 2, 2), 5)


def test_a_folder_from_diffusers_and_back(tmp_path):
    _, theirs = pair(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DDIMScheduler.from_pretrained(tmp_path / "theirs")
    assert trajectory_difference(ours, theirs, steps=7) < 1e-6
    ours.save_pretrained(tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["scheduler_config.json"]
    again = diffusers.DDIMScheduler.from_pretrained(tmp_path / "ours")
    assert trajectory_difference(DDIMScheduler.from_pretrained(tmp_path / "ours"), again, steps=7) < 1e-6
    assert DDIMScheduler.from_pretrained(tmp_path / "ours").config == ours.config


def test_keys_that_a_file_leaves_out_have_diffusers_defaults(tmp_path):
    ours = DDIMScheduler.from_pretrained(write_scheduler(tmp_path, _class_name="DDIMScheduler"))
    assert ours.config.clip_sample and ours.config.beta_schedule == "linear"
    assert trajectory_difference(ours, diffusers.DDIMScheduler(), steps=10) < 1e-6


NEED_MORE_PACKAGES = {"LMSDiscreteScheduler", "DPMSolverSDEScheduler"}  # scipy, torchsde
SOLVERS = [name for name in SchedulerConfig.solver_defaults if name not in NEED_MORE_PACKAGES]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the old solvers' use of NumPy
@pytest.mark.parametrize("solver", SOLVERS)
def test_another_solvers_file_gives_its_noise_schedule(tmp_path, solver):
    theirs = getattr(diffusers, solver)(beta_schedule="scaled_linear", beta_end=0.012)
    theirs.save_pretrained(tmp_path)
    ours = DDIMScheduler.from_pretrained(tmp_path)
    assert max_abs_diff(ours.alphas_cumprod, theirs.alphas_cumprod) < 1e-6
    assert ours.config.clip_sample == (solver in ("DDIMScheduler", "DDPMScheduler"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_file_of_another_solver_means_its_defaults(tmp_path, solver):
    ours = DDIMScheduler.from_pretrained(write_scheduler(tmp_path, _class_name=solver)).config
    theirs = getattr(diffusers, solver)().config
    for field in dataclasses.fields(ours):
        assert getattr(ours, field.name) == theirs.get(field.name, getattr(ours, field.name)), field.name


def test_the_published_file_of_stable_diffusion_2_1(tmp_path):
    values = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    }
    values |= {"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True, "trained_betas": None}
    values |= {"num_train_timesteps": 1000, "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0"}
    folder = write_scheduler(tmp_path, prediction_type="v_prediction", **values)
    expected = dataclasses.replace(SD_SCHEDULE, prediction_type="v_prediction")
    assert DDIMScheduler.from_pretrained(folder).config == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thresholding": True}, "thresholding=True"),
        ({"use_flow_sigmas": True, "_class_name": "UniPCMultistepScheduler"}, "use_flow_sigmas=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name='FlowMatchEulerDiscreteScheduler'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even'"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_start=0.02"),
        ({"steps_offset": 1000}, "steps_offset=1000"),
        ({"steps_offset": -1}, "steps_offset=-1"),
        ({"clip_sample_range": 0.0}, "clip_sample_range=0.0"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"trained_betas": [0.1, 0.0], "num_train_timesteps": 2}, "trained_betas"),
        ({"bata_start": 0.1}, "bata_start=0.1 is not known"),
    ],
)
def test_files_that_are_refused(tmp_path, values, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        DDIMScheduler.from_pretrained(write_scheduler(tmp_path, **values))
    assert "scheduler_config.json" in str(caught.value)


def test_a_missing_and_a_damaged_file(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"scheduler_config\.json: no such file"):
        DDIMScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"beta_start": 0.0')
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        DDIMScheduler.from_pretrained(tmp_path)
