"""Cases of `gafext bench`: every operation at the shapes of published networks, against PyTorch's implementations.

An opponent is the code that one would write without gafext, in its fastest form. Inputs have the memory layout of a
projection's results, (B, L, H * D); "contiguous" gets copies in its own layout before the clock starts.

The cases of an operation of `gafext.ops` are in the file of the same name here; an operation without a file is compared
with its `reference_*` on the inputs of its `example_*`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator

import torch

from gafext import ops
from gafext.bench.cases.base import Case, Contestant, compiled_form

__all__ = ["Case", "Contestant", "cases"]


def cases(device: str, dtype: torch.dtype, *, compiled: bool) -> Iterator[Case]:
    """Yield all cases, operation by operation; `compiled` adds contestants compiled by torch.compile."""
    for op in ops.__all__:
        if importlib.util.find_spec(f"{__name__}.{op}") is None:
            yield default_case(op, device, dtype, compiled=compiled)
        else:
            yield from importlib.import_module(f"{__name__}.{op}").cases(device, dtype, compiled=compiled)


def default_case(op: str, device: str, dtype: torch.dtype, *, compiled: bool) -> Case:
    """Build the case of operation `op` against its formula in plain PyTorch, on the example inputs of its module."""
    function = getattr(ops, op)
    module = sys.modules[function.__module__]
    reference, example = (getattr(module, f"{kind}_{op}") for kind in ("reference", "example"))
    contestants = [Contestant("gafext", function), Contestant("eager", reference)]
    contestants += [compiled_form("eager", reference)] if compiled else []
    shapes = " ".join("x".join(map(str, value.shape)) for value in example("meta", dtype) if hasattr(value, "shape"))
    return Case(
        op=op,
        shape=shapes,
        where="example",
        bound="memory",
        flops=0,
        inputs=lambda: example(device, dtype),
        contestants=contestants,
    )
