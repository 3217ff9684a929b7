"""The estimate of a run's memory: against measured peaks, and what a run that does not fit is told."""

import json
import warnings

import pytest
import torch
from helpers import ROOT
from small_checkpoints import SIZE, portrait

from gafext import MultiViewDiffusionPipeline
from gafext.checkpoints.estimate import Workload, activation_bytes, free_bytes
from gafext.config import SD21_MULTIVIEW_UNET, SD_VAE, SD_X2_UNET
from gafext.models.unet import MultiViewUNet

PARTS = {"unet": "denoise", "upsampler": "upsample", "decoder": "decode"}
PEAKS = json.loads((ROOT / "benchmarks/results/memory-cpu-amd-epyc-avx2-2-cores.json").read_text())["peaks"]
SD21 = {"unet": SD21_MULTIVIEW_UNET, "vae": SD_VAE, "upsampler": SD_X2_UNET}


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: f"{peak['part']} {peak['rows']} {peak['size']}")
def test_the_estimate_is_that_of_the_measured_peaks(peak):
    rows, size = peak["rows"], peak["size"]
    work = Workload(
        rows, 1, size, decoded_size=size, decoded_rows=rows, itemsize=getattr(torch, peak["dtype"]).itemsize
    )
    estimated = activation_bytes(work, **SD21)[PARTS[peak["part"]]]
    assert estimated == pytest.approx(peak["bytes"], rel=0.3)


def test_the_largest_runs_fit_into_16_gib_beside_the_weights():
    for views, size, doubled in ((32, 32, False), (4, 64, True)):
        work = Workload(views, 2, size, decoded_size=size * (1 + doubled))
        assert max(activation_bytes(work, **SD21).values()) < 5 * 2**30  # the weights are 9 to 10
    assert max(activation_bytes(Workload(4, 2, 32, decoded_size=64), **SD21).values()) < 3e9


def test_tiles_and_slices_need_less():
    whole = Workload(4, 2, 64, decoded_size=128)
    decode = {
        "whole": activation_bytes(whole, **SD21)["decode"],
        "tiles": activation_bytes(Workload(4, 2, 64, decoded_size=128, tile=64), **SD21)["decode"],
        "all": activation_bytes(Workload(4, 2, 64, decoded_size=128, decoded_rows=4), **SD21)["decode"],
        "half": activation_bytes(Workload(4, 2, 64, decoded_size=128, itemsize=2), **SD21)["decode"],
    }
    assert decode["half"] < 0.6 * decode["whole"] and 3 * decode["whole"] < decode["all"]
    assert decode["tiles"] < 0.3 * decode["whole"]


@pytest.fixture
def pipe(checkpoint):
    return MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")


def prepare(pipe, **options):
    return pipe.prepare(portrait(0), num_inference_steps=2, guidance_scale=2.0, **options)


def test_a_run_that_does_not_fit_is_refused_with_what_would(pipe, monkeypatch):
    monkeypatch.setattr("gafext.checkpoints.memory.free_bytes", lambda device: 60e6)
    words = r"memory: the run needs about 0\.\d GB, 0\.\d are free on cpu: --dtype bfloat16"
    with pytest.raises(ValueError, match=words):
        prepare(pipe)
    monkeypatch.setattr("gafext.checkpoints.memory.free_bytes", lambda device: 1e6)
    with pytest.raises(ValueError, match="use a larger machine"):
        prepare(pipe)
    monkeypatch.setattr("gafext.checkpoints.memory.free_bytes", lambda device: 100e6)
    with pytest.warns(UserWarning, match="memory: the run needs about 0.1 GB"):
        prepare(pipe)


@pytest.fixture
def room_for_8(pipe, monkeypatch):
    """As much free memory as a run of 8 views needs, without what is small."""
    monkeypatch.setattr("gafext.checkpoints.estimate.WORKSPACE", 0)
    work = Workload(8, 2, SIZE, decoded_size=2 * SIZE)
    found = max(activation_bytes(work, unet=pipe.unet.config, vae=pipe.vae.config).values())
    monkeypatch.setattr("gafext.checkpoints.memory.free_bytes", lambda device: 1.01 * found)


def test_fewer_views_are_named_where_they_help(pipe, room_for_8):
    with pytest.raises(ValueError, match="--views 8"):
        prepare(pipe, num_views=64)
    prepare(pipe, num_views=8)


def test_offloading_is_named_on_an_accelerator(pipe, room_for_8, monkeypatch):
    """The device is a stand-in: nothing is computed before the check."""
    monkeypatch.setattr(MultiViewUNet, "device", torch.device("meta"))
    with pytest.raises(ValueError, match="free on meta: --offload sequential"):
        prepare(pipe, num_views=8)


def test_a_run_that_fits_or_cannot_be_judged_is_not_disturbed(pipe, monkeypatch):
    for free in (1e12, None):
        monkeypatch.setattr("gafext.checkpoints.memory.free_bytes", lambda device, free=free: free)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="memory:")
            prepare(pipe)


def test_free_memory_is_known_on_linux_and_not_on_a_device_without_a_count():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
    assert free_bytes(torch.device("meta")) is None


def test_a_containers_limit_counts_without_its_cached_files(monkeypatch):
    for folder, limit, used, stat in (
        ("", "memory.max", "memory.current", "active_file 100\ninactive_file 300\nanon 500"),
        (
            "memory/",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "cache 1\ntotal_active_file 100\ntotal_inactive_file 300",
        ),
    ):
        texts = {folder + limit: "1000", folder + used: "900", folder + "memory.stat": stat}
        monkeypatch.setattr(
            "gafext.checkpoints.estimate._read",
            lambda path, texts=texts: texts.get(path.relative_to("/sys/fs/cgroup").as_posix(), ""),
        )
        assert free_bytes(torch.device("cpu")) == 500
