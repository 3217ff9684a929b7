"""What serves each operation on a device and why, and a small call of each against its formula."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gafext import ops
from gafext.ops.linear_int8 import slower_than_float32

SIZES = "the first stage of Stable Diffusion 2.1's U-Net, 4 views with guidance, 32×32 latents"
OPERATIONS = tuple(name for name in ops.__all__ if name != "geglu_gate")  # which is served as geglu is
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_VIEWS, _ROWS, _WIDTH, _HEADS = 4, 8, 320, 5
_TOLERANCE = 0.02  # twice what 8-bit weights and inputs lose


def choices(device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Ask every operation what serves a call with backend="auto".

    Args:
        device: of the inputs, whose sizes are `SIZES`.

    Returns:
        By operation, entries of `dtypes`, `uses` ("kernel" or "PyTorch") and `why`, the reasons against the kernel.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for op in OPERATIONS:
        for dtype in _DTYPES[:1] if op.endswith("_int8") else _DTYPES:
            why = _reasons(op, _inputs(op, 32, device, dtype, torch.empty))
            entry = {"dtypes": [], "uses": "PyTorch" if why else "kernel", "why": why}
            known = next((other for other in found.setdefault(op, []) if other["why"] == why), None)
            if known is None:
                found[op].append(known := entry)
            known["dtypes"].append(str(dtype).removeprefix("torch."))
    return found


def _reasons(op: str, inputs: tuple[Any, ...]) -> list[str]:
    module = importlib.import_module(f"gafext.ops.{op}")  # of ops, the attribute is the function
    if inputs[0].device.type == "mps":
        return ["there is no kernel for MPS"]
    reasons = module.unsupported_reasons(*inputs)
    if not reasons and hasattr(module, "slower_reasons"):
        reasons = module.slower_reasons(*inputs[: len(inspect.signature(module.slower_reasons).parameters)])
    return reasons


def failures(device: torch.device) -> dict[str, str]:
    """Call every operation once in float32, on 8×8 latents, and compare it with its formula.

    Args:
        device: to call them on.

    Returns:
        What went wrong, by operation.
    """
    failed = {}
    for op in OPERATIONS:
        function, inputs = getattr(ops, op), _inputs(op, 8, device, torch.float32, torch.rand)
        try:
            expected = function(*inputs, backend="reference")
            error = ((function(*inputs) - expected).norm() / expected.norm()).item()
        except (RuntimeError, ValueError) as problem:
            failed[op] = str(problem).splitlines()[0]
        else:
            if not error < _TOLERANCE:
                failed[op] = f"its result is off the formula's by {100 * error:.3g} %"
    return failed


def slow_int8() -> list[str]:
    """List why 8-bit weights do not pay on this processor."""
    return slower_than_float32()


def _inputs(
    op: str, side: int, device: torch.device, dtype: torch.dtype, fill: Callable[..., Tensor]
) -> tuple[Any, ...]:
    """Make the positional arguments of an operation for latents of side², values of `fill`."""

    def tensor(*shape: int) -> Tensor:
        return fill(shape, device=device, dtype=dtype)

    def weight(*shape: int) -> Tensor:
        return torch.ones(shape, device=device, dtype=torch.int8) if op.endswith("_int8") else tensor(*shape)

    def scale(width: int) -> list[Tensor]:
        return [fill((width,), device=device, dtype=torch.float32)] * op.endswith("_int8")

    x = tensor(_ROWS, side**2, _WIDTH)
    if op.endswith("attention"):
        heads = tuple(tensor(*x.shape).unflatten(2, (_HEADS, -1)).transpose(1, 2) for _ in range(3))
        return (*heads, _VIEWS) if op.startswith("cross_view") else heads
    bias = tensor(_WIDTH)
    if op.startswith("geglu") and op != "geglu_gate":
        return x, weight(2560, _WIDTH), *scale(2560), tensor(2560)
    if op.startswith("linear"):
        return x, weight(_WIDTH, _WIDTH), *scale(_WIDTH), bias
    image = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if op == "group_norm_silu":
        return image, 32, tensor(_WIDTH), bias
    return image, weight(_WIDTH, _WIDTH, 3, 3), *scale(_WIDTH), bias
