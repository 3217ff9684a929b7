"""Cases and contestants of the benchmark, and helpers that several operations share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Contestant:
    """One implementation of an operation."""

    name: str
    run: Callable[..., Tensor]
    prepare: Callable[..., tuple] | None = None  # converts the inputs before the clock starts: copies, packed weights
    context: Callable[[], AbstractContextManager] = nullcontext  # entered around a turn
    optional: bool = False  # skipped with the reason if it cannot run
    compiled: bool = False  # by torch.compile, in its first call


@dataclass(frozen=True)
class Case:
    """An operation at one shape, with its contestants."""

    op: str
    shape: str
    where: str  # the layer of a network with this shape
    bound: str  # "compute" or "memory": the ceiling in the table
    flops: int  # of the formula: multiplications and additions, without softmax and gelu
    inputs: Callable[[], tuple[Tensor, ...]]
    contestants: list[Contestant]  # gafext's first
    ours: str = "gafext"  # the contestant that the others are compared with
    tolerance: float | None = None  # of results, relative to the largest; None: that of rounding in their dtype
    memory: bool = False  # also measure the peak memory of a call


def compiled_form(name: str, run: Callable[..., Tensor]) -> Contestant:
    """Compile for one shape at a time, because code for known sizes is faster."""
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    return Contestant(f"{name} compiled", compiled, optional=True, compiled=True)


def heads_first(batch: int, length: int, heads: int, head_dim: int, **options: Any) -> Tensor:
    """Draw random [B,H,L,D] in the memory layout [B,L,H*D]."""
    return torch.randn(batch, length, heads * head_dim, **options).unflatten(-1, (heads, head_dim)).transpose(1, 2)


def contiguous(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def pinned(name: str, run: Callable[..., Tensor], backend: SDPBackend) -> Contestant:
    return Contestant(name, run, context=partial(sdpa_kernel, backend), optional=True)


def pack_by_mkl(x: Tensor, weight: Tensor, bias: Tensor) -> tuple:
    return x, torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x)), weight, bias


def linear_packed_by_mkl(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer with packed weights, as Inductor does when weights are frozen."""
    return torch.ops.mkl._mkl_linear(x, packed, weight, bias, len(x))


def channels_last(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
