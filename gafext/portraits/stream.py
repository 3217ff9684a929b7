"""A stream of portraits through one pipeline: the denoising loop waits for nothing else."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
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
from gafext.portraits.batch import automatic_batch_size, check_batch_size, loops_at_once

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
        on_step: called after each step with the share of a portrait that it has finished, by the thread of its loop.
        overlap: encode and decode beside the loop; None: on accelerators without offloading and CUDA graphs.
        loops: portraits that are denoised at once, each by a loop of its own; None: see `loops_at_once`.
        denoised: seconds in the loops.
        waited: seconds for which a loop stood still, waiting for the next portrait or for those before to be saved.
    """

    read: Callable[[Any], PIL.Image.Image] = field(default_factory=lambda: read_portrait)
    save: Callable[[PortraitResult], None] = lambda result: None
    on_step: Callable[[float], None] = lambda share: None
    overlap: bool | None = None
    loops: int | None = None
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
        offloading they are encoded and decoded so too. On a CPU several portraits are denoised at once where the U-Net
        is small, each with its share of PyTorch's threads (`gafext.portraits.batch.loops_at_once`). Each has the views
        that a call of its own gives it: with `batch_size=1` bit for bit if that call has as many threads, else up to
        rounding.

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
    if isinstance(images, Sized) and isinstance(generator, (list, tuple)) and len(generator) < len(images):
        raise ValueError(f"generator: expected one per portrait, {len(images)}, got {len(generator)}")
    loops = hooks.loops or (loops_at_once(pipeline, cameras, options) if count == 1 and not hooks.overlap else 1)
    loops = min(loops, len(images)) if isinstance(images, Sized) else loops
    work = _Work(pipeline, cameras, normal_maps, dict(options), hooks)
    threads, failure = torch.get_num_threads(), []

    def batches() -> Iterator[_Batch]:
        try:
            yield from _batches(images, generator, count)
        except Exception as error:  # of the source: raised once those before it are delivered
            failure.append(error)

    try:
        yield from _several_loops(work, batches(), loops) if loops > 1 else _one_loop(work, batches())
        if failure:
            raise failure[0]
    finally:
        torch.set_num_threads(threads)  # what the threads set is the default of any that come after them
        if pipeline.device.type == "cpu":
            memory.release_freed_memory()


class _Work:
    """What is done with a batch, one stage after the other; each stage may be run by a thread of its own.

    Args:
        pipeline, cameras, normal_maps, options: those of `prepare`.
        hooks: the stream's.
    """

    def __init__(self, pipeline: Any, cameras: Any, normal_maps: Any, options: dict[str, Any], hooks: Hooks) -> None:
        self.pipeline, self.cameras, self.normal_maps, self.hooks = pipeline, cameras, normal_maps, hooks
        self.renders = None if (given := options.pop("renders", None)) is None else image_list(given)
        self.options, self.unused = options, copy.deepcopy(pipeline.scheduler)
        self.looping = threading.local()  # its `since` is when a loop's thread last had something to do
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def wait(self, future: Future) -> Any:
        """Return a future's result; in a thread whose loop has begun, count the time."""
        start = time.perf_counter()
        result = future.result()
        if hasattr(self.looping, "since"):
            self._add(waited=time.perf_counter() - start)
        return result

    def read(self, batch: _Batch) -> _Batch:
        for result in batch.results:
            try:
                batch.pictures.append(self.hooks.read(result.portrait))
            except (ImageError, OSError) as error:
                result.error = error
        return batch

    def prepare(self, opened: Future[_Batch]) -> _Batch:
        batch = self.wait(opened)
        seeds = [seed for seed, result in zip(batch.seeds, batch.results, strict=True) if result.error is None]
        if batch.pictures:
            encoder = copy.copy(self.pipeline)  # a scheduler has the state of a run, and those of others are under way
            encoder.scheduler = copy.deepcopy(self.unused)
            shared = {**self.options, "renders": None if self.renders is None else self.renders * len(seeds)}
            batch.run = encoder.prepare(batch.pictures, self.cameras, self.normal_maps, generator=seeds, **shared)
        return batch

    def denoise(self, run: Run) -> Tensor:
        latents, self.looping.since = run.latents, time.perf_counter()
        for _, stepped in self.pipeline.steps(run):
            if self.stopped.is_set():
                raise CancelledError
            latents = stepped
            self.hooks.on_step(run.num_portraits / len(run.timesteps))
        self._add(denoised=time.perf_counter() - self.looping.since)
        return latents

    def views(self, opened: Future[_Batch]) -> tuple[_Batch, list[MultiViewOutput]]:
        """Do all of a batch but reading and saving."""
        if hasattr(self.looping, "since"):
            self._add(waited=time.perf_counter() - self.looping.since)
        if self.stopped.is_set():
            raise CancelledError
        batch = self.prepare(opened)
        outputs = [] if batch.run is None else self.pipeline.finish(batch.run, self.denoise(batch.run))
        self.looping.since = time.perf_counter()
        return batch, outputs

    def deliver(self, batch: _Batch, outputs: Iterable[MultiViewOutput]) -> list[PortraitResult]:
        made = iter(outputs)
        for result in batch.results:
            if result.error is None:
                result.output = next(made)
                result.output.run["portrait_index"] = 0  # as alone: who shared its batch is no matter
            self.hooks.save(result)
        return batch.results

    def _add(self, *, denoised: float = 0.0, waited: float = 0.0) -> None:
        with self.lock:
            self.hooks.denoised += denoised
            self.hooks.waited += waited


