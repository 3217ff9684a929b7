"""Several portraits at once on a CPU, each denoised by a loop of its own: the same views, in order."""

import itertools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from gafext import MultiViewDiffusionPipeline
from gafext.portraits import batch
from gafext.portraits.batch import LOOPS, SHARE, loops_at_once
from gafext.portraits.stream import Hooks, stream

OPTIONS = {"num_views": 2, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture
def threads():
    """Set PyTorch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def portraits():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.mark.parametrize(("loops", "share"), [(2, 2), (3, 1), (8, 1)])
def test_each_portrait_has_the_views_that_it_gets_alone_with_as_many_threads(loops, share, pipe, portraits, threads):
    threads(share)
    alone = [pipe(portrait, generator=7, progress_bar=False, **OPTIONS) for portrait in portraits]
    threads(4)
    hooks = Hooks(loops=loops)
    results = list(stream(pipe, portraits, generator=7, hooks=hooks, **OPTIONS))
    assert [result.portrait for result in results] == portraits
    for result, single in zip(results, alone, strict=True):
        assert torch.equal(result.output.images, single.images) and result.output.run == single.run
    assert torch.get_num_threads() == 4
    assert hooks.denoised > 0 and 0 <= hooks.idle < 1


@pytest.mark.parametrize("scheduler", ["dpm++", "euler"])
def test_solvers_with_a_state_do_not_meet(scheduler, checkpoint, portraits):
    pipe = MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu", scheduler=scheduler)
    options = {**OPTIONS, "num_inference_steps": 6, "generator": 3}
    alone = [pipe(portrait, progress_bar=False, **options).images for portrait in portraits]
    for result, images in zip(stream(pipe, portraits, hooks=Hooks(loops=4), **options), alone, strict=True):
        assert torch.equal(result.output.images, images)


def test_the_loops_run_at_once_with_their_share_of_the_threads(pipe, portraits, threads):
    threads(4)
    together, seen = threading.Barrier(2, timeout=60), set()

    def meet(share):
        together.wait()  # breaks unless another loop takes a step too
        seen.add((threading.get_ident(), torch.get_num_threads()))

    hooks = Hooks(on_step=meet, loops=2)
    assert len(list(stream(pipe, portraits[:4], hooks=hooks, **OPTIONS))) == 4
    assert len(seen) == 2 and {count for _, count in seen} == {2}
    assert threading.get_ident() not in {ident for ident, _ in seen}


def test_an_error_of_one_portrait_leaves_the_others(pipe, portraits):
    results = list(stream(pipe, [portraits[0], "nowhere.png", portraits[1]], hooks=Hooks(loops=2), **OPTIONS))
    assert [result.error is None for result in results] == [True, False, True]
    assert results[1].output is None and results[2].output.images.shape[0] == 2


def test_the_loops_end_with_the_stream(pipe, portraits):
    steps = []
    hooks = Hooks(on_step=steps.append, loops=3)
    results = stream(pipe, itertools.cycle(portraits), hooks=hooks, **{**OPTIONS, "num_inference_steps": 40})
    assert next(results).error is None
    results.close()
    taken = len(steps)
    assert taken < 40 * 6 and threading.active_count() == 1 + sum(not t.name.startswith("ThreadPool") for t in others())
    assert len(steps) == taken


def others():
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_an_error_while_saving_ends_the_loops(pipe, portraits):
    def save(result):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        list(stream(pipe, itertools.cycle(portraits), hooks=Hooks(save=save, loops=3), **OPTIONS))
    assert not any(thread.name.startswith("ThreadPool") for thread in others())


def test_wrong_options_end_the_stream(pipe, portraits):
    with pytest.raises(ValueError, match="guidance_scale"):
        list(stream(pipe, portraits, hooks=Hooks(loops=2), guidance_scale=99.0, **OPTIONS))


def test_how_many_portraits_are_denoised_at_once(pipe, threads, monkeypatch):
    threads(4)
    assert loops_at_once(pipe, None, {}) == 4
    threads(2 * LOOPS)
    assert loops_at_once(pipe, None, {}) == LOOPS
    threads(1)
    assert loops_at_once(pipe, None, {}) == 1
    threads(4)
    with torch.autocast("cpu", torch.bfloat16):  # which other threads do not inherit
        assert loops_at_once(pipe, None, {}) == 1
    needed = pipe.estimate_bytes(portraits=2, views=4, passes=2, size=pipe.unet.config.sample_size, doubled=True)
    for available, count in ((1.001 * needed, 2), (0.999 * needed, 1), (None, 1)):
        free = None if available is None else available / SHARE
        monkeypatch.setattr(MultiViewDiffusionPipeline, "available_bytes", lambda self, free=free: free)
        assert loops_at_once(pipe, None, {}) == count
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "SMALL", 10)
        assert loops_at_once(pipe, None, {}) == 1
    with monkeypatch.context() as patch:
        patch.setattr(MultiViewDiffusionPipeline, "device", torch.device("meta"))
        assert loops_at_once(pipe, None, {}) == 1
    pipe.unet.conv_in = torch.compile(pipe.unet.conv_in)
    assert loops_at_once(pipe, None, {}) == 1


def test_offloaded_or_compiled_networks_have_one_loop(pipe, threads):
    threads(4)
    pipe.unet.mid_block.compile()
    assert loops_at_once(pipe, None, {}) == 1
    pipe.unet.mid_block._compiled_call_impl = None
    assert loops_at_once(pipe, None, {}) == 4
    pipe.enable_model_cpu_offload(device="cpu")
    assert loops_at_once(pipe, None, {}) == 1
