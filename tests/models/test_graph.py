"""GraphedCall, with CUDA graphs that are recorded and replayed on the CPU: the same operations on the same memory."""

import contextlib
import shutil

import pytest
import torch
from helpers import max_abs_diff
from small_checkpoints import save_upsampler
from torch.utils._python_dispatch import TorchDispatchMode

import gafext
from gafext import pipeline
from gafext.models import graph as graphs
from gafext.models.graph import GraphedCall


class RecordedGraph(TorchDispatchMode):
    """What torch.cuda.CUDAGraph is to a GPU: `replay` computes again, without Python, in the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(out):
    return [out] if isinstance(out, torch.Tensor) else [t for t in out if isinstance(t, torch.Tensor)]


@pytest.fixture
def recorded(monkeypatch):
    """The graphs that are recorded from now on, of CPU tensors that pass as CUDA's."""
    made = []

    def make():
        made.append(RecordedGraph())
        return made[-1]

    @contextlib.contextmanager
    def capture(graph):
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(graphs, "is_on_gpu", lambda tensor: True)
    return made


def test_the_second_call_records_and_later_ones_replay(recorded):
    weight, calls = torch.randn(3, 4), []

    def function(x, y):
        calls.append(x.shape)
        return torch.relu(x @ weight) + y

    call = GraphedCall(function)
    for _ in range(5):
        x, y = torch.randn(2, 3), torch.randn(2, 4)
        out, expected = call(x, y), torch.relu(x @ weight) + y
        assert torch.equal(out, expected)
        kept = out.clone()
        assert torch.equal(call(torch.zeros_like(x), y), torch.relu(torch.zeros(2, 4)) + y) and torch.equal(out, kept)
    assert len(calls) == 2 and len(recorded) == 1 and recorded[0].replays == 9
    weight.mul_(2)  # in the same memory, as a LoRA's scale is
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    assert torch.equal(call(x, y), torch.relu(x @ weight) + y)


def test_another_shape_or_dtype_is_recorded_anew(recorded):
    call = GraphedCall(lambda x: x * 2)
    for x in (torch.ones(2), torch.ones(3), torch.ones(3).double(), torch.ones(2)):
        for _ in range(3):
            assert torch.equal(call(x), x * 2) and call(x).dtype == x.dtype
    assert len(recorded) == 4


def test_outside_of_cuda_every_call_runs_the_function():
    calls = []
    call = GraphedCall(lambda x: calls.append(1) or x + 1)
    for _ in range(3):
        assert torch.equal(call(torch.ones(2)), torch.full((2,), 2.0))
    assert len(calls) == 3


@torch.no_grad()
@pytest.mark.parametrize("interval", [None, (0.5, 5.0)], ids=str)
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_run_replays_its_steps(pipe, recorded, scheduler, interval):
    options = {"num_views": 2, "num_inference_steps": 8, "scheduler": scheduler, "guidance_interval": interval}
    options = {**options, "generator": 0, "output_type": "latent"}
    expected = pipe(gafext.PORTRAIT, **options).images
    assert not recorded
    seen = []
    result = pipe(gafext.PORTRAIT, graph=True, callback_on_step_end=lambda *args: seen.append(args[1]), **options)
    assert max_abs_diff(result.images, expected) < 1e-5 and seen == list(range(8))
    kinds = 1 if interval is None else 2
    assert len(recorded) == kinds and sum(graph.replays for graph in recorded) == 8 - kinds


@torch.no_grad()
def test_the_upsampler_replays_its_steps_for_all_views(checkpoint, tmp_path, recorded, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "model")
    save_upsampler(tmp_path / "model" / "upsampler")
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    monkeypatch.setattr(pipeline, "_UPSAMPLED", 1)  # view by view, as large views are
    options = {"num_views": 3, "num_inference_steps": 1, "upsample_steps": 4, "generator": 0, "output_type": "latent"}
    expected = pipe(gafext.PORTRAIT, **options).images
    assert not recorded
    assert max_abs_diff(pipe(gafext.PORTRAIT, graph=True, **options).images, expected) < 1e-5
    assert len(recorded) == 1 and recorded[0].replays == 3 * 4 - 1
