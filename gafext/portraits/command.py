"""`gafext generate` of several portraits: what is missing, one folder each, alone or as one process of several."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gafext.errors import ImageError, OutputError
from gafext.portraits.claim import Claim, hidden
from gafext.portraits.jobs import (
    Job,
    check_out,
    digests,
    file_digest,
    find_jobs,
    missing,
    record,
    write_failures,
)
from gafext.portraits.stream import Hooks, PortraitResult, read_portrait, stream
from gafext.watch.events import print_event, say

log = logging.getLogger(__name__)

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def generate_portraits(
    args: argparse.Namespace, load: Callable[[], Any], options: dict[str, Any], saving: dict[str, Any]
) -> int:
    """Make the views of several portraits, and return the exit code.

    Args:
        args: options of the command; of several processes, each makes every WORLD_SIZE-th portrait from its RANK on.
        load: loads the pipeline; called if something is missing.
        options: those of `PipelineStream.map`.
        saving: those of `MultiViewOutput.save`.

    Raises:
        OutputError: a folder cannot be written, or was made with other options; folders that were whole stay so.
    """
    with _logging(args.log_level):
        return _generate(args, load, options, saving)


def _generate(
    args: argparse.Namespace, load: Callable[[], Any], options: dict[str, Any], saving: dict[str, Any]
) -> int:
    command = {name: value for name, value in vars(args).items() if value is not None}
    rank, world, out = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), Path(args.out)
    jobs = find_jobs(args.portrait, out)
    check_out(out)
    inputs = digests(options, command)
    everything = set(missing(jobs, command, inputs=inputs, overwrite=args.overwrite))
    mine = jobs[rank::world]
    work = _Work([job for job in mine if job in everything], command, inputs, args, saving)
    work.event("start", portraits=len(mine), missing=len(work.todo))
    for job in mine:
        if hidden(job.folder).exists() and (claim := Claim.take(job.folder)):
            log.info("%s: what a killed run left is removed", job.folder)
            claim.release()
    if work.todo:
        if world > 1 and args.device in (None, "cuda"):
            args.device = _own_gpu() or args.device
        pipeline = load()
        try:
            work.run(pipeline, options, shown=rank == 0 and not args.quiet)
        except BaseException as error:
            if world == 1:
                with contextlib.suppress(OSError):  # a full disk, which may be the error
                    _report(out, work.failures)
            if not isinstance(error, KeyboardInterrupt):
                raise
            print(f"gafext: interrupted after {work.made} portraits; the same command goes on", file=sys.stderr)
            return 130
        finally:
            work.release()
    failures = _gather(work.failures, world)
    if rank == 0:
        _report(out, failures)
    seconds, failed = time.monotonic() - work.start, len(work.failures)
    work.event("end", made=work.made, failed=failed, left=work.left, seconds=seconds, loop_idle=work.hooks.idle)
    if not (args.quiet or args.json):
        kept = f", {len(mine) - len(work.todo)} were there" if len(work.todo) < len(mine) else ""
        kept += f", {work.left} left to another process" if work.left else ""
        say(f"{work.made} portraits in {seconds:.1f} s{kept}, {failed} failed: {out}")
    return 1 if failures else 0


def _report(out: Path, failures: list[dict[str, str]]) -> None:
    """Write failures.json, and name the failures on stderr."""
    write_failures(out, failures)
    for failure in failures:
        print(f"gafext: error: {failure['error']}", file=sys.stderr)


class _Work:
    """The portraits that this process has to make."""

    def __init__(
        self,
        todo: list[Job],
        command: dict[str, Any],
        inputs: dict[str, str],
        args: argparse.Namespace,
        saving: dict[str, Any],
    ) -> None:
        self.todo, self.command, self.inputs, self.args, self.saving = todo, command, inputs, args, saving
        self.made, self.done, self.failures, self.start = 0, 0.0, [], time.monotonic()
        self.left = 0  # portraits that another process is making or has made meanwhile
        self.claims: dict[Path, Claim] = {}
        self.read_digests: dict[Path, str] = {}
        self.hooks, self.lock = Hooks(read=self.read, save=self.save), threading.Lock()
        self.of_process = {"rank": int(os.environ["RANK"])} if "RANK" in os.environ else {}  # torchrun's

    def run(self, pipeline: Any, options: dict[str, Any], *, shown: bool) -> None:
        settings = {"total": len(self.todo), "bar_format": _BAR, "smoothing": 0, "disable": not shown}
        with tqdm(**settings) as bar, logging_redirect_tqdm([logging.getLogger("gafext")]):

            def advance(share: float) -> None:
                with self.lock:  # of the threads of several loops
                    self.done += share
                    bar.total = len(self.todo) - self.left
                    bar.update(share)
                    self.event("progress", done=round(self.done, 4), of=bar.total)

            self.hooks.on_step = advance
            bar.set_description_str(f"0 of {len(self.todo)} portraits")
            results = stream(pipeline, self.claimed(), batch_size=self.args.batch, hooks=self.hooks, **options)
            with contextlib.closing(results):
                for count, result in enumerate(results, start=1):
                    self.take(result)
                    if result.error is not None:
                        advance(1)
                    bar.set_description_str(f"{count} of {len(self.todo) - self.left} portraits")

    def claimed(self) -> Iterator[Job]:
        """Yield the portraits whose folders no other process is making or has made meanwhile."""
        for job in self.todo:
            claim = Claim.take(job.folder)
            if claim is not None and missing([job], self.command, inputs=self.inputs, overwrite=self.args.overwrite):
                self.claims[job.folder] = claim
                yield job
                continue
            if claim is None:
                log.warning("%s: left to another process, which is making it", job.folder)
            else:
                claim.release()
            self.left += 1
            self.event("left", portrait=str(job.portrait), folder=str(job.folder))

    def read(self, job: Job) -> PIL.Image.Image:
        before = self.read_digests[job.folder] = file_digest(job.portrait)
        picture = read_portrait(job.portrait)
        if file_digest(job.portrait) != before:
            raise ImageError(
                f"{job.portrait}: expected a file that stays as it is, got one that changed while it was read"
            )
        return picture

    def save(self, result: PortraitResult) -> None:
        job = result.portrait
        claim = self.claims[job.folder]
        if result.output is not None:
            try:
                result.output.run.update(record(job, self.command, self.read_digests[job.folder], self.inputs))
                result.output.save(claim.new, **self.saving)
                claim.publish()
                self.made += 1
            except OSError as error:
                raise OutputError(f"{job.folder}: cannot be written ({error.__cause__ or error})") from None
        self.claims.pop(job.folder).release()

    def take(self, result: PortraitResult) -> None:
        """Account for a result."""
        job, known = result.portrait, {"portrait": str(result.portrait.portrait)}
        if result.error is not None:
            self.failures.append({**known, "error": str(result.error)})
            self.event("failed", **known, error=str(result.error))
            return
        log.info("%s: made from %s", job.folder, job.portrait)
        self.event("portrait", **known, folder=str(job.folder), seconds=time.monotonic() - self.start)

    def event(self, name: str, **fields: Any) -> None:
        if self.args.json:
            print_event(name, **fields, **self.of_process)

    def release(self) -> None:
        for claim in self.claims.values():
            claim.release()


@contextlib.contextmanager
def _logging(level: str) -> Iterator[None]:
    """Show gafext's log on stderr."""
    logger, handler = logging.getLogger("gafext"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("gafext: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _own_gpu() -> str | None:
    """Return the name of the GPU of this process of several, by its LOCAL_RANK; None without GPUs."""
    if not torch.cuda.is_available():
        return None
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


@contextlib.contextmanager
def process_pair(args: argparse.Namespace) -> Iterator[bool]:
    """Join the two processes that torchrun started for `--parallel guidance`; yields whether this one is the first.

    Without `--device`, each takes a GPU of its own where there are any.
    """
    import torch.distributed as distributed

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != 2:
        raise ValueError(
            f"--parallel: expected 2 processes, one per pass of guidance, got {world}: torchrun --standalone "
            "--nproc-per-node 2 -m gafext generate ..."
        )
    if args.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--parallel: expected --device cpu or cuda, each process on a GPU of its own, got {args.device}"
        )
    backend, count = "gloo", torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cuda" or (args.device is None and count > 0):
        if count < 2:
            raise ValueError(f"--parallel: expected 2 GPUs, got {count}; --device cpu takes two processes of the CPU")
        args.device, backend = _own_gpu(), "nccl"
        torch.cuda.set_device(torch.device(args.device or "cuda"))
    else:
        args.device = "cpu"
    distributed.init_process_group(backend)
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


def _gather(failures: list[dict[str, str]], world: int) -> list[dict[str, str]]:
    """Return the failures of all processes, once all are done: torchrun ends the others when one fails."""
    if world == 1:
        return failures
    import torch.distributed as distributed

    found: list[list[dict[str, str]]] = [[]] * world
    # The first process may wait for the last one for longer than the default of 30 minutes.
    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        distributed.all_gather_object(found, failures)
    finally:
        distributed.destroy_process_group()
    return [failure for each in found for failure in each]
