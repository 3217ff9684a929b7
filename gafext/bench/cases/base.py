"""A case of the benchmark, its contestants, and the forms that several operations share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Contestant:
    name: str
    run: Callable[..., Tensor]
    prepare: Callable[..., tuple] | None = None  # of the inputs, before the clock starts: copies, packed weights
    context: Callable[[], AbstractContextManager] = nullcontext  # entered around a turn
    optional: bool = False  # left out, with its reason, where it cannot run
    compiled: bool = False  # by torch.compile, in its first call


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    where: str
    bound: str  # "compute" or "memory": which ceiling the table shows
    flops: int  # of the formula: a multiplication and an addition count two; softmax and gelu none
    inputs: Callable[[], tuple[Tensor, ...]]
    contestants: list[Contestant]  # ours first
    ours: str = "gafext"  # whom the opponents are compared with


def compiled_form(name: str, run: Callable[..., Tensor]) -> Contestant:
    """One shape at a time: what torch.compile makes of known sizes is faster."""
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    return Contestant(f"{name} compiled", compiled, optional=True, compiled=True)


def heads_first(batch: int, length: int, heads: int, head_dim: int, **kind) -> Tensor:
    """[B,H,L,D] in the memory of [B,L,H*D]."""
    return torch.randn(batch, length, heads * head_dim, **kind).unflatten(-1, (heads, head_dim)).transpose(1, 2)


def contiguous(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def pinned(name: str, run: Callable[..., Tensor], backend: SDPBackend) -> Contestant:
    return Contestant(name, run, context=partial(sdpa_kernel, backend), optional=True)


def pack_by_mkl(x: Tensor, weight: Tensor, bias: Tensor) -> tuple:
    return x, torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x)), weight, bias


def linear_packed_by_mkl(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What Inductor makes of a linear layer whose weights are frozen."""
    return torch.ops.mkl._mkl_linear(x, packed, weight, bias, len(x))


def channels_last(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
