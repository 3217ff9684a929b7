"""A stream of portraits through one pipeline: the denoising loop waits for nothing else."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor

from gafext.conditions import Run, RunOptions
from gafext.errors import ImageError
from gafext.images import image_list, read_image
from gafext.noise import resolve_seed
from gafext.ops import memory
from gafext.output import MultiViewOutput
from gafext.portraits.batch import automatic_batch_size, check_batch_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BEHIND = 2  # batches that may wait to be decoded and saved: a slow disk holds the loop up, and not all views in memory


@dataclass
class PortraitResult:
    """What became of one portrait.

    Attributes:
        portrait: what was given.
        output: its views; None if it cannot be read.
        error: why it cannot be read; None if it was.
    """

    portrait: Any
    output: MultiViewOutput | None = None
    error: Exception | None = None


@dataclass
class Hooks:
    """What the command line does along the stream.

    Attributes:
        read: opens a portrait, in a thread of its own; an ImageError or OSError makes the result.
        save: called with each result, in a thread of its own; an error ends the stream.
        on_step: called after each step with the share of a portrait that it has finished.
        overlap: encode and decode beside the loop; None: on accelerators without offloading and CUDA graphs.
        denoised: seconds in the loop.
        waited: seconds for which the loop stood still, waiting for the next portrait or for those before to be saved.
    """

    read: Callable[[Any], PIL.Image.Image] = field(default_factory=lambda: read_portrait)
    save: Callable[[PortraitResult], None] = lambda result: None
    on_step: Callable[[float], None] = lambda share: None
    overlap: bool | None = None
    denoised: float = 0.0
    waited: float = 0.0

    @property
    def idle(self) -> float:
        """Share of the time from the first step to the last in which the loop stood still."""
        return self.waited / max(self.denoised + self.waited, 1e-9)


@dataclass
class _Batch:
    results: list[PortraitResult]
    seeds: list[int]
    pictures: list[PIL.Image.Image] = field(default_factory=list)
    run: Run | None = None  # of the portraits that can be read, if any


class PipelineStream:
    """Many portraits through a pipeline."""

    def map(
        self,
        images: Iterable[Any],
        cameras: Any = None,
        normal_maps: Any = None,
        *,
        batch_size: int | str = 1,
        **options: Unpack[RunOptions],
    ) -> Iterator[PortraitResult]:
        """Generate the views of many portraits, and yield the results in order, each as soon as it is there.

        Portraits are read and views saved by threads of their own while other portraits are denoised; on a GPU without
        offloading they are encoded and decoded so too. Each has the views that a call of its own gives it: with
        `batch_size=1` bit for bit, above up to rounding.

        Args:
            images: portraits, as `prepare` takes one; may be endless, and is read as the stream goes on.
            cameras, normal_maps, options: those of `prepare`, the same for every portrait, without `latents`,
                `num_images_per_prompt` and `parallel`. A list as `generator` has one seed per portrait.
            batch_size: portraits that are denoised together. On CPUs more than 1 saves no time. "auto": 1 on a CPU,
                else as many as the free memory holds, see `gafext.portraits.batch`.

        Yields:
            One result per portrait; a portrait that cannot be read has an error in place of the output.

        Raises:
            ValueError: an option is out of range.
        """
        yield from stream(self, images, cameras, normal_maps, batch_size=batch_size, **options)


def stream(
    pipeline: Any,
    images: Iterable[Any],
    cameras: Any = None,
    normal_maps: Any = None,
    *,
    batch_size: int | str = 1,
    hooks: Hooks | None = None,
    **options: Unpack[RunOptions],
) -> Generator[PortraitResult]:
    """Do what `PipelineStream.map` does, with hooks."""
    check_batch_size(batch_size)
    if refused := sorted(options.keys() & {"latents", "num_images_per_prompt", "parallel"}):
        raise ValueError(f"{', '.join(refused)}: expected none for a stream of portraits")
    count = automatic_batch_size(pipeline, cameras, options) if isinstance(batch_size, str) else batch_size
    hooks, generator = hooks or Hooks(), options.pop("generator", None)
    renders = None if (given := options.pop("renders", None)) is None else image_list(given)
    if isinstance(images, Sized) and isinstance(generator, (list, tuple)) and len(generator) < len(images):
        raise ValueError(f"generator: expected one per portrait, {len(images)}, got {len(generator)}")
    encoder, unused = copy.copy(pipeline), copy.deepcopy(pipeline.scheduler)
    loop = threading.get_ident()

    def wait(future: Future) -> Any:
        start = time.perf_counter()
        result = future.result()
        if hooks.denoised and threading.get_ident() == loop:  # before the first step there is no loop that waits
            hooks.waited += time.perf_counter() - start
        return result

    def read(batch: _Batch) -> _Batch:
        for result in batch.results:
            try:
                batch.pictures.append(hooks.read(result.portrait))
            except (ImageError, OSError) as error:
                result.error = error
        return batch

    def prepare(opened: Future[_Batch]) -> _Batch:
        batch = wait(opened)
        seeds = [seed for seed, result in zip(batch.seeds, batch.results, strict=True) if result.error is None]
        if batch.pictures:
            encoder.scheduler = copy.deepcopy(unused)  # it has the state of a run, and those of others are under way
            shared = {**options, "renders": None if renders is None else renders * len(seeds)}
            batch.run = encoder.prepare(batch.pictures, cameras, normal_maps, generator=seeds, **shared)
        return batch

    def denoise(run: Run) -> Tensor:
        latents, start = run.latents, time.perf_counter()
        for _, stepped in pipeline.steps(run):
            latents = stepped
            hooks.on_step(run.num_portraits / len(run.timesteps))
        hooks.denoised += time.perf_counter() - start
        return latents

    def deliver(batch: _Batch, finished: Future[list[MultiViewOutput]] | None) -> list[PortraitResult]:
        outputs = iter(finished.result() if finished is not None else ())
        for result in batch.results:
            if result.error is None:
                result.output = next(outputs)
                result.output.run["portrait_index"] = 0  # as alone: who shared its batch is no matter
            hooks.save(result)
        return batch.results

    overlap = _overlaps(pipeline, graph=bool(options.get("graph"))) if hooks.overlap is None else hooks.overlap
    beside = _thread if overlap else _Inline
    threads, failure = torch.get_num_threads(), []

    def batches() -> Iterator[_Batch]:
        try:
            yield from _batches(images, generator, count)
        except Exception as error:  # of the source: raised once those before it are delivered
            failure.append(error)

    try:
        with _thread() as reading, beside() as encoding, beside() as decoding, _thread() as writing:
            opened = _one_ahead(reading.submit(read, batch) for batch in batches())
            prepared = (encoding.submit(prepare, future) for future in opened)
            following, behind = next(prepared, None), deque()
            while following is not None:
                batch, finished = wait(following), None
                following = next(prepared, None)
                if batch.run is not None:
                    finished = decoding.submit(pipeline.finish, batch.run, denoise(batch.run))
                behind.append(writing.submit(deliver, batch, finished))
                while behind and (behind[0].done() or len(behind) > _BEHIND):
                    yield from wait(behind.popleft())
            for last in behind:
                yield from last.result()
            if failure:
                raise failure[0]
    finally:
        torch.set_num_threads(threads)  # what the threads set is the default of any that come after them
        if pipeline.device.type == "cpu":
            memory.release_freed_memory()


def _overlaps(pipeline: Any, *, graph: bool) -> bool:
    """Return whether portraits are encoded and decoded beside the loop.

    Offloading swaps the weights of whole networks; while a CUDA graph is recorded, no other thread may launch work; and
    on a CPU the loop has all cores already.
    """
    return pipeline.device.type != "cpu" and pipeline._offload is None and not graph


def read_portrait(portrait: Any) -> PIL.Image.Image:
    """Open a portrait, and give it the name of its file, for warnings."""
    picture = read_image(portrait)
    if isinstance(portrait, (str, os.PathLike)):
        picture.filename = os.fspath(portrait)  # pyright: ignore[reportAttributeAccessIssue]  # named in warnings
    return picture


def _batches(images: Iterable[Any], generator: Any, size: int) -> Iterator[_Batch]:
    """Divide portraits into batches, each with a seed."""
    items, seeds = iter(images), iter(generator) if isinstance(generator, (list, tuple)) else repeat(generator)
    while portraits := list(islice(items, size)):
        given: list[Any] = list(islice(seeds, len(portraits)))
        if len(given) < len(portraits):
            raise ValueError("generator: expected one per portrait, got fewer")
        yield _Batch([PortraitResult(portrait) for portrait in portraits], [resolve_seed(seed) for seed in given])


def _one_ahead(futures: Iterator[Future]) -> Iterator[Future]:
    """Yield each future when the next one has been submitted."""
    for current in islice(futures, 1):
        for following in futures:
            yield current
            current = following
        yield current


@contextlib.contextmanager
def _thread() -> Iterator[ThreadPoolExecutor]:
    """Yield an executor of one thread; what has not begun when the block ends is dropped.

    PyTorch gets one thread in it: a second pool of OpenMP's makes the threads of the loop's sleep, not spin, at every
    barrier, and 50 steps took 3.2 s in place of 2.4 s on two cores.
    """
    executor = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


class _Inline(contextlib.nullcontext):
    """An executor whose thread is the caller's."""

    def __init__(self) -> None:
        super().__init__(self)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        future = Future()
        future.set_result(call(*arguments))
        return future
