"""Shared by the tests."""

from collections.abc import Callable

import pytest
import torch


def assert_same_words(function: Callable, op: Callable, make: Callable, words: str) -> None:
    """The public function, its operation and the fake kernel refuse make(zeros) in the same words."""
    for refuse, device, error in ((function, "cpu", ValueError), (op, "cpu", RuntimeError), (op, "meta", ValueError)):
        with pytest.raises(error) as raised:
            refuse(*make(lambda *shape, device=device: torch.zeros(shape, device=device)))
        assert str(raised.value) == words


def heads(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(B,H,L,D) over the memory of (B,L,H*D), as a projection leaves it."""
    return torch.randn(batch, length, num_heads, head_dim, device=device).to(dtype).transpose(1, 2)


def max_abs_diff(left: torch.Tensor, right: torch.Tensor) -> float:
    """max |left - right|, in float64; shapes must agree and every value be finite."""
    assert left.shape == right.shape, f"{tuple(left.shape)} and {tuple(right.shape)}"
    assert left.isfinite().all() and right.isfinite().all()
    return (left.double() - right.double()).abs().max().item()


@torch.no_grad()
def randomized(module: torch.nn.Module, *, seed: int) -> torch.nn.Module:
    """Fill a module with weights that hide nothing: no bias is 0 and no normalisation is 1, as fresh modules have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values *= parameter[0].numel() ** -0.5
        else:
            values = 0.2 * values + (1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(values)
    return module
