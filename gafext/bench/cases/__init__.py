"""Cases of `gafext bench`: every operation at the shapes of published networks, against PyTorch's implementations.

An opponent is the code that one would write without gafext, in its fastest form. Inputs have the memory layout of a
projection's results, (B, L, H * D); "contiguous" gets copies in its own layout before the clock starts.

The cases of an operation of `gafext.ops` are in the file of the same name here: `shapes` lists them, and `case` builds
one. An operation without a file is compared with its `reference_*` on the inputs of its `example_*`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gafext import ops
from gafext.bench.cases.base import Case, Contestant, compiled_form

__all__ = ["Case", "Contestant", "cases"]


def cases(device: str, dtype: torch.dtype, *, compiled: bool, suite: str = "operations") -> Iterator[Case]:
    """Yield all cases of a suite; `compiled` adds contestants compiled by torch.compile to those of operations."""
    if suite != "operations":
        yield from importlib.import_module(f"{__name__}.{suite}").cases(device=device, dtype=dtype)
        return
    for op in ops.__all__:
        if importlib.util.find_spec(f"{__name__}.{op}") is None:
            yield default_case(op, device, dtype, compiled=compiled)
        else:
            module = importlib.import_module(f"{__name__}.{op}")
            for shape in module.shapes(device, dtype):
                yield module.case(*shape, compiled=compiled, device=device, dtype=dtype)


def default_case(op: str, device: str, dtype: torch.dtype, *, compiled: bool) -> Case:
    """Build the case of an operation without a file here: against its formula in PyTorch, at its module's example."""
    function = getattr(ops, op)
    module = sys.modules[function.__module__]
    reference, example = (getattr(module, f"{kind}_{op}") for kind in ("reference", "example"))
    example_args = example("meta", dtype)
    shapes = ["x".join(map(str, value.shape)) for value in example_args if isinstance(value, Tensor)]

    def of_tensors(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            return form(*(next(rest) if isinstance(value, Tensor) else value for value in example_args))

        return call

    contestants = [Contestant("gafext", of_tensors(function)), Contestant("eager", of_tensors(reference))]
    contestants += [compiled_form("eager", of_tensors(reference))] if compiled else []
    return Case(
        op=op,
        shape=",".join(shapes),
        where="example",
        bound="memory",
        flops=0,
        inputs=lambda: tuple(value for value in example(device, dtype) if isinstance(value, Tensor)),
        contestants=contestants,
    )
