"""Damaged and absurd checkpoint files: each ends in an error that names it, or does no harm."""

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from damage import damaged_json, damaged_safetensors
from helpers import edit_json
from small_checkpoints import NARROW, stock_clip, stock_unet, stock_vae

from gafext import weights
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.schedulers import scheduler_from_pretrained
from gafext.weights import files


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """One small folder of each kind, with what loads it."""
    root = tmp_path_factory.mktemp("parts")
    stock_unet(**NARROW).save_pretrained(root / "unet")
    stock_unet(**NARROW).save_pretrained(root / "shards", max_shard_size="40KB")
    stock_vae().save_pretrained(root / "vae")
    stock_clip().save_pretrained(root / "clip")
    diffusers.DDIMScheduler().save_pretrained(root / "ddim")
    diffusers.DPMSolverMultistepScheduler().save_pretrained(root / "dpm")
    diffusers.EulerDiscreteScheduler(trained_betas=[0.001] * 9, num_train_timesteps=9).save_pretrained(root / "euler")
    loaders = {"unet": MultiViewUNet, "shards": MultiViewUNet, "vae": AutoencoderKL, "clip": CLIPVisionEncoder}
    return root, {name: network.from_pretrained for name, network in loaders.items()}


def damage(root, seed):
    """A copy of one file, damaged in place; returns its path and its old bytes."""
    rng = random.Random(seed)
    part = rng.choice(sorted(root.iterdir()))
    path = rng.choice(sorted(part.iterdir()))
    before = path.read_bytes()
    path.write_bytes((damaged_json if path.suffix == ".json" else damaged_safetensors)(before, rng))
    return path, before


@pytest.fixture
def limits():
    """An alarm for hangs and a limit on memory for huge allocations; both raise what is no ValueError."""
    resource = pytest.importorskip("resource")
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    def hang(*_):
        raise TimeoutError("hangs")

    old, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, old[1]))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.skipif(sys.platform != "linux", reason="limits")
@pytest.mark.parametrize("batch", range(6))
def test_damaged_files(parts, limits, batch):
    """A damaged file loads, because the damage does no harm, or is named by an error: nothing else may happen."""
    root, loaders = parts
    errors = 0
    for seed in range(100 * batch, 100 * batch + 50):
        path, before = damage(root, seed)
        signal.alarm(10)
        try:
            result = loaders.get(path.parent.name, scheduler_from_pretrained)(path.parent)
        except ValueError as error:
            errors += 1
            assert str(path.parent) in str(error), (seed, str(error)[:300])
            assert len(str(error).encode()) < 20_000, seed  # can be printed
        else:
            values = result.state_dict().values() if isinstance(result, torch.nn.Module) else [result.alphas_cumprod]
            assert all(not value.is_meta and value.isfinite().all() for value in values), seed
        finally:
            path.write_bytes(before)
    assert 30 <= errors < 50


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vae", {"layers_per_block": 4096}, r"json: cannot build AutoencoderKL \(asks for far more than the \d+"),
        ("clip", {"num_hidden_layers": 65536}, r"config\.json: cannot build CLIPVisionEncoder \(asks for far more"),
        ("unet", {"layers_per_block": 4096}, r"layers_per_block=4096: expected 1 to|cannot build MultiViewUNet"),
        ("vae", {"block_out_channels": [8] * 10**6}, r"block_out_channels=\(8, 8, .*: expected tuple\[int"),
        ("vae", {"norm_num_groups": True}, "norm_num_groups=True: expected"),
        ("unet", {"downsample_padding": True}, r"downsample_padding=True: expected one of \[1\]"),
        ("vae", {"scaling_factor": float("inf")}, "scaling_factor=inf: expected"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor=nan: expected"),
        ("unet", {"norm_eps": -1.0}, r"norm_eps=-1\.0: expected over 0 and below 1"),
        ("clip", {"layer_norm_eps": 0}, r"layer_norm_eps=0: expected over 0 and below 1"),
        ("unet", {"cross_attention_dim": 10**30}, "cross_attention_dim=1000000000000000000000000000000: expected"),
    ],
)
def test_absurd_configurations_are_refused_at_once(parts, tmp_path, part, changes, message):
    root, loaders = parts
    folder = shutil.copytree(root / part, tmp_path / part)
    edit_json(folder / "config.json", **changes)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        loaders[part](folder)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "repeated key 'a'"),
        ('{"a": {"b": 1, "b": 1}}', "repeated key 'b'"),
        ('{"\\ud800": 1}', r"damaged key '\\ud800'"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not readable as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("\xff", "not readable as JSON"),
        (" " * (files.MAX_JSON_BYTES + 1), "expected at most"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message) as caught:
        weights.read_json(path)
    assert str(path) in str(caught.value)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    """As of a hub's cache without its blobs."""
    stock_vae().save_pretrained(tmp_path)
    [weights] = tmp_path.glob("*.safetensors")
    weights.unlink()
    weights.symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(CheckpointNotFoundError, match=r"a link that leads nowhere \(safetensors files there: none"):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        weights.read_json(tmp_path / "config.json")
