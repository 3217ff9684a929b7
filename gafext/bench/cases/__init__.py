"""The cases of `gafext bench`: every operation at the shapes of the published networks, against PyTorch's forms.

An opponent is the code that one would write without gafext, in the form that suits it best. Inputs lie in memory as a
projection leaves them, (B, L, H * D); "contiguous" is given copies in its own layout before the clock starts.

The operations are those of `gafext.ops`. The cases of one are in the file of its name here; an operation without a file
races its `reference_*` at the inputs of its `example_*`.
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
    """Every case, operation by operation; `compiled` adds the contestants that torch.compile makes."""
    for op in ops.__all__:
        if importlib.util.find_spec(f"{__name__}.{op}") is None:
            yield default_case(op, device, dtype, compiled=compiled)
        else:
            yield from importlib.import_module(f"{__name__}.{op}").cases(device, dtype, compiled=compiled)


def default_case(op: str, device: str, dtype: torch.dtype, *, compiled: bool) -> Case:
    """The operation `op` against the formula in plain PyTorch, at the inputs that its module gives as an example."""
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
