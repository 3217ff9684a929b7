"""Time, peak memory and progress bars of a run's stages."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from gafext.watch.events import print_event
from gafext.watch.peak import peak_memory

METHODS = {"prepare": "encode", "denoise": "denoise", "upsample": "upsample", "decode": "decode"}
"""Stage by the pipeline's method that it consists of."""


@dataclass
class Stage:
    """One stage of a run."""

    seconds: float
    peak_bytes: int | None


class Stages:
    """Measure the stages of a run, by name in the order in which they begin.

    Args:
        device: device of the run.
        bars: show a progress bar for each stage but denoising, which has its own.
        memory: measure the peak memory too, see `peak_memory`; on a GPU each stage waits for the one before.
        events: print a `stage` event at the end of each.
    """

    def __init__(self, device: torch.device, *, bars: bool = False, memory: bool = False, events: bool = False):
        self.device, self.bars, self.memory, self.events = device, bars, memory, events
        self.found: dict[str, Stage] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what happens in this context as the stage `name`."""
        device = self.device if self.memory else torch.device("meta")  # nothing is measured there
        start = time.perf_counter()
        with tqdm(total=1, desc=name, disable=not self.bars or name == "denoise") as bar, peak_memory(device) as peak:
            yield
            bar.update()
        self.found[name] = Stage(time.perf_counter() - start, peak.bytes)
        if self.events:
            print_event("stage", stage=name, **asdict(self.found[name]))

    @contextmanager
    def follow(self, pipeline: Any) -> Iterator[None]:
        """Measure the stages of the runs of a pipeline in this context; the methods in `METHODS` are replaced."""
        for method, name in METHODS.items():
            setattr(pipeline, method, self._measured(name, getattr(pipeline, method)))
        try:
            yield
        finally:
            for method in METHODS:
                delattr(pipeline, method)

    def _measured(self, name: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return method(*args, **kwargs)

        return measured

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return seconds and peak bytes by stage, for run.json."""
        return {name: asdict(stage) for name, stage in self.found.items()}

    def table(self) -> str:
        """Format the stages as a table with a line for the whole; of the peaks that is the largest."""
        peaks = [stage.peak_bytes for stage in self.found.values() if stage.peak_bytes is not None]
        whole = Stage(sum(stage.seconds for stage in self.found.values()), max(peaks, default=None))
        lines = [f"{'stage':10}{'seconds':>10}{'share':>8}{'peak GiB':>10}"]
        for name, stage in {**self.found, "all": whole}.items():
            peak = "" if stage.peak_bytes is None else f"{stage.peak_bytes / 2**30:.2f}"
            lines.append(f"{name:10}{stage.seconds:10.2f}{stage.seconds / whole.seconds:8.0%}{peak:>10}")
        return "\n".join(lines)
