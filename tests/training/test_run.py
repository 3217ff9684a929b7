"""Runs that also train the image encoder, end by the clock, or have a source of their own."""

import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training_runs import OPTIONS, command, losses

from gafext import MultiViewDiffusionPipeline
from gafext.cli import main
from gafext.errors import CheckpointError
from gafext.training.batches import Batch, Sampling, draw_batch
from gafext.training.checkpoints import Clock
from gafext.training.data import read_heads
from gafext.training.denoiser import Denoiser, diffuse, min_snr_weights
from gafext.training.latents import cache_key, encode_heads
from gafext.training.run import fit, start
from gafext.training.settings import Settings

ENCODED = {"size": 32, "degrees": 35.0}


@pytest.fixture(scope="module")
def with_encoder(files):
    """Folder of four steps that train the encoder too."""
    out = files / "encoder"
    assert main(command(files, out, "--steps", "4", "--encoder-rate", "1e-3")) == 0
    return out


def test_the_image_encoder_is_trained_too(files, with_encoder):
    before, after = (
        MultiViewDiffusionPipeline.from_pretrained(folder).image_encoder.state_dict()
        for folder in (files / "parent", with_encoder / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".mlp." in name for name in changed) and "vision_model.embeddings.class_embedding" in changed
    state = load_file(next(with_encoder.glob("checkpoint-*")) / "model.safetensors")
    assert {f"image_encoder.{name}" for name in changed} <= state.keys()


def test_a_run_with_the_encoder_resumes(files, with_encoder, capsys):
    out = files / "encoder_resumed"
    for steps in ("2", "4"):
        assert main(command(files, out, "--steps", steps, "--encoder-rate", "1e-3")) == 0
    assert losses(out) == losses(with_encoder) and len(losses(out)) == 4
    assert main(command(files, out, "--steps", "5")) == 1
    assert "expected encoder_rate 0.001, as before, got None" in capsys.readouterr().err


def test_the_encoders_rate_is_its_own_and_may_change(files, tmp_path):
    """Also where a run resumes, whose optimizer has the rate of before."""

    def moved(folder, before):
        ours, theirs = (
            MultiViewDiffusionPipeline.from_pretrained(f / name).image_encoder.state_dict()
            for f, name in ((folder, "model"), before)
        )
        return max((ours[name] - theirs[name]).abs().max().item() for name in ours)

    options = ("--ema", "0", "--validation", "0")
    assert main(command(files, tmp_path, "--steps", "2", "--encoder-rate", "1e-3", *options)) == 0
    # Adam's first step is of the rate's size; before it the new layers have no effect, and the encoder no gradient.
    assert 5e-4 < moved(tmp_path, (files, "parent")) < 2e-3
    shutil.copytree(tmp_path / "model", tmp_path / "first")
    assert main(command(files, tmp_path, "--steps", "3", "--encoder-rate", "1e-9", *options)) == 0
    assert moved(tmp_path, (tmp_path, "first")) < 1e-7


def test_portraits_are_kept_for_an_encoder_that_is_trained(files, tmp_path):
    pipe = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")
    heads, _ = read_heads(files / "data")
    assert cache_key(heads, pipe, **ENCODED) != cache_key(heads, pipe, **ENCODED, pixels=True)
    with torch.no_grad():
        config, text = pipe.solver.config, pipe.prompt_embeds
        options = {"sampling": Sampling(batch=2, views=2), "seed": 0, "timesteps": config.num_train_timesteps}
        features, portraits = (
            draw_batch(encode_heads(heads, pipe, tmp_path / name, **ENCODED, pixels=name == "b"), 3, **options)
            for name in "ab"
        )
        assert features.portraits is None and portraits.features is None
        plain = Denoiser(pipe.unet, config, prompt_embeds=text, gamma=5.0)
        loss = plain(features)
        both = Denoiser(pipe.unet, config, prompt_embeds=text, gamma=5.0, image_encoder=pipe.image_encoder)
        assert torch.equal(both(portraits), loss)
        ones = torch.ones_like(features.latents[:, :, :1])
        assert torch.equal(plain(replace(features, weights=ones)), loss)
        assert plain(replace(features, weights=3 * ones)) == pytest.approx(3 * loss.item())
        ones[:, :, :, : ones.shape[3] // 2] = 0
        assert 0 < plain(replace(features, weights=ones)) < loss


def test_wsd_falls_in_the_last_part_of_the_run():
    settings = Settings(rate=1.0, warmup=4, steps=100, schedule="wsd")
    assert [settings.rate_at(step) for step in (0, 3, 4, 70, 85, 100)] == pytest.approx([0.25, 1, 1, 1, 0.5, 0.01])
    assert settings.rate_at(20, passed=0.85) == pytest.approx(0.5)  # by the clock, if that is sooner
    assert replace(settings, schedule="cosine").rate_at(20, passed=0.5) == pytest.approx(0.5)
    assert replace(settings, schedule="constant").rate_at(20, passed=0.9) == 1


def test_an_infinite_gamma_weighs_all_noise_levels_alike():
    alphas = torch.tensor([0.0, 0.5, 0.99, 1.0])
    for kind in ("epsilon", "v_prediction"):
        assert min_snr_weights(alphas, kind, math.inf).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_what_is_predicted_gives_the_latents_back(kind):
    clean, noise, alphas = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    noised, target = diffuse(clean, noise, alphas, kind)
    signal, level = (x.view(3, 1, 1, 1) for x in (alphas.sqrt(), (1 - alphas).sqrt()))
    found = {"epsilon": (noised - level * target) / signal, "v_prediction": signal * noised - level * target}
    assert torch.allclose(found.get(kind, target), clean, atol=1e-5)


def test_the_clock_counts_all_sittings():
    first, second = Clock(), Clock()
    with first:
        assert first.seconds > 0
    stopped = first.seconds
    second.load_state_dict(first.state_dict())
    assert second.seconds == stopped == first.seconds
    with second:
        assert second.seconds > stopped


def test_what_lies_in_the_place_of_the_result_stays(files, tmp_path, capsys):
    shutil.copytree(files / "parent", tmp_path / "model" / "parent")
    inside = ["train", str(files / "data"), "--parent", str(tmp_path / "model" / "parent"), "--out", str(tmp_path)]
    assert main([*inside, *OPTIONS, "--steps", "1"]) == 1
    assert "parent: expected another folder than the result's" in capsys.readouterr().err
    assert main(command(files, tmp_path, "--steps", "1")) == 1
    assert "expected nothing but files that gafext wrote" in capsys.readouterr().err
    assert (tmp_path / "model" / "parent" / "model_index.json").is_file() and not (tmp_path / "log.jsonl").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model").touch()
    assert main(command(files, tmp_path / "other", "--steps", "1")) == 1
    assert "model: expected a folder, got a file" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_kept(files, tmp_path, capsys):
    options = ("--rate", "1e38", "--warmup", "0", "--validation", "0", "--save-every", "1")
    assert main(command(files, tmp_path, "--steps", "1", *options)) == 1
    assert "the weights are not finite at step 1: lower --rate" in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("checkpoint-*"))


def test_what_a_run_leaves(files, tmp_path, monkeypatch, capsys):
    clipped, clip = [], Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: clipped.append(args[2]) or clip(*args))
    options = ("--train", "lora", "--rank", "2", "--validation", "0", "--save-every", "1")
    assert main(command(files, tmp_path, "--steps", "2", "--guidance", "3.5", *options)) == 0
    assert clipped == [1.0, 1.0]
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["guidance_scale"] == 3.5
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert main(command(files, tmp_path, "--steps", "3", *options, "--rank", "4")) == 1
    assert "expected rank 2, as before, got 4" in capsys.readouterr().err


