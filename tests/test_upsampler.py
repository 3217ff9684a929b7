"""The K-UNet and the latent upsampler against diffusers, on small checkpoints that diffusers itself saves."""

import inspect
from dataclasses import fields

import diffusers
import pytest
import torch
import transformers
from helpers import UNET_WEIGHTS as WEIGHTS
from helpers import (
    assert_backends_agree,
    assert_equal_weights,
    assert_lists,
    edit_json,
    edit_weights,
    max_abs_diff,
    normal,
)
from safetensors.torch import save_file
from small_checkpoints import SD_SCHEDULE, stock_text, stock_tokenizer, stock_unet, stock_vae

from gafext.config import SD_X2_SCHEDULE, SD_X2_UNET, EulerConfig, KUNetConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.k_unet import KUNet, downsample, upsample
from gafext.noise import view_noise
from gafext.schedulers import EulerDiscreteScheduler
from gafext.upsampler import NOISE_STEP, LatentUpsampler, PromptEmbeds, encode_prompt

CROSS = "KCrossAttn{}Block2D"
TEXT = {"hidden_size": 24, "vocab_size": 10, "eos_token_id": 9, "bos_token_id": 8}
SCHEDULE = {**SD_SCHEDULE, "prediction_type": "sample"}


def block_types(stages, *, first="K{}Block2D"):
    down = [first, *[CROSS] * (stages - 1)]
    return {
        "down_block_types": tuple(name.format("Down") for name in down),
        "up_block_types": tuple(name.format("Up") for name in reversed(down)),
    }


def stock_k_unet(widths=(32, 32, 64, 64), *, seed=0, **changes):
    """diffusers' own small K-UNet with random weights."""
    settings = {
        **{"act_fn": "gelu", "timestep_post_act": "gelu", "time_embedding_type": "fourier", "mid_block_type": None},
        **{"norm_num_groups": None, "resnet_time_scale_shift": "scale_shift", "conv_in_kernel": 1},
        **{"conv_out_kernel": 1, "in_channels": 8, "out_channels": 5, "attention_head_dim": 16},
        **{"layers_per_block": 2, "cross_attention_dim": 24, "time_cond_proj_dim": 152},
    }
    return stock_unet({**settings, "block_out_channels": widths, **block_types(len(widths)), **changes}, seed=seed)


