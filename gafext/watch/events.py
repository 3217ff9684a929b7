"""Lines about a run, those of JSON for scripts."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from torch import Tensor

from gafext.watch.preview import Preview


def print_event(event: str, **fields: Any) -> None:
    """Print an event with its fields as one line of JSON, at once."""
    say(json.dumps({"event": event, **fields}))


def say(text: str) -> None:
    """Print a line at once; where nobody reads any more, as after `| head`, work goes on without."""
    try:
        # In one write: print's newline is a second one where output is unbuffered, and those of several processes mix.
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        ignore_output()


def ignore_output() -> None:
    """Send standard output nowhere, also what Python flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class StepEvents:
    """A `callback_on_step_end` that prints a `progress` event at every step.

    Args:
        preview: called after it; None for none.
    """

    def __init__(self, preview: Preview | None = None):
        self.preview = preview
        self.tensor_inputs = () if preview is None else preview.tensor_inputs

    def __call__(self, pipeline: Any, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        print_event("progress", step=step + 1, timestep=float(timestep))
        if self.preview is not None:
            self.preview(pipeline, step, timestep, tensors)