def test_batches_are_of_all_heads(files, tmp_path):
    pipe = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")
    encoded = encode_heads(read_heads(files / "data")[0], pipe, tmp_path / "encoded", **ENCODED)
    batches = [draw_batch(encoded, step, Sampling(batch=2, views=2), seed=0, timesteps=1000) for step in range(8)]
    assert len({each.latents[row].sum().item() for each in batches for row in range(2)}) > 6  # of 3 heads by 6 pairs


def test_encoded_data_is_of_its_files_and_networks(files, tmp_path):
    shutil.copytree(files / "data", tmp_path / "data")
    pipe = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")

    def key():
        return cache_key(read_heads(tmp_path / "data")[0], pipe, **ENCODED)

    keys = [key(), key()]
    picture = next((tmp_path / "data").rglob("*.png"))
    os.utime(picture, (1, 1))
    keys.append(key())
    for network in (pipe.vae, pipe.image_encoder):
        next(network.parameters()).data[0] += 1
        keys.append(key())
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_minutes_are_those_of_all_sittings(files, capsys):
    out = files / "timed"
    assert main(command(files, out, "--steps", "1000000", "--minutes", "0.01")) == 0
    assert "/1000000 " not in capsys.readouterr().err  # the bar is of the steps that its pace promises
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    taken = [line for line in lines if "loss" in line]
    assert taken[-1]["seconds"] >= 0.5 or len(taken) == 1
    assert main(command(files, out, "--steps", "1000000", "--minutes", "0.01")) == 0  # over: no step more
    assert len(losses(out)) == len(taken)


