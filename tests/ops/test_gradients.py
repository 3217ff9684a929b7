"""Gradients against finite differences: of the formulas in float64, of the operations that are kernels in float32."""

import pytest
import torch
import torch.nn.functional as F
from helpers import channels_last, normal

from gafext.ops.conv3x3 import reference_conv3x3
from gafext.ops.cross_view_attention import reference_cross_view_attention
from gafext.ops.flash_attention import reference_flash_attention
from gafext.ops.geglu import reference_geglu, reference_geglu_gate
from gafext.ops.group_norm_silu import reference_group_norm_silu

_OPS = torch.ops.gafext
CASES = {  # operation, formula, tensors
    "flash_attention": (
        _OPS.flash_attention,
        reference_flash_attention,
        [normal(1, 2, 5, 8, seed=s) for s in range(3)],
    ),
    "causal": (
        lambda *tensors: _OPS.flash_attention(*tensors, is_causal=True),
        lambda *tensors: reference_flash_attention(*tensors, is_causal=True),
        [normal(1, 2, 5, 8, seed=s) for s in range(3)],
    ),
    "cross_view_attention": (
        lambda *tensors: _OPS.cross_view_attention(*tensors, 3),
        lambda *tensors: reference_cross_view_attention(*tensors, 3),
        [normal(6, 2, 3, 8, seed=s) for s in range(3)],
    ),
    "geglu": (_OPS.geglu, reference_geglu, [normal(3, 5), normal(14, 5, seed=1), normal(14, seed=2)]),
    "geglu_gate": (_OPS.geglu_gate, reference_geglu_gate, [normal(3, 14)]),
    "linear": (_OPS.linear, F.linear, [normal(3, 5), normal(7, 5, seed=1), normal(7, seed=2)]),
    "conv3x3": (_OPS.conv3x3, reference_conv3x3, [channels_last(1, 4, 5, 3), normal(6, 4, 3, 3), normal(6, seed=2)]),
    "group_norm_silu": (
        lambda x, *rest: _OPS.group_norm_silu(x, 2, *rest),
        lambda x, *rest: reference_group_norm_silu(x, 2, *rest),
        [channels_last(2, 4, 3, 5), normal(4, seed=1), normal(4, seed=2)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_formulas(name):
    _, formula, tensors = CASES[name]
    assert torch.autograd.gradcheck(formula, [tensor.double().requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    """Along random directions, one per tensor: the rounding of float32 allows about 1e-3 of the length."""
    op, _, tensors = CASES[name]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    weight = normal(*op(*leaves).shape, seed=3)
    gradients = torch.autograd.grad((op(*leaves) * weight).sum(), leaves)
    step = 1e-2
    for index, gradient in enumerate(gradients):
        direction = normal(*tensors[index].shape, seed=4 + index)
        direction = direction / direction.norm()
        with torch.no_grad():
            ahead, behind = (
                (op(*tensors[:index], tensors[index] + sign * step * direction, *tensors[index + 1 :]) * weight)
                .double()
                .sum()
                for sign in (1, -1)
            )
        measured = (ahead - behind).item() / (2 * step)
        assert abs(measured - (gradient * direction).sum().item()) < 1e-3 * max(1.0, gradient.norm().item())
