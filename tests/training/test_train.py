"""`gafext train` at a tiny size: it learns, resumes, agrees over processes, and keeps what it should not touch."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from helpers import ROOT, edit_json
from pages import blocks
from safetensors.torch import load_file
from small_checkpoints import (
    SIZE,
    run,
    save_checkpoint,
    save_imagedream,
    stock_unet,
)
from tensorboard.backend.event_processing import event_accumulator
from training_runs import ENVIRONMENT, LAUNCH, OPTIONS, command, losses, write_heads

from gafext import MultiViewDiffusionPipeline
from gafext.assets import MODEL
from gafext.cameras import Cameras
from gafext.cli import main
from gafext.errors import CheckpointError
from gafext.families import family_of
from gafext.images import to_square_tensor
from gafext.models.blocks import ResnetBlock2D
from gafext.predictor import Predictor
from gafext.schedulers.schedule import alphas_cumprod
from gafext.training.batches import Batch
from gafext.training.checkpoints import Average
from gafext.training.data import read_heads
from gafext.training.denoiser import Denoiser, min_snr_weights
from gafext.training.latents import cache_key, encode_head, encode_heads
from gafext.training.settings import Settings
from gafext.training.train import check_parent


@pytest.fixture(scope="module")
def whole(files):
    """Folder of eight steps at once."""
    assert main(command(files, files / "whole", "--steps", "8")) == 0
    return files / "whole"


def test_a_resumed_run_has_the_same_losses_and_weights(files, whole):
    out = files / "resumed"
    assert main(command(files, out, "--steps", "2", "--save-every", "2")) == 0
    with (out / "log.jsonl").open("a") as log:  # the step that a killed run took after its checkpoint
        log.write('{"step": 3, "loss": 0.0}\n')
    assert main(command(files, out, "--steps", "8")) == 0
    assert losses(out) == losses(whole) and len(losses(out)) == 8
    ours, theirs = (MultiViewDiffusionPipeline.from_pretrained(f / "model").unet.state_dict() for f in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_agree_with_one_even_if_one_is_killed(files, whole):
    """The run of a killed process ends with an error that names it; the next one resumes."""
    out = files / "two"
    options = {"env": ENVIRONMENT, "cwd": ROOT, "text": True, "stderr": subprocess.PIPE}

    def words(*options):
        return [*LAUNCH, "-m", "gafext", *command(files, out, "--save-every", "2", *options)]

    with subprocess.Popen(words("--steps", "100000"), start_new_session=True, **options) as killed:
        try:
            while not (out / "checkpoint-00000002").is_dir():
                assert killed.poll() is None, killed.stderr.read()
                time.sleep(0.02)
            ranks = {child.environ()["RANK"]: child for child in psutil.Process(killed.pid).children()}
            ranks["1"].kill()
            _, errors = killed.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(killed.pid, signal.SIGKILL)
    assert killed.returncode == 1 and "Signal 9 (SIGKILL)" in errors
    subprocess.run(words("--steps", "8"), check=True, **options)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


def test_low_rank_updates_on_two_processes(files):
    """Where there is no text, some of them get no gradient, which DistributedDataParallel has to expect."""
    out = files / "lora_on_two"
    words = command(files, out, "--train", "lora", "--rank", "2", "--steps", "3", "--validation", "0")
    subprocess.run([*LAUNCH, "-m", "gafext", *words], env=ENVIRONMENT, cwd=ROOT, check=True)
    assert len(losses(out)) == 3


def test_checkpointing_and_the_cache_change_no_loss(files, whole):
    out, cache = files / "recomputed", whole / "cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert main(command(files, out, "--steps", "3", "--checkpointing", "--cache", str(cache))) == 0
    assert losses(out) == pytest.approx(losses(whole)[:3], rel=1e-6)
    assert before and {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before


def test_checkpointing_computes_the_blocks_again(files, monkeypatch):
    calls, forward = [], ResnetBlock2D.forward
    monkeypatch.setattr(
        ResnetBlock2D, "forward", lambda *inputs, **options: calls.append(1) or forward(*inputs, **options)
    )
    counts = []
    for options in ((), ("--checkpointing",)):
        calls.clear()
        out = files / f"counted{len(options)}"
        assert main(command(files, out, "--steps", "1", "--validation-steps", "1", *options)) == 0
        counts.append(len(calls))
    assert counts[1] > counts[0]


def test_the_average_follows_its_decay():
    network = torch.nn.Linear(1, 1, bias=False)
    average, expected = Average(network, 0.3), network.weight.item()
    for step in range(1, 9):
        torch.nn.init.constant_(network.weight, float(step))
        average.update(network)
        decay = min(0.3, (1 + step) / (10 + step))  # grows up to it from the fourth step on
        expected = decay * expected + (1 - decay) * step
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_the_published_weights_are_the_averaged_ones(files, whole):
    """Without averaging they are the last step's; the losses are the same either way, and others with another seed."""
    out = files / "last"
    assert main(command(files, out, "--steps", "8", "--ema", "0")) == 0 and losses(out) == losses(whole)

    def differs(folder):
        state = load_file(sorted(folder.glob("checkpoint-*"))[-1] / "model.safetensors")
        ours = MultiViewDiffusionPipeline.from_pretrained(folder / "model").unet.state_dict()
        return any(not torch.equal(ours[name], state[f"unet.{name}"]) for name in ours)

    assert differs(whole) and not differs(out)
    assert main(command(files, files / "seed", "--steps", "1", "--seed", "1", "--validation-steps", "1")) == 0
    assert losses(files / "seed") != losses(whole)[:1]