def test_rates_fall_by_the_clock(files, monkeypatch):
    passed = []
    monkeypatch.setattr(Clock, "seconds", property(lambda clock: 60 * 0.85 * 2.0 + 1e-3 * len(passed)))
    monkeypatch.setattr(Settings, "rate_at", lambda settings, step, passed_=0.0: passed.append(passed_) or 1e-4)
    options = ("--steps", "2", "--minutes", "2", "--schedule", "wsd", "--validation", "0")
    assert main(command(files, files / "clock", *options)) == 0
    assert passed == pytest.approx([0.85, 0.85], abs=1e-4)


def test_a_run_killed_before_its_first_checkpoint_begins_its_log_anew(files, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    assert main(command(files, tmp_path, "--steps", "1", "--validation", "0")) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] and lines[0]["loss"] < 9


class Drawn:
    """Source of one batch, which it notes the numbers of."""

    def __init__(self, batch, held_out="nobody"):
        self.batch, self.asked, self.measured = batch, [], 0
        self.described = {"data": "drawn", "held_out": [held_out]}

    def batches(self, numbers, *, process, processes):
        for number in numbers:
            self.asked.append(number)
            yield self.batch.part(process, processes)

    def validate(self, pipeline, folder):
        self.measured += 1
        assert not pipeline.unet.training
        return {"own": 1.5}, []


def test_heads_that_do_not_divide_among_processes_are_named():
    rows = torch.zeros(3, 2)
    batch = Batch(latents=rows, pose=rows, features=rows, noise=rows, timesteps=rows, sees=rows)
    assert len(batch.part(2, 3).latents) == 1
    with pytest.raises(ValueError, match="batch: expected a multiple of the 2 processes, got 3"):
        batch.part(0, 2)


def test_a_source_of_ones_own(files, tmp_path):
    pipe = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")
    encoded = encode_heads(read_heads(files / "data")[0], pipe, tmp_path / "encoded", **ENCODED)
    batch = draw_batch(encoded, 0, Sampling(batch=2, views=2), seed=0, timesteps=1000)
    source, out = Drawn(batch), tmp_path / "out"
    settings = Settings(steps=4, accumulate=2, validate_every=2, save_every=3, cpu=True, warmup=1, rate=1e-2)
    accelerator = start(out, settings)
    assert fit(accelerator, pipe, source, out, parent="p", settings=settings) == {"own": 1.5}
    assert source.asked == list(range(8)) and source.measured == 2
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["own"] for line in lines if "own" in line] == [1.5, 1.5]
    assert lines[-2]["loss"] < lines[0]["loss"]  # one batch is soon known
    assert "own 1.5" in (out / "model" / "README.md").read_text()
    other = Drawn(batch, held_out="somebody")
    again = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")
    with pytest.raises(CheckpointError, match="expected held_out"):
        fit(start(out, settings), again, other, out, parent="p", settings=settings)
