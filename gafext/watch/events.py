"""Lines about a run, those of JSON for scripts, and streams that nobody may be reading."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from torch import Tensor

from gafext.watch.preview import Preview


def print_event(event: str, **fields: Any) -> None:
    """Print an event with its fields as one line of JSON, at once."""
    say(json.dumps({"event": event, **fields}))


def say(text: str) -> None:
    """Print a line at once."""
    # In one write: print's newline is a second one where output is unbuffered, and those of several processes mix.
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Unread:
    """A text stream that is written to no more once nobody reads it, as after `| head`; work goes on without.

    Args:
        stream: standard output or error.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._ignore()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._ignore()

    def _ignore(self) -> None:
        """Send the stream nowhere, also what Python flushes at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def guard_streams() -> None:
    """Let a process live on without readers of its output and errors, also where they are closed (`>&-`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, Unread(stream))


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