def test_bfloat16_is_near_float32(files, whole):
    """In a process of its own: Accelerate has one precision per process."""
    out = files / "bfloat16"
    words = [sys.executable, "-m", "gafext", *command(files, out, "--steps", "1", "--precision", "bf16")]
    subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )  # Accelerate has one precision a process
    assert losses(out)[0] != losses(whole)[0] and losses(out)[0] == pytest.approx(losses(whole)[0], rel=1e-2)


def test_new_leaves_the_parents_weights_as_they_are(files, whole):
    parent, child = (MultiViewDiffusionPipeline.from_pretrained(f) for f in (files / "parent", whole / "model"))
    before, after = parent.unet.state_dict(), child.unet.state_dict()
    stock = stock_unet().state_dict().keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed & stock == {"conv_in.weight"} and any(".attn_cv." in name for name in changed)
    assert torch.equal(before["conv_in.weight"][:, :4], after["conv_in.weight"][:, :4])
    assert len(run(child).images) == 4 and (whole / "model" / "README.md").is_file()
    assert len(list((whole / "validation").glob("*.png"))) == 1


def test_lora_adds_a_low_rank_to_the_parents_attention(files):
    out = files / "lora"
    options = ("--steps", "3", "--train", "lora", "--rank", "2", "--validate-every", "2", "--schedule", "cosine")
    assert main(command(files, out, *options)) == 0
    parent, child = (MultiViewDiffusionPipeline.from_pretrained(f) for f in (files / "parent", out / "model"))
    before, after = parent.unet.state_dict(), child.unet.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])} & stock_unet().state_dict().keys()
    adapted = {name for name in before if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.weight", name)}
    # Without text, attn2 has nothing to attend to: its keys and values get no gradient.
    attn1 = {name for name in adapted if ".attn1." in name}
    assert {"conv_in.weight"} | attn1 <= changed <= {"conv_in.weight"} | adapted
    for name in adapted:
        assert torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-3) <= 2
    lines = list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))
    assert [(line["step"], "psnr" in line) for line in lines] == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    events = event_accumulator.EventAccumulator(str(next((out / "tensorboard").iterdir()).parent))
    events.Reload()
    assert len(events.Scalars("loss")) == 3 and [event.step for event in events.Scalars("psnr")] == [2, 3]
    assert len(events.Images("held out 0")) == 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gaf", "imagedream"])
def test_a_step_predicts_as_the_pipeline_does(kind, files, tmp_path):
    """The loss is zero where the noise is what the pipeline predicts, of a head's portrait, cameras and normals."""
    if kind == "gaf":
        save_checkpoint(tmp_path)
    else:
        save_imagedream(tmp_path)
    pipe = MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    pipe.unet.train()
    head = read_heads(files / "data")[0][0]
    size = SIZE * pipe.vae.config.factor
    encoded = encode_head(head, pipe, size=size, degrees=1.0)
    cameras = Cameras(head.cameras.w2c, intrinsics=head.cameras.intrinsics(1), size=1)
    noised, normals = torch.randn(4, 4, SIZE, SIZE), [head.normal_map(view) for view in range(4)]
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "latents": noised, "upsample": "none", "crop": False}
    portrait = head.picture(0, family_of(pipe.unet.config).background)
    run = pipe.prepare(portrait, cameras, normals if kind == "gaf" else None, **options)
    timestep = int(run.timesteps[1])
    predicted = Predictor(pipe.unet, run)(noised, timestep)
    alpha = alphas_cumprod(pipe.solver.config)[timestep]
    batch = Batch(
        latents=((noised - (1 - alpha).sqrt() * predicted) / alpha.sqrt())[None],
        pose=encoded["pose"][None],
        features=encoded["features"][:1],
        noise=predicted[None],
        timesteps=torch.full((1, 4), timestep),
        sees=torch.ones(1, 4),
        normals=encoded["normals"][None] if kind == "gaf" else None,
        reference=encoded["reference"][:1] if kind == "imagedream" else None,
    )
    with Denoiser(pipe.unet, pipe.solver.config, prompt_embeds=pipe.prompt_embeds, gamma=5.0) as denoiser:
        assert predicted.square().mean() > 1e-3 and denoiser(batch) < 1e-9
        assert denoiser(replace(batch, sees=torch.zeros(1, 4))) > 1e-6  # the portrait matters


