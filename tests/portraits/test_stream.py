"""Many portraits through one pipeline: the same views as alone, in order, whatever overlaps."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import max_abs_diff
from PIL import Image

from gafext import MultiViewDiffusionPipeline
from gafext.errors import ImageError
from gafext.portraits.stream import Hooks, _overlaps, stream

OPTIONS = {"num_views": 2, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture
def portraits(tmp_path):
    paths = []
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_each_portrait_has_the_views_that_it_gets_alone(pipe, portraits):
    alone = [pipe(path, generator=7, progress_bar=False, **OPTIONS) for path in portraits]
    results = list(pipe.map(portraits, generator=7, **OPTIONS))
    assert [result.portrait for result in results] == portraits
    for result, single in zip(results, alone, strict=True):
        assert torch.equal(result.output.images, single.images) and result.output.run == single.run
    for result, single in zip(pipe.map(portraits, generator=7, batch_size=3, **OPTIONS), alone, strict=True):
        assert max_abs_diff(result.output.images, single.images) < 1e-4
        assert result.output.run["portrait_index"] == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_threads_beside_the_loop_change_nothing(overlap, pipe, portraits):
    expected = [pipe(path, generator=7, progress_bar=False, **OPTIONS).images for path in portraits]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for result, images in zip(
            stream(pipe, portraits, generator=7, hooks=Hooks(overlap=overlap), **OPTIONS), expected, strict=True
        ):
            assert max_abs_diff(result.output.images, images) < 1e-5
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_batch_that_is_prepared_beside_the_loop_leaves_the_state_of_its_solver(checkpoint, portraits, monkeypatch):
    pipe = MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu", scheduler="dpm++")
    options = {**OPTIONS, "num_views": 1, "num_inference_steps": 8, "guidance_scale": 1.0, "generator": 7}
    expected = [pipe(path, progress_bar=False, **options).images for path in portraits]
    halfway, prepared = ([threading.Event() for _ in portraits] for _ in range(2))
    prepare, runs, steps = MultiViewDiffusionPipeline.prepare, itertools.count(), itertools.count(1)

    def prepare_halfway(*arguments, **given):
        portrait = next(runs)
        assert portrait == 0 or halfway[portrait - 1].wait(60)
        run = prepare(*arguments, **given)
        prepared[portrait].set()
        return run

    def wait_halfway(share):
        portrait, step = divmod(next(steps), 8)
        if step == 4:
            halfway[portrait].set()
            assert portrait + 1 == len(portraits) or prepared[portrait + 1].wait(60)

    monkeypatch.setattr(MultiViewDiffusionPipeline, "prepare", prepare_halfway)
    hooks = Hooks(on_step=wait_halfway, overlap=True)
    for result, images in zip(stream(pipe, portraits, hooks=hooks, **options), expected, strict=True):
        assert max_abs_diff(result.output.images, images) < 1e-5


def test_seeds_and_renders(pipe, portraits):
    renders = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    options = {**OPTIONS, "renders": renders, "strength": 0.5}
    results = list(pipe.map(portraits[:3], generator=[3, 4, 3], batch_size=2, **options))
    for result, seed, path in zip(results, (3, 4, 3), portraits, strict=False):
        single = pipe(path, generator=seed, progress_bar=False, **options)
        assert max_abs_diff(result.output.images, single.images) < 1e-4 and result.output.run["seed"] == seed
    first, second = pipe.map(portraits[:1] * 2, **OPTIONS)
    assert first.output.run["seed"] != second.output.run["seed"]
    with pytest.raises(ValueError, match="generator: expected one per portrait"):
        list(pipe.map(portraits, generator=[1], **OPTIONS))


def test_one_render_of_one_view(pipe, portraits, tmp_path):
    path = tmp_path / "render.png"
    Image.new("RGB", (32, 32), "red").save(path)
    options = {**OPTIONS, "num_views": 1, "generator": 7, "strength": 0.5}
    expected = pipe(portraits[0], renders=path, progress_bar=False, **options).images
    for render in (path, str(path), Image.open(path), np.asarray(Image.open(path))):
        for result in pipe.map(portraits[:1] * 2, batch_size=2, renders=render, **options):
            assert max_abs_diff(result.output.images, expected) < 1e-4


def test_a_portrait_that_cannot_be_read_has_an_error(pipe, portraits, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(portraits[0].read_bytes()[:60])
    for size in (1, 2, 4):
        results = list(pipe.map([portraits[0], broken, "nowhere.png", portraits[1]], batch_size=size, **OPTIONS))
        assert [result.output is None for result in results] == [False, True, True, False]
        assert [type(result.error) for result in results] == [type(None), ImageError, ImageError, type(None)]
        assert "broken.png" in str(results[1].error)


def test_wrong_options_end_the_stream(pipe, portraits):
    with pytest.raises(ValueError, match="batch_size"):
        list(pipe.map(portraits, batch_size=0))
    with pytest.raises(ValueError, match="latents, num_images_per_prompt"):
        list(pipe.map(portraits, latents=None, num_images_per_prompt=2))
    with pytest.raises(ValueError, match="guidance_scale"):
        list(pipe.map(portraits, guidance_scale=99.0))


def test_portraits_are_read_as_the_stream_goes_on(pipe, portraits):
    results = pipe.map(itertools.cycle(portraits), **OPTIONS)
    assert [next(results).portrait for _ in range(6)] == [*portraits, *portraits[:2]]
    results.close()


def test_the_next_portrait_is_prepared_before_the_last_one_is_saved(pipe, portraits):
    order = []

    def read(path):
        order.append(("read", path))
        return Image.open(path)

    hooks = Hooks(read=read, save=lambda result: order.append(("saved", result.portrait)))
    hooks.on_step = lambda share: order.append(("step", share))
    assert len(list(stream(pipe, portraits, hooks=hooks, **OPTIONS))) == 4
    assert order.index(("read", portraits[1])) < order.index(("saved", portraits[0]))
    assert [path for what, path in order if what == "saved"] == portraits
    assert sum(share for what, share in order if what == "step") == pytest.approx(4)
    assert hooks.denoised > 0 and 0 <= hooks.idle < 1


def test_an_error_while_saving_ends_the_stream(pipe, portraits):
    def save(result):
        raise OSError("No space left on device")

    seen = []
    with pytest.raises(OSError, match="No space"):
        for result in stream(pipe, itertools.cycle(portraits), hooks=Hooks(save=save), **OPTIONS):
            seen.append(result)
    assert not seen


def test_with_offloading_nothing_runs_beside_the_loop(pipe, portraits, pretend_cpu):
    pretend_cpu("avx512")  # a linear layer with hooks is PyTorch's, and has not the bits of the kernel for AMX
    expected = [result.output.images for result in pipe.map(portraits, generator=1, **OPTIONS)]
    pipe.enable_model_cpu_offload(device="cpu")
    for result, images in zip(pipe.map(portraits, generator=1, **OPTIONS), expected, strict=True):
        assert torch.equal(result.output.images, images)


def test_what_runs_beside_the_loop():
    cpu, gpu = (SimpleNamespace(device=torch.device(name), _offload=None) for name in ("cpu", "cuda"))
    assert _overlaps(gpu, graph=False)
    assert not (_overlaps(cpu, graph=False) or _overlaps(gpu, graph=True))
    gpu._offload = "model"
    assert not _overlaps(gpu, graph=False)


def test_what_came_before_an_error_of_the_source_is_delivered(pipe, portraits):
    def source():
        yield from portraits[:2]
        raise RuntimeError("no more")

    seen = []
    with pytest.raises(RuntimeError, match="no more"):
        for result in pipe.map(source(), generator=1, **OPTIONS):
            seen.append(result)
    assert len(seen) == 2 and all(result.output is not None for result in seen)
    with pytest.raises(ValueError, match="generator: expected one per portrait, 3, got 2"):
        next(pipe.map(portraits[:3], generator=[0, 1], **OPTIONS))


def test_what_waits_to_be_saved_is_few(pipe, portraits):
    """A slow disk holds the loop up, and not all views in memory."""
    denoised, saved, most = [], [], []

    def save(result):
        time.sleep(0.2)
        most.append(len(denoised) - len(saved))
        saved.append(result)

    hooks = Hooks(save=save, on_step=denoised.append)
    for _ in stream(pipe, portraits * 2, hooks=hooks, **{**OPTIONS, "num_inference_steps": 1}):
        pass
    assert len(saved) == 2 * len(portraits) and max(most) <= 5 and hooks.waited > 0


def test_warnings_name_the_file(pipe, portraits):
    with pytest.warns(UserWarning, match=r"0\.png: the background is not plain"):
        list(pipe.map(portraits[:1], **OPTIONS))
