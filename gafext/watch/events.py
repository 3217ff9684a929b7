"""Lines of JSON about a run, for scripts."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import Tensor

from gafext.watch.preview import Preview


def print_event(event: str, **fields: Any) -> None:
    """Print an event with its fields as one line of JSON, at once."""
    # In one write: print's newline is a second one where output is unbuffered, and those of several processes mix.
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


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