@torch.no_grad()
def test_imagedreams_heads_are_before_its_grey(files, tmp_path):
    save_imagedream(tmp_path)
    pipe = MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    head = read_heads(files / "data")[0][0]
    encoded = encode_head(head, pipe, size=32, degrees=1.0)
    grey = [head.picture(view, (127, 127, 127)) for view in range(4)]
    assert grey[0].getpixel((0, 0)) == (127, 127, 127)
    assert torch.equal(encoded["latents"], pipe.encode(to_square_tensor(grey, 32)))
    assert torch.equal(encoded["reference"], pipe.encode(to_square_tensor(grey[:1], 32)))


def test_parents_that_are_not_trainable_are_named(tmp_path):
    save_checkpoint(tmp_path, multi_view=False)
    pipe = MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    pipe.unet.config = replace(pipe.unet.config, family="mv_adapter")
    with pytest.raises(CheckpointError, match=r"got another .mv_adapter.*; MV-Adapter, FaceLift .* not trainable"):
        check_parent(pipe, "all")


def test_a_run_warns_of_cameras_that_do_not_frame_the_neutral_head(files, tmp_path):
    write_heads(tmp_path / "data", 2, views=3, size=32, normals=False)
    shutil.copytree(files / "parent", tmp_path / "parent")
    for path in (tmp_path / "data").rglob("transforms_train.json"):
        values = json.loads(path.read_text())
        for frame in values["frames"]:
            for row in frame["transform_matrix"][:3]:
                row[3] *= 0.15
        path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="heads without normals/ that get the neutral head's, .* 2 of 2"):
        assert main(command(tmp_path, tmp_path / "out", "--steps", "1")) == 0


def test_low_rank_updates_of_imagedream(files, tmp_path, capsys):
    save_imagedream(tmp_path / "parent")
    words = [
        "train",
        str(files / "data"),
        "--parent",
        str(tmp_path / "parent"),
        "--out",
        str(tmp_path / "out"),
        *OPTIONS,
    ]
    assert main([*words, "--steps", "2"]) == 1
    assert "expected lora or all" in capsys.readouterr().err
    assert main([*words, "--steps", "2", "--train", "lora", "--rank", "2"]) == 0
    parent, child = (MultiViewDiffusionPipeline.from_pretrained(tmp_path / f) for f in ("parent", "out/model"))
    before, after = parent.unet.state_dict(), child.unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".attn1.to_q." in name for name in changed) and any("image_projection." in name for name in changed)
    assert not any(".resnets." in name or name.startswith("conv_") for name in changed)


def test_the_loss_falls_on_one_head(files):
    out = files / "fit"
    options = ("--steps", "60", "--train", "all", "--validation", "2", "--rate", "2e-3", "--near", "0")
    assert main(command(files, out, *options)) == 0
    found = losses(out)
    assert sum(found[-15:]) < 0.7 * sum(found[:15])


def test_rate_and_weights():
    settings = Settings(rate=1.0, warmup=4, steps=14, schedule="cosine")
    assert [settings.rate_at(step) for step in (0, 3, 4, 9, 14)] == pytest.approx([0.25, 1, 1, 0.5, 0])
    alphas = torch.tensor([0.0, 0.5, 0.99, 1.0])  # SNR 0, 1, 99, infinite
    assert min_snr_weights(alphas, "v_prediction", 5.0).tolist() == pytest.approx([1, 1, 0.05, 0], abs=1e-6)
    assert min_snr_weights(alphas, "epsilon", 5.0).tolist() == pytest.approx([1, 1, 5 / 99, 0], abs=1e-6)
    assert min_snr_weights(alphas, "sample", 5.0).tolist() == pytest.approx([0, 1, 5, 5], abs=1e-6)