def noise_levels(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def stock_pipeline(*, unet=None, text_encoder=None, tokenizer=None, **schedule):
    """diffusers' pipeline; its autoencoder only says how many channels latents have."""
    vae = stock_vae((8,))
    scheduler = diffusers.EulerDiscreteScheduler(**{**SCHEDULE, **schedule})
    pipeline = diffusers.StableDiffusionLatentUpscalePipeline(
        vae, text_encoder, tokenizer, unet or stock_k_unet(), scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved_parts(folder, pipeline, *names):
    for name in names:
        getattr(pipeline, name).save_pretrained(folder / name)


@pytest.fixture
def folder(tmp_path):
    saved_parts(tmp_path, stock_pipeline(), "unet", "scheduler")
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize(
    ("widths", "changes", "size"),
    [
        ((32, 32, 64, 64), {}, (24, 16)),
        ((32, 32, 64, 64), {"layers_per_block": 1, "attention_head_dim": 8, "time_cond_proj_dim": 140}, (16, 40)),
        ((64, 128, 128), {"layers_per_block": 3, "cross_attention_dim": 40, "attention_head_dim": 64}, (12, 8)),
        ((48, 96, 96), {"norm_eps": 1e-3, "conv_in_kernel": 3, "conv_out_kernel": 5}, (20, 12)),
        ((32, 96, 160, 160), {"time_embedding_dim": 160, "in_channels": 6, "out_channels": 4}, (16, 16)),
        ((32, 64, 64), {**block_types(3, first=CROSS)}, (8, 12)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_k_unet_equals_diffusers(tmp_path, widths, changes, size, seed):
    theirs = stock_k_unet(widths, seed=seed, **changes)
    theirs.save_pretrained(tmp_path)
    ours = KUNet.from_pretrained(tmp_path)
    assert not ours.training and ours.dtype == torch.float32

    config = theirs.config
    sample, timestep = normal(2, config.in_channels, *size, seed=seed), torch.tensor([0.9, -0.7])
    text = normal(2, 7, config.cross_attention_dim, seed=seed + 2)
    condition = normal(2, config.time_cond_proj_dim, seed=seed + 3)
    expected = theirs(sample, timestep, text, timestep_cond=condition).sample
    assert expected.std() > 0.1
    assert max_abs_diff(ours(sample, timestep, text, condition), expected) < 2e-5

    # One timestep, text and condition for all rows.
    expected = theirs(sample, timestep[0], text[:1].expand(2, -1, -1), timestep_cond=condition[:1].expand(2, -1)).sample
    assert max_abs_diff(ours(sample, timestep[0], text[:1], condition[:1]), expected) < 2e-5


@pytest.mark.parametrize("size", [(2, 2), (6, 4), (10, 16)])
def test_resampling_is_the_reflected_filter(size):
    from diffusers.models.downsampling import KDownsample2D
    from diffusers.models.upsampling import KUpsample2D

    x = normal(2, 3, *size)
    assert max_abs_diff(downsample(x), KDownsample2D()(x)) < 1e-6
    assert max_abs_diff(upsample(x), KUpsample2D()(x)) < 1e-6


def test_every_backend_gives_the_same(folder):
    model = KUNet.from_pretrained(folder / "unet")
    inputs = normal(1, 8, 16, 16), torch.tensor(0.3), normal(1, 5, 24), normal(1, 152)
    assert_backends_agree(model, lambda: model(*inputs), tolerance=1e-5)
    attentions = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("attn1", "attn2")]
    assert len(attentions) == 6 + 2 + 6 + 2  # attn2 in six stages, attn1 in the two deepest
    assert {attention.attention_backend for attention in attentions} == {"reference"}


def test_published_size():
    with torch.device("meta"):
        model = KUNet(SD_X2_UNET)
    assert sum(parameter.numel() for parameter in model.parameters()) == 372_560_645
    assert len(model.state_dict()) == 639
    assert model.config.time_channels == 768 and model.config.size_multiple == 8
    upsampler = LatentUpsampler(model)
    upsampler.check_size(8, 32)
    for size in ((4, 32), (32, 10), (32, 33)):
        with pytest.raises(ValueError, match=r"multiples of 4 and at least 8, got \d+×\d+"):
            upsampler.check_size(*size)


@pytest.mark.parametrize("interpolation", ["linear", "log_linear"])
@pytest.mark.parametrize("beta", ["linear", "scaled_linear"])
def test_noise_levels_equal_diffusers(interpolation, beta):
    settings = {"interpolation_type": interpolation, "beta_schedule": beta, "prediction_type": "sample"}
    theirs, ours = diffusers.EulerDiscreteScheduler(**settings), EulerDiscreteScheduler(EulerConfig(**settings))
    for count in (1, 2, 10, 37):
        theirs.set_timesteps(count)
        expected = theirs.sigmas[: count + 1]
        torch.testing.assert_close(noise_levels(ours, count), expected, rtol=1e-6, atol=0)
        assert theirs.init_noise_sigma == expected[0] == pytest.approx(ours.init_noise_sigma, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "schedule",
    [
        {"interpolation_type": "linear"},
        {"interpolation_type": "log_linear"},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
    ],
    ids=lambda schedule: "-".join(map(str, next(iter(schedule.items())))),
)
@pytest.mark.parametrize("guidance", [0, 1.0, 3.0])
@pytest.mark.parametrize(("seed", "steps", "size"), [(0, 10, (8, 8)), (1, 3, (12, 20))])
def test_the_whole_loop_equals_diffusers(tmp_path, schedule, guidance, seed, steps, size):
    pipeline = stock_pipeline(unet=stock_k_unet(seed=seed, layers_per_block=1), **schedule)
    saved_parts(tmp_path, pipeline, "unet", "scheduler")
    ours = LatentUpsampler.from_pretrained(tmp_path)
    latents, noise = normal(2, 4, *size, seed=seed), normal(2, 4, *(2 * edge for edge in size), seed=seed + 1)
    prompt = {"prompt_embeds": normal(2, 7, 24, seed=2), "pooled_prompt_embeds": normal(2, 24, seed=3)}
    if guidance > 1:
        prompt["negative_prompt_embeds"] = normal(2, 7, 24, seed=4)
        prompt["negative_pooled_prompt_embeds"] = normal(2, 24, seed=5)
    options = {**prompt, "num_inference_steps": steps, "guidance_scale": guidance}
    expected = pipeline(image=latents, latents=noise, output_type="latent", **options).images
    result = ours(latents, noise=noise, **options)
    assert expected.std() > 0.1
    assert max_abs_diff(result, expected) < 5e-5


@pytest.fixture
def published(tmp_path):
    """A folder in the layout of the published upsampler, with all its parts, and diffusers' pipeline of it."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        stock_tokenizer(tmp_path / "tokenizer", pad_token="!", model_max_length=12)
    )
    pipeline = stock_pipeline(text_encoder=stock_text(**TEXT), tokenizer=tokenizer)
    saved_parts(tmp_path, pipeline, "unet", "scheduler", "text_encoder")
    return tmp_path, pipeline


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", "ab c", ["a b", "c"]])
def test_prompts_are_encoded_as_in_diffusers(published, prompt):
    folder, pipeline = published
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, "cpu", False)
    result = encode_prompt(folder, prompt)
    assert max_abs_diff(result.prompt_embeds, embeds) < 1e-5
    assert max_abs_diff(result.pooled_prompt_embeds, pooled) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_empty_prompt_is_the_default_and_the_unconditional_one(published, guidance):
    folder, pipeline = published
    upsampler = LatentUpsampler.from_pretrained(folder)
    latents, noise = normal(2, 4, 8, 12), normal(2, 4, 16, 24, seed=1)
    options = {"num_inference_steps": 4, "guidance_scale": guidance}
    for prompt in (["", ""], ["a b", "c"]):
        expected = pipeline(prompt, latents, latents=noise, output_type="latent", **options).images
        embeds = encode_prompt(folder, prompt) if any(prompt) else ()
        assert max_abs_diff(upsampler(latents, *embeds, noise=noise, **options), expected) < 5e-5


@torch.no_grad()
def test_what_it_saves_needs_no_text_encoder_and_gives_the_same_bits(published, tmp_path):
    ours, target = LatentUpsampler.from_pretrained(published[0]), tmp_path / "saved"
    ours.save_pretrained(target)
    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    network = ["unet/config.json", f"unet/{WEIGHTS}"]
    assert names == ["empty_prompt.safetensors", "scheduler/scheduler_config.json", *network]
    again = LatentUpsampler.from_pretrained(target)
    assert again.scheduler.config == ours.scheduler.config and again.unet.config == ours.unet.config
    assert_equal_weights(again, ours)
    latents = normal(1, 4, 8, 8)
    assert torch.equal(again(latents, num_inference_steps=2), ours(latents, num_inference_steps=2))

    theirs, loading = diffusers.UNet2DConditionModel.from_pretrained(target / "unet", output_loading_info=True)
    assert not any(loading.values())
    inputs = normal(1, 8, 16, 16), torch.tensor(0.3), normal(1, 5, 24), normal(1, 152)
    assert max_abs_diff(ours.unet(*inputs), theirs(*inputs[:3], timestep_cond=inputs[3]).sample) < 1e-5
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(target / "scheduler")
    scheduler.set_timesteps(10)
    assert scheduler.config.prediction_type == "sample"
    assert torch.allclose(scheduler.sigmas, noise_levels(ours.scheduler, 10))


@torch.no_grad()
def test_noise_depends_on_the_seed_and_the_row_alone(folder):
    model = LatentUpsampler.from_pretrained(folder)
    latents = normal(3, 4, 8, 8)
    run = {"prompt_embeds": normal(1, 5, 24), "pooled_prompt_embeds": normal(1, 24), "num_inference_steps": 2}
    result = model(latents, **run)
    assert torch.equal(model(latents, **run), result)
    assert torch.equal(model(latents, generator=torch.Generator().manual_seed(0), **run), result)
    assert max_abs_diff(model(latents[:2], **run), result[:2]) < 1e-5
    assert max_abs_diff(model(latents, generator=1, **run), result) > 0.01
    noise = view_noise(1, portraits=1, views=3, shape=(4, 16, 16), step=NOISE_STEP)
    assert torch.equal(model(latents, generator=1, **run), model(latents, noise=noise, **run))
    assert NOISE_STEP > 1000  # the steps of the diffusion have their own noise
    fresh = [model(latents, generator=None, **run) for _ in range(2)]
    assert max_abs_diff(*fresh) > 0.01
    same = model(latents[:1].expand(3, -1, -1, -1), **run)
    assert max_abs_diff(same[:1], same[1:2]) > 0.01


@torch.no_grad()
def test_half_weights_keep_the_noise_levels_and_the_sum_in_float32(folder):
    run = {"prompt_embeds": normal(1, 5, 24), "pooled_prompt_embeds": normal(1, 24), "num_inference_steps": 3}
    latents = normal(1, 4, 8, 8)
    expected = LatentUpsampler.from_pretrained(folder)(latents, **run)
    model = LatentUpsampler.from_pretrained(folder, dtype=torch.bfloat16)
    result = model(latents, **run)
    assert result.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert max_abs_diff(result, expected) < 0.05 * expected.abs().max()
    assert not torch.equal(result, result.bfloat16().float())
    noise, run = normal(1, 4, 16, 16), {**run, "num_inference_steps": 1}
    assert not torch.equal(model(latents, noise=noise, **run), model(latents, noise=noise.bfloat16(), **run))
    assert model(latents.bfloat16(), **run).dtype == torch.bfloat16


def test_the_upsampler_moves_as_a_whole(published):
    model = LatentUpsampler.from_pretrained(published[0]).to(torch.bfloat16)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert model(normal(1, 4, 8, 8), num_inference_steps=1).isfinite().all()


def test_gradients_reach_the_weights_of_the_network(folder):
    model = KUNet.from_pretrained(folder / "unet")
    model(normal(1, 8, 16, 16), torch.tensor(0.3), normal(1, 5, 24), normal(1, 152)).sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == ["time_proj.weight"]  # random and fixed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": (1, 3, 8, 8)}, r"latents: expected \(B,4,h,w\), floating-point, got \(1, 3, 8, 8\)"),
        ({"latents": (4, 8, 8)}, r"latents: expected \(B,4,h,w\)"),
        ({"latents": (0, 4, 8, 8)}, r"latents: expected \(B,4,h,w\)"),
        ({"latents": (2, 4, 8, 9)}, "multiples of 4 and at least 8, got 8×9"),
        ({"latents": (2, 4, 4, 8)}, "multiples of 4 and at least 8, got 4×8"),
        ({"noise": (2, 4, 8, 8)}, r"noise: expected \(2, 4, 16, 16\), got \(2, 4, 8, 8\)"),
        ({"prompt_embeds": (3, 5, 24)}, r"prompt_embeds: expected \(1 or 2,T,24\), got \(3, 5, 24\)"),
        ({"prompt_embeds": (2, 5, 25)}, r"prompt_embeds: expected \(1 or 2,T,24\), got \(2, 5, 25\)"),
        ({"pooled_prompt_embeds": (2, 23)}, r"pooled_prompt_embeds: expected \(1 or 2,24\), got \(2, 23\)"),
        ({"pooled_prompt_embeds": None}, "prompt_embeds and pooled_prompt_embeds: expected both or neither"),
        ({"prompt_embeds": None, "pooled_prompt_embeds": None}, "prompt_embeds: expected a tensor, got None"),
        ({"guidance_scale": 2.0}, "negative_prompt_embeds: expected a tensor, got None"),
        ({"guidance_scale": -1.0}, "guidance_scale: expected a number from 0 to 20.0, got -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: .* got nan"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number from 1 to 1000, got 0"),
        ({"num_inference_steps": 2.0}, "num_inference_steps: .* got 2.0"),
        ({"generator": -1}, "generator: .* got -1"),
    ],
)
def test_inputs_that_do_not_fit(folder, changes, message):
    inputs = {"latents": (2, 4, 8, 8), "prompt_embeds": (1, 5, 24), "pooled_prompt_embeds": (1, 24), **changes}
    inputs = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
    with pytest.raises(ValueError, match=message):
        LatentUpsampler.from_pretrained(folder)(**inputs)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (1, 8, 16, 12), r"sample: expected \(B,8,h,w\), h and w multiples of 8 and at least 16"),
        (0, (1, 8, 8, 16), "sample: .* at least 16"),
        (0, (1, 4, 16, 16), "sample: "),
        (1, (3,), r"timestep: expected a scalar or \(1,\), got \(3,\)"),
        (2, (2, 5, 24), r"encoder_hidden_states: expected \(1 or 1,T,24\)"),
        (3, (1, 151), r"timestep_cond: expected \(1 or 1,152\), got \(1, 151\)"),
    ],
)
def test_network_inputs_of_a_wrong_shape(folder, index, shape, message):
    inputs = [torch.zeros(1, 8, 16, 16), torch.tensor(0.3), torch.zeros(1, 5, 24), torch.zeros(1, 152)]
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        KUNet.from_pretrained(folder / "unet")(*inputs)


def test_every_key_that_does_not_fit_is_listed(folder):
    def spoil(tensors):
        del tensors["time_proj.weight"], tensors["up_blocks.0.attentions.1.attn1.to_q.bias"]
        tensors["mid_block.attentions.0.norm.weight"] = torch.zeros(1)
        tensors["down_blocks.1.attentions.0.attn2.norm_cross.weight"] = torch.zeros(25)

    edit_weights(folder / "unet" / WEIGHTS, spoil)
    assert_lists(
        lambda: LatentUpsampler.from_pretrained(folder),
        *("missing keys (2)", "time_proj.weight", "up_blocks.0.attentions.1.attn1.to_q.bias"),
        *("unknown keys (1)", "mid_block.attentions.0.norm.weight"),
        *("wrong shapes (1)", "attn2.norm_cross.weight: expected [24], got [25]"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 3}, r"missing keys .*down_blocks\.0\.resnets\.2\.conv1\.weight"),
        ({"act_fn": "silu"}, "act_fn='silu': expected 'gelu'"),
        ({"timestep_post_act": None}, "timestep_post_act=None: expected 'gelu'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type='UNetMidBlock2DCrossAttn': expected None"),
        ({"norm_num_groups": 32}, "norm_num_groups=32: expected None"),
        ({"time_embedding_type": "positional"}, "time_embedding_type='positional': expected 'fourier'"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos=False"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not known"),
        ({"attention_head_dim": 24}, "32 channels do not divide into heads 24 wide"),
        ({"attention_head_dim": [16, 16, 16, 16]}, "attention_head_dim="),
        ({"block_out_channels": [32, 64, 64, 64]}, "expected the last two stages and no other pair"),
        ({"block_out_channels": [32, 32, 64, 128]}, "expected the last two stages and no other pair"),
        ({"block_out_channels": [16, 16, 32, 32]}, "block_out_channels has 16"),
        ({"block_out_channels": [112, 112, 224, 224]}, "block_out_channels has 112"),
        ({"block_out_channels": [32, 64, 64]}, "down_block_types=.*expected 3 of KCrossAttnDownBlock2D"),
        ({"up_block_types": ["KUpBlock2D"] * 4}, "up_block_types=.*expected .*'KCrossAttnUpBlock2D'"),
        ({"time_cond_proj_dim": None}, "time_cond_proj_dim=None: expected 1 to 65536"),
        ({"time_embedding_dim": 63}, "time_embedding_dim=63: expected an even number"),
        ({"conv_in_kernel": 2}, "conv_in_kernel=2: expected an odd number"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000: expected 1 to 64"),
    ],
)
def test_a_network_config_that_contradicts_the_weights_or_is_not_supported(folder, changes, message):
    edit_json(folder / "unet" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        LatentUpsampler.from_pretrained(folder)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(KUNetConfig, diffusers.UNet2DConditionModel), (EulerConfig, diffusers.EulerDiscreteScheduler)],
)
def test_field_defaults_are_diffusers(ours, theirs):
    defaults = inspect.signature(theirs.__init__).parameters
    names = [field.name for field in fields(ours) if not field.name.endswith("block_types")]
    assert len(names) >= 6
    assert {f.name: f.default for f in fields(ours) if f.name in names} == {n: defaults[n].default for n in names}


@pytest.mark.parametrize("key", ["act_fn", "time_embedding_type", "timestep_post_act", "norm_num_groups"])
def test_a_key_left_out_means_diffusers_default_which_is_another_network(folder, key):
    edit_json(folder / "unet" / "config.json", lambda config: config.pop(key))
    with pytest.raises(CheckpointError, match=f"{key}="):
        KUNet.from_pretrained(folder / "unet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "scheduler: expected prediction_type 'sample', got 'epsilon'"),
        ({"interpolation_type": "cubic"}, "interpolation_type='cubic'"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even'"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        ({"_class_name": "DDIMScheduler"}, "_class_name='DDIMScheduler': expected 'EulerDiscreteScheduler'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
        ({"beta_end": 2.0}, "beta_end=2.0"),
        ({"beta_start": 1e-9}, "beta_start=1e-09"),
        ({"beta_end": 0.9}, "expected noise that grows with every timestep, got sigmas from .* that do not"),
    ],
)
def test_a_schedule_that_is_not_supported(folder, changes, message):
    edit_json(folder / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        LatentUpsampler.from_pretrained(folder)


def test_old_scheduler_files(folder):
    old = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
    values = {**SCHEDULE, **old, "prediction_type": "original_sample", "trained_betas": None}
    edit_json(folder / "scheduler" / "scheduler_config.json", **values)
    ours = LatentUpsampler.from_pretrained(folder).scheduler
    assert torch.equal(noise_levels(ours, 10), noise_levels(EulerDiscreteScheduler(SD_X2_SCHEDULE), 10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 10}, "unet: expected in_channels of twice the latents .* got 10 and 5"),
        ({"out_channels": 4}, "unet: expected in_channels .* got 8 and 4"),
        ({"time_cond_proj_dim": 128}, "unet: expected a time_cond_proj_dim over 128, got 128"),
    ],
)
def test_networks_that_are_no_upsampler_s(changes, message):
    config = KUNetConfig.from_dict({**dict(stock_k_unet().config), **changes})
    with torch.device("meta"):
        unet = KUNet(config)
    with pytest.raises(CheckpointError, match=message):
        LatentUpsampler(unet)


def test_parts_that_are_missing_or_do_not_fit(published):
    folder, _ = published
    edit_json(folder / "tokenizer" / "vocab.json", **{"!": 10})
    with pytest.raises(CheckpointError, match=r"tokenizer: expected token ids under .* vocab_size 10, got 10"):
        LatentUpsampler.from_pretrained(folder)
    stock_text(**{**TEXT, "hidden_size": 32, "vocab_size": 11}).save_pretrained(folder / "text_encoder")
    with pytest.raises(CheckpointError, match=r"empty prompt's prompt_embeds: expected \(1,T,24\), got \(1, 12, 32\)"):
        LatentUpsampler.from_pretrained(folder)
    prompt = PromptEmbeds(torch.zeros(1, 5, 24), torch.zeros(1, 25))._asdict()
    save_file(prompt, folder / "empty_prompt.safetensors")
    with pytest.raises(CheckpointError, match=r"pooled_prompt_embeds: expected \(1,24\), got \(1, 25\)"):
        LatentUpsampler.from_pretrained(folder)
    save_file({"prompt_embeds": prompt["prompt_embeds"]}, folder / "empty_prompt.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)empty_prompt.*missing keys \(1\).*pooled_prompt_embeds"):
        LatentUpsampler.from_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"scheduler_config\.json: no such file"):
        LatentUpsampler.from_pretrained(folder)
    with pytest.raises(CheckpointNotFoundError, match="scheduler: no such folder"):
        LatentUpsampler.from_pretrained(folder / "unet")