def _one_loop(work: _Work, batches: Iterator[_Batch]) -> Iterator[PortraitResult]:
    """Denoise batch after batch in this thread, with all of PyTorch's threads."""
    pipeline, overlap = work.pipeline, work.hooks.overlap
    overlap = _overlaps(pipeline, graph=bool(work.options.get("graph"))) if overlap is None else overlap
    beside = _threads if overlap else _Inline

    def deliver(batch: _Batch, finished: Future[list[MultiViewOutput]] | None) -> list[PortraitResult]:
        return work.deliver(batch, () if finished is None else finished.result())

    with _threads() as reading, beside() as encoding, beside() as decoding, _threads() as writing:
        opened = _one_ahead(reading.submit(work.read, batch) for batch in batches)
        prepared = (encoding.submit(work.prepare, future) for future in opened)
        following, behind = next(prepared, None), deque()
        while following is not None:
            batch, finished = work.wait(following), None
            following = next(prepared, None)
            if batch.run is not None:
                finished = decoding.submit(pipeline.finish, batch.run, work.denoise(batch.run))
            behind.append(writing.submit(deliver, batch, finished))
            while behind and (behind[0].done() or len(behind) > _BEHIND):
                yield from work.wait(behind.popleft())
        for last in behind:
            yield from last.result()


def _several_loops(work: _Work, batches: Iterator[_Batch], loops: int) -> Iterator[PortraitResult]:
    """Denoise as many batches at once as there are loops, each with its share of PyTorch's threads."""
    share = max(1, torch.get_num_threads() // loops)

    def deliver(made: Future[tuple[_Batch, list[MultiViewOutput]]]) -> list[PortraitResult]:
        return work.deliver(*made.result())

    with _threads() as reading, _threads(loops, share) as looping, _threads() as writing:
        try:
            behind = deque()
            for batch in batches:
                opened = reading.submit(work.read, batch)
                behind.append(writing.submit(deliver, looping.submit(work.views, opened)))
                while behind and (behind[0].done() or len(behind) >= _BEHIND + loops):
                    yield from behind.popleft().result()
            for last in behind:
                yield from last.result()
        finally:
            work.stopped.set()  # after an error, or where nobody asks for more: the loops end at their next step


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
def _threads(count: int = 1, share: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Yield an executor of threads with `share` threads of PyTorch each; what has not begun at the end is dropped.

    A thread beside the loop gets one: a second pool of OpenMP's makes the threads of the loop's sleep, not spin, at
    every barrier, and 50 steps took 3.2 s in place of 2.4 s on two cores.
    """
    executor = ThreadPoolExecutor(count, initializer=_take_threads, initargs=(share,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _take_threads(count: int) -> None:
    """Give the calling thread this many threads of PyTorch, for good."""
    torch.get_num_threads()  # else its first operation takes the number that another thread set last
    torch.set_num_threads(count)


class _Inline(contextlib.nullcontext):
    """An executor whose thread is the caller's."""

    def __init__(self) -> None:
        super().__init__(self)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        future = Future()
        future.set_result(call(*arguments))
        return future