def test_bad_arguments_are_named(files, whole, tmp_path, capsys):
    for options, message in {
        ("--validation", "3"): "data: expected more than the 3 heads held out, got 3",
        ("--near", "2"): "--near: expected a fraction, 0 to 1, got 2.0",
        ("--rate", "nan"): "--rate: expected a number over 0, got nan",
        ("--seed", "-1"): "--seed: expected 0 to 2147483647, got -1",
        ("--validation-steps", "1001"): "--validation-steps: expected 0 to 1000, got 1001",
        ("--adam-8bit",): "adam_8bit: expected bitsandbytes, which is not installed",
    }.items():
        assert main(command(files, tmp_path / "out", *options)) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command(files, whole, "--train", "all")) == 1
    assert "expected train new, as before, got all" in capsys.readouterr().err
    options = ("--parent", str(whole / "model"), "--out", str(tmp_path / "other"), "--steps", "1")
    shutil.copytree(sorted(whole.glob("checkpoint-*"))[-1], tmp_path / "other" / "checkpoint-00000001")
    assert main(command(files, whole, *options)) == 1
    assert "expected parent" in capsys.readouterr().err
    assert main(command(files, whole, "--parent", str(whole / "model"))) == 1
    assert "parent: expected another folder than the result's" in capsys.readouterr().err


def test_processes_share_the_encoding(files, tmp_path):
    pipe = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")
    heads, _ = read_heads(files / "data")
    encode_heads(heads, pipe, tmp_path, size=32, degrees=35.0, every=slice(1, None, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["000001.safetensors"]
    written = (tmp_path / "000001.safetensors").stat().st_mtime_ns
    assert len(encode_heads(heads, pipe, tmp_path, size=32, degrees=35.0)) == 3
    assert (tmp_path / "000001.safetensors").stat().st_mtime_ns == written and len(list(tmp_path.iterdir())) == 3


def test_a_cache_is_of_one_kind_of_parent(files, whole):
    """Another number of pose numbers is another encoding of the same pictures by the same networks."""
    pipe = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")
    heads, _ = read_heads(files / "data")
    options = {"size": 32, "degrees": 35.0}
    before = cache_key(heads, pipe, **options)
    assert before == cache_key(heads, pipe, **options) != cache_key(heads[:2], pipe, **options)
    pipe.unet.config = replace(pipe.unet.config, projection_class_embeddings_input_dim=16)
    assert cache_key(heads, pipe, **options) != before


def test_the_pages_commands(tmp_path):
    """At a tiny size: 3 heads, two steps."""
    [block] = [block for block in blocks("bash", pages=[ROOT / "docs" / "train.md"]) if block.comment == "train"]
    small = {"--heads 128": "--heads 3", "--views 8": "--views 4", "--size 64": "--size 32", "--steps 600": "--steps 2"}
    small |= {"--validation 4": "--validation 1 --validation-steps 2", "--heads 6 --ablations": "--heads 1 --steps 2"}
    code = block.code
    for whole, part in small.items():
        assert whole in code
        code = code.replace(whole, part)
    code = code.replace("examples/", f"{ROOT}/examples/").replace("gafext ", "python -m gafext ")
    code = code.replace("python ", f"{shlex.quote(sys.executable)} ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True, cwd=tmp_path, env=environment)
    lines = {line["name"]: line["psnr"] for line in json.loads((tmp_path / "trained.json").read_text())["lines"]}
    assert lines["generated"] > 0 and (tmp_path / "trained" / "model" / "model_index.json").is_file()


def test_a_fitter_of_drawn_heads_is_not_handed_on(files, tmp_path):
    """What is trained without normal maps sees the neutral head's, and so does what is published."""
    shutil.copytree(files / "parent", tmp_path / "parent")
    shutil.copytree(MODEL / "head_fitter", tmp_path / "parent" / "head_fitter")
    edit_json(tmp_path / "parent" / "model_index.json", head_fitter=["gafext", "HeadFitter"])
    assert MultiViewDiffusionPipeline.from_pretrained(tmp_path / "parent").head_fitter is not None
    options = ["--parent", str(tmp_path / "parent"), "--steps", "1"]
    assert main(command(files, tmp_path / "out", *options)) == 0
    assert MultiViewDiffusionPipeline.from_pretrained(tmp_path / "out" / "model").head_fitter is None
