"""Backward kernels of csrc/cuda: under the emulator of tests/emulator.py, and by autograd on a GPU."""

import pytest
import torch
from emulator import EmulatorError, emulate, kernels
from emulator_build import KERNELS, needs_compiler
from helpers import DTYPES, HAS_CUDA, LAYOUTS
from helpers import heads_in_layout as heads
from torch._subclasses.fake_tensor import FakeTensorMode

from gafext.ops import cross_view_attention, geglu_gate
from gafext.ops.cross_view_attention import reference_cross_view_attention
from gafext.ops.cross_view_attention import unsupported_reasons as cross_view_attention_reasons
from gafext.ops.geglu import gate_unsupported_reasons, reference_geglu_gate

FORWARD = {
    "cross_view_attention": lambda x: cross_view_attention_reasons(x, x, x, 4),
    "geglu_gate": lambda x: gate_unsupported_reasons(x),
}
needs_gpu = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")


def true_gradients(formula, grad, *inputs):
    """Of a formula, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(formula(*leaves), leaves, grad.double())


def assert_near(found, expected, dtype):
    """Within some units in the last place of the largest number, 16 in float32 and 2 in half precision."""
    assert found.dtype == dtype and found.shape == expected.shape
    if found.numel():
        units = 16 if dtype == torch.float32 else 2
        tolerance = units * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def assert_attention(tensors, num_views, *, library=None, scale=None):
    grad, query, key, value = tensors
    found = emulate("cross_view_attention_backward", *tensors, num_views, scale=scale, library=library)

    def formula(*inputs):
        return reference_cross_view_attention(*inputs, num_views, scale=scale)

    expected = torch.stack(true_gradients(formula, grad, query, key, value))
    assert_near(found, expected, query.dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 17, 64, 65, 128, 255, 256])
def test_every_head_size(head_dim, dtype):
    assert_attention(heads("packed", 4, 4, 1, 5, head_dim, dtype), 4)


@needs_compiler
@pytest.mark.parametrize("num_views", [1, 2, 3, 5, 8, 19, 20, 27, 28, 32])
def test_every_number_of_views(num_views):
    for dtype, head_dim in ((torch.float32, 20), (torch.float16, 72), (torch.bfloat16, 7)):
        assert_attention(heads("packed", 4, num_views, 1, 3, head_dim, dtype), num_views)


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    for scale in (None, -0.7, 0.0):
        assert_attention(heads(layout, 4, 6, 2, 9, 24, torch.float32), 3, scale=scale)


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (4, 0, 3, 8), (4, 2, 0, 8)], ids=str)
def test_nothing_to_differentiate(shape):
    found = emulate("cross_view_attention_backward", *(torch.randn(shape) for _ in range(4)), 2)
    assert found.shape == (3, *shape)


@needs_compiler
def test_large_scores_do_not_overflow():
    grad, query, key, value = heads("packed", 4, 4, 1, 3, 16, torch.float32)
    assert_attention((grad, 100 * query, 100 * key, value), 4)


@needs_compiler
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (5, 3), (3, 257), (300, 32)], ids=str)
def test_gates(sizes):
    rows, inner = sizes
    for dtype in DTYPES:
        for gap in (0, 3, 8):
            projected = torch.randn(rows, 2 * inner + gap).to(dtype)[:, : 2 * inner]
            grad = torch.randn(rows, inner + gap).to(dtype)[:, :inner]
            found = emulate("geglu_gate_backward", grad, projected)
            assert_near(found, *true_gradients(reference_geglu_gate, grad, projected), dtype)


@needs_compiler
def test_the_gates_tails():
    """Where the density underflows, and where the cumulative distribution is far below 1."""
    gate = torch.linspace(-15, 15, 301)
    projected, grad = torch.stack([torch.ones(301), gate], dim=1), torch.ones(301, 1)
    found = emulate("geglu_gate_backward", grad, projected)
    [expected] = true_gradients(reference_geglu_gate, grad, projected)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


SOURCE = KERNELS / "cross_view_attention_backward.cu"
FAULTS = {
    "no barrier before the changes are read": ("    __syncwarp();\n", ""),
    "weights in the place of changes": ("grad_key.add(changes", "grad_key.add(weights"),
    "rows and columns confused": ("grad_value.add(weights[i * views + j]", "grad_value.add(weights[j * views + i]"),
    "the mean of the products left out": ("product[slot] - mean", "product[slot]"),
    "shared memory of one matrix": ("kGroups * 2 * args.views", "kGroups * args.views"),
    "the strides of another tensor": (
        "grad = read(args.grad, args.grad_stride",
        "grad = read(args.grad, args.out_stride",
    ),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    text, replacement = FAULTS[fault]
    original = SOURCE.read_text()
    assert text in original, f"{SOURCE.name} has no longer {text!r}, where a fault was planted"
    library = kernels().with_changes({SOURCE.name: original.replace(text, replacement)})
    with pytest.raises((EmulatorError, AssertionError)):
        assert_attention(heads("packed", 4, 4, 2, 5, 24, torch.float16), 4, library=library)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_views, head_dim", [(4, 64), (3, 17), (8, 40), (32, 128), (5, 256)])
def test_gradients_of_attention_on_a_gpu(num_views, head_dim, dtype):
    grad, *inputs = (t.cuda() for t in heads("packed", 4, 2 * num_views, 3, 65, head_dim, dtype))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    found = torch.autograd.grad(cross_view_attention(*leaves, num_views, backend="kernel"), leaves, grad)
    expected = true_gradients(lambda *tensors: reference_cross_view_attention(*tensors, num_views), grad, *inputs)
    for ours, true in zip(found, expected, strict=True):
        assert_near(ours, true, dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, inner", [(0, 8), (63, 65), (257, 1280)])
def test_gradients_of_the_gate_on_a_gpu(rows, inner, dtype):
    projected = torch.randn(rows, 2 * inner, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(rows, inner, device="cuda").to(dtype)
    [found] = torch.autograd.grad(geglu_gate(projected, backend="kernel"), projected, grad)
    assert_near(found, *true_gradients(reference_geglu_gate, grad, projected), dtype)


@pytest.mark.parametrize("name", FORWARD)
def test_training_takes_the_kernels_on_cuda_and_not_half_precision_on_a_cpu(name):
    def wants_pytorch(device, dtype):
        x = torch.empty(8, 2, 9, 16, device=device, dtype=dtype, requires_grad=True)
        return any("need a gradient" in reason for reason in FORWARD[name](x))

    with FakeTensorMode():
        found = {(device, dtype): wants_pytorch(device, dtype) for device in ("cuda", "cpu") for dtype in DTYPES}
    assert [where for where, wants in found.items() if wants] == [("cpu", torch.float16), ("cpu", torch.bfloat16)]
