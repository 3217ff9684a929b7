"""Who serves a call: the backends, the reasons against the kernels, and what asking for one by name does."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, called, channels_last, max_abs_diff

from gafext import ops
from gafext.ops.backend import check_backend, prefer, set_attention_backend, use_kernel
from gafext.ops.cross_view_attention import reference_cross_view_attention
from gafext.ops.flash_attention import unsupported_reasons


def three(*shape, **kind):
    return [torch.randn(*shape, **kind) for _ in range(3)]


CASES = {
    "float64": three(2, 3, 5, 8, dtype=torch.float64),
    "a head of 600": three(2, 3, 5, 600),
    "a last stride of 5": [x.transpose(2, 3) for x in three(2, 3, 8, 5)],
    "gradients": three(2, 3, 5, 8, requires_grad=True),
}


@pytest.mark.parametrize("case", CASES)
def test_what_no_kernel_serves_goes_to_pytorch_with_its_reason(case):
    inputs = CASES[case]
    assert len(unsupported_reasons(*inputs)) >= 1
    expected = F.scaled_dot_product_attention(*inputs)
    for backend in ("auto", "sdpa", "reference"):
        assert max_abs_diff(ops.flash_attention(*inputs, backend=backend).detach(), expected.detach()) < 1e-5


INPUTS = {  # that the kernel of the CPU serves, with "auto" too
    "conv3x3": (channels_last(1, 128, 8, 8), torch.randn(128, 128, 3, 3)),
    "conv3x3_int8": (channels_last(1, 128, 8, 8), torch.ones(128, 128, 3, 3, dtype=torch.int8), torch.rand(128)),
    "cross_view_attention": (*three(2, 4, 64, 64), 2),
    "flash_attention": three(2, 4, 64, 64),
    "geglu": (torch.randn(5, 8), torch.randn(6, 8)),
    "geglu_gate": (torch.randn(5, 8),),
    "geglu_int8": (torch.randn(5, 8), torch.ones(6, 8, dtype=torch.int8), torch.ones(6)),
    "group_norm_silu": (channels_last(2, 64, 5, 6), 4),
    "linear": (torch.randn(256, 640), torch.randn(640, 640)),
    "linear_int8": (torch.randn(5, 8), torch.ones(6, 8, dtype=torch.int8), torch.ones(6)),
}


def inputs_in(dtype, op):
    """INPUTS[op] with the floating-point tensors in a dtype, but for the scale of 8-bit weights in half precision."""
    scale = 2 if op.endswith("_int8") and dtype == torch.float16 else None
    return [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and i != scale else x
        for i, x in enumerate(INPUTS[op])
    ]


def test_every_operation_has_inputs_here():
    assert sorted(INPUTS) == sorted(ops.__all__)


@pytest.mark.parametrize("op", INPUTS)
def test_the_kernel_is_taken_where_there_is_no_reason_against_it(op, pretend_cpu):
    pretend_cpu("amx")
    function, kernel = getattr(ops, op), f"gafext::{op}"
    taken = [backend for backend in BACKENDS if kernel in called(function, *INPUTS[op], backend=backend)]
    assert taken == ["auto", "kernel"]


@pytest.mark.parametrize("op", INPUTS)
def test_kernel_is_a_demand_and_a_wrong_name_an_error(op):
    function = getattr(ops, op)
    wide = inputs_in(torch.float64, op)
    with pytest.raises(ValueError, match=f"^backend='kernel' cannot serve this {op}: .*dtype must be float32.*float64"):
        function(*wide, backend="kernel")
    assert function(*wide).dtype == torch.float64
    for inputs in (wide, INPUTS[op]):
        with pytest.raises(ValueError, match="attention backend: expected one of .* got 'fast'"):
            function(*inputs, backend="fast")


@pytest.mark.parametrize("backend", ["auto", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op in INPUTS if op != "geglu_gate"])  # which has no reasons of its own
def test_reasons_are_looked_for_once(op, dtype, backend, monkeypatch, pretend_cpu):
    pretend_cpu("amx")
    module, counts = sys.modules[f"gafext.ops.{op}"], {}

    def counted(name, function):
        def call(*args):
            counts[name] = counts.get(name, 0) + 1
            return function(*args)

        return call

    for name in ("unsupported_reasons", "slower_reasons"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    try:
        getattr(ops, op)(*inputs_in(dtype, op), backend=backend)
    except ValueError as error:
        assert backend == "kernel" and "cannot serve" in str(error)
    assert all(count == 1 for count in counts.values())
    if dtype == torch.float64:
        assert "unsupported_reasons" in counts
    if backend == "kernel":
        assert "slower_reasons" not in counts


def test_the_choice():
    assert use_kernel("auto", "op", list, list) and use_kernel("kernel", "op", list, lambda: ["slow"])
    assert not use_kernel("auto", "op", lambda: ["no"]) and not use_kernel("auto", "op", list, lambda: ["slow"])
    assert not use_kernel("sdpa", "op", list) and not use_kernel("reference", "op", list)
    with pytest.raises(ValueError, match="^backend='kernel' cannot serve this op: a; b$"):
        use_kernel("kernel", "op", lambda: ["a", "b"])
    assert [prefer(backend) for backend in BACKENDS] == ["auto", "auto", "sdpa", "reference"]
    with pytest.raises(ValueError, match="attention backend: expected one of"):
        check_backend("fast")
    with pytest.raises(ValueError, match="attention backend: expected one of"):
        set_attention_backend(torch.nn.Linear(2, 2), "fast")


@pytest.mark.parametrize("case", ["gradients", "a head of 300", "33 views"])
def test_the_way_round_the_cross_view_kernel_compiles(case):
    """Inductor in torch 2.13 makes wrong numbers of SDPA on five dimensions: the way round must not have them."""
    views = 33 if case == "33 views" else 2
    inputs = three(2 * views, 2, 5, 300 if case == "a head of 300" else 8, requires_grad=case == "gradients")
    compiled = torch.compile(ops.cross_view_attention, fullgraph=True)
    expected = reference_cross_view_attention(*inputs, views)
    assert max_abs_diff(compiled(*inputs, views).detach(), expected.detach()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [op for op in INPUTS if not op.endswith("_int8")])
def test_autocast_changes_neither_the_operators_nor_their_gradients(op, dtype):
    """Those of torch.ops.gafext, that is; the functions of gafext.ops cast as PyTorch's do."""
    inputs = inputs_in(dtype, op)
    tensors = [x.requires_grad_() for x in map(copy.deepcopy, inputs) if isinstance(x, torch.Tensor)]
    inputs = [*tensors, *(x for x in inputs if not isinstance(x, torch.Tensor))]

    def both_passes():
        out = getattr(torch.ops.gafext, op)(*inputs)
        return out, *torch.autograd.grad(out, tensors, torch.ones_like(out))

    expected = both_passes()
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        found = both_passes()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
