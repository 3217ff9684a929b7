"""Who serves what: the backends, the reasons against the kernels, and what asking for one by name does."""

import pytest
import torch
import torch.nn.functional as F
from helpers import max_abs_diff

from gafext import attention
from gafext.ops import cross_view_attention


def heads(*shape, **kind):
    return [torch.randn(*shape, **kind) for _ in range(3)]


CASES = {
    "float64": heads(2, 3, 5, 8, dtype=torch.float64),
    "a head of 600": heads(2, 3, 5, 600),
    "a last stride of 5": [x.transpose(2, 3) for x in heads(2, 3, 8, 5)],
    "gradients": heads(2, 3, 5, 8, requires_grad=True),
}


@pytest.mark.parametrize("case", CASES)
def test_what_no_kernel_serves_goes_to_pytorch_with_its_reason(case):
    inputs = CASES[case]
    assert len(attention.attention_reasons(*inputs)) >= 1
    expected = F.scaled_dot_product_attention(*inputs)
    for backend in ("auto", "sdpa", "reference"):
        assert max_abs_diff(attention.attention(*inputs, backend=backend), expected) < 1e-5
    with pytest.raises(ValueError, match="backend='kernel' cannot serve this flash_attention: "):
        attention.attention(*inputs, backend="kernel")
    with pytest.raises(ValueError, match="backend='kernel' cannot serve this cross_view_attention: "):
        attention.cross_view_attention(*inputs, 2, backend="kernel")


def test_a_mask_goes_to_pytorch():
    inputs, mask = heads(2, 3, 5, 8), torch.randn(5, 5)
    assert attention.attention_reasons(*inputs, attn_mask=mask) == [
        "a mask is given, and the kernel knows only causal masking"
    ]
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    for backend in ("auto", "sdpa", "reference"):
        assert torch.equal(attention.attention(*inputs, attn_mask=mask, backend=backend), expected)


def test_the_kernel_is_taken_where_there_is_no_reason_against_it(monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "_flash_kernel", lambda *a, **k: taken.append("flash"))
    monkeypatch.setattr(attention, "_cross_view_kernel", lambda *a, **k: taken.append("cross view"))
    monkeypatch.setattr(attention, "_geglu_kernel", lambda *a, **k: taken.append("geglu"))
    inputs = heads(2, 4, 64, 64)
    for backend in ("auto", "kernel", "sdpa", "reference"):
        attention.attention(*inputs, backend=backend)
        attention.cross_view_attention(*inputs, 2, backend=backend)
        attention.geglu(torch.randn(5, 8), torch.randn(6, 8), backend=backend)
    assert taken == ["flash", "cross view", "geglu"] * 2


@pytest.mark.parametrize("case", ["gradients", "a head of 300", "33 views"])
def test_the_way_round_the_cross_view_kernel_compiles(case):
    """Inductor in torch 2.13 makes wrong numbers of SDPA on five dimensions: the way round must not have them."""
    views = 33 if case == "33 views" else 2
    inputs = heads(2 * views, 2, 5, 300 if case == "a head of 300" else 8, requires_grad=case == "gradients")
    compiled = torch.compile(cross_view_attention, fullgraph=True)
    expected = attention.reference_cross_view_attention(*inputs, views)
    assert max_abs_diff(compiled(*inputs, views).detach(), expected.detach()) < 1e-5
