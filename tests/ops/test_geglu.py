"""geglu against float64, against PyTorch's linear and gelu, and against misuse."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BAD_LAYERS,
    DTYPES,
    assert_as_exact_as_torch,
    assert_gradients,
    assert_gradients_as_exact,
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_same_when_compiled,
    assert_same_words,
    assert_second_gradients,
    called,
    mps_implementation,
    on_devices,
)

from gafext.ops import geglu, geglu_gate
from gafext.ops.geglu import reference_geglu, reference_geglu_gate, unsupported_reasons

OP, GATE = torch.ops.gafext.geglu, torch.ops.gafext.geglu_gate
GATE_BACKWARD = torch.ops.gafext.geglu_gate_backward


def problem(rows, in_features, inner, dtype=torch.float32, device="cpu"):
    x = torch.randn(rows, in_features, device=device)
    weight = torch.randn(2 * inner, in_features, device=device) * in_features**-0.5
    return x.to(dtype), weight.to(dtype), torch.randn(2 * inner, device=device).to(dtype)


def assert_exact(x, weight, bias=None):
    assert assert_as_exact_as_torch(geglu, reference_geglu, x, weight, bias).is_contiguous()


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (7, 33, 24), (65, 257, 63), (13, 640, 257), (257, 65, 31), (5, 1280, 128), (1009, 9, 5)],
    ids=str,
)
def test_odd_sizes(sizes, dtype, device):
    x, weight, bias = problem(*sizes, dtype, device)
    assert_exact(x, weight, bias)
    assert_exact(x, weight)


@on_devices
def test_value_first_gate_second(device):
    weight = torch.tensor([[2.0], [3.0]], device=device)  # value 2x, gate 3x
    x = torch.tensor([[1.0], [-1.0]], device=device)
    torch.testing.assert_close(geglu(x, weight), 2 * x * F.gelu(3 * x))


def test_gelu_is_exact():
    # x = (1, g) against weight ((1, 0), (0, 1)): 1 * gelu(g) with nothing else in the way.
    gate = torch.cat([torch.linspace(-16, 16, 100001), torch.logspace(-30, 2, 500), -torch.logspace(-30, 2, 500)])
    x = torch.stack([torch.ones_like(gate), gate], dim=1)
    out = geglu(x, torch.eye(2)).double()[:, 0]
    exact = gate.double() / 2 * (1 + torch.erf(gate.double() * 0.5**0.5))
    error = (out - exact).abs()
    assert error.max() <= 2 * (F.gelu(gate).double() - exact).abs().max()
    assert (error <= 2e-7 * gate.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("shape", [(33,), (4, 33), (2, 3, 33), (2, 1, 3, 33)], ids=str)
def test_leading_dimensions(shape):
    _, weight, bias = problem(1, 33, 24)
    assert_exact(torch.randn(shape), weight, bias)


def test_strides_without_copies():
    _, weight, bias = problem(1, 33, 24)
    wide = torch.randn(48, 40)
    wide[:, :33] = weight
    for x in (torch.randn(2, 7, 50)[..., 3:36], torch.randn(9, 66)[::2, :33], torch.randn(1, 33).expand(5, 33)):
        assert_exact(x, wide[:, :33], bias)
        operations = called(geglu, x, wide[:, :33], bias)
        assert "gafext::geglu" in operations
        assert not operations & {"aten::copy_", "aten::clone"}


def test_strides_that_need_a_copy_are_right_too():
    _, weight, bias = problem(1, 33, 24)
    assert_exact(torch.randn(33, 7).T, weight, bias)
    assert_exact(torch.randn(2, 5, 3, 33).transpose(1, 2), weight.T.contiguous().T, bias.repeat(2)[::2])


@on_devices
def test_empty_inputs(device):
    x, weight, bias = problem(3, 8, 4, device=device)
    assert geglu(x[:0], weight, bias).shape == (0, 4)
    assert geglu(x, weight[:0], bias[:0]).shape == (3, 0)
    assert torch.equal(geglu(x[:, :0], weight[:, :0]), torch.zeros(3, 4, device=device))
    given = [t.clone().requires_grad_() for t in (x[:0], weight, bias)]
    torch.ops.gafext.geglu(*given).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in given)


def test_nan_stays_in_its_row():
    x, weight, bias = problem(9, 40, 40)
    x[3, 7] = float("nan")
    out = geglu(x, weight, bias)
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()


def test_gelu_at_infinity_as_in_pytorch():
    """PyTorch's gelu of a strided gate gives infinity and, of -infinity, NaN: its vectorised kernel and the scalar tail
    alike. (Contiguous float32 of 8 elements and more goes to oneDNN, whose gelu of infinity is NaN.)
    """
    gate = torch.tensor([float("inf"), float("-inf"), float("nan"), -1e38, 1e38, -0.0, 0.0, -20.0])
    bias = torch.cat([torch.ones(64), gate.repeat(8)])
    out = geglu(torch.zeros(2, 4), torch.zeros(128, 4), bias)
    torch.testing.assert_close(out, F.gelu(bias.repeat(2, 1)[:, 64:]), equal_nan=True)
    assert out[1, 0] == float("inf") and out[1, 1:3].isnan().all() and out[1, 3:8].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_nan_infinity_and_huge_numbers_as_in_pytorch(where, dtype):
    """Of many rows, so that PyTorch's gelu sees a strided gate. Not among the patterns: infinite values at gates of -14
    to -5, where PyTorch rounds gelu to -0 and gafext does not.
    """
    x, weight, bias = problem(50, 40, 64)
    large = 1e4 if dtype == torch.float16 else 1e35
    poison = torch.tensor([float("nan"), float("inf"), float("-inf"), large, -large])
    target = {"x": x, "weight": weight, "bias": bias}[where].view(-1)
    target[torch.randperm(target.numel())[:10]] = poison.repeat(2)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    out, expected = geglu(x, weight, bias), reference_geglu(x.float(), weight.float(), bias.float())
    assert expected.isnan().any() and expected.isfinite().any()
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out, expected.to(dtype), atol=tolerance, rtol=tolerance, equal_nan=True)


def test_spoilt_rows_of_many():
    """Rows enough for the kernel that multiplies on AMX tiles, which leaves such numbers to another."""
    x, weight, bias = problem(200, 300, 70)
    x[3, 7], x[5, 0], x[9, 1], x[11] = float("inf"), float("nan"), 3.4e38, x[11] * 1e30
    out, expected = geglu(x, weight, bias), reference_geglu(x, weight, bias)
    assert expected[3].isnan().any() and expected[3].isinf().any() and expected[5].isnan().all()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("exponents", [(-100, 98), (98, -100), (-70, 0), (0, -70)], ids=str)
def test_tiny_and_huge_inputs(exponents):
    x, weight, _ = problem(65, 257, 63)
    x, weight = x * 2.0 ** exponents[0], weight * 2.0 ** exponents[1]
    bias = torch.ones(126)
    bias[:63] = 0.0  # the gate is open: out is the value's product times a number of its size
    out, exact = geglu(x, weight, bias).double(), reference_geglu(x.double(), weight.double(), bias.double())
    assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_same_bits_on_any_number_of_threads():
    assert_same_bits_on_any_number_of_threads(geglu, *problem(500, 300, 70))


BAD_INPUTS = {
    "odd weight": (lambda t: (t(3, 8), t(5, 8)), "weight must have shape (2 * inner, in_features), got (5, 8)"),
    "flat weight": (lambda t: (t(3, 8), t(8)), "weight must have shape (2 * inner, in_features), got (8,)"),
    **BAD_LAYERS,
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(geglu, OP, make, f"geglu: {words}")


def test_unsupported_goes_to_pytorch_with_the_reason():
    x, weight, bias = problem(3, 8, 4, torch.float64)
    reason = "dtype must be float32, float16 or bfloat16, got float64"
    assert unsupported_reasons(x, weight, bias) == [reason]
    assert torch.equal(geglu(x, weight, bias), reference_geglu(x, weight, bias))
    assert_refused(OP, f"geglu: {reason}", x, weight, bias)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(33,), (2, 7, 33)], ids=str)
def test_gradients(shape, with_bias):
    _, weight, bias = problem(1, 33, 24)
    tensors = [torch.randn(shape), weight, bias][: 3 if with_bias else 2]
    assert_gradients((OP, geglu), reference_geglu, *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    inputs = tuple(t.requires_grad_() for t in problem(5, 8, 4, dtype))
    torch.library.opcheck(OP.default, inputs)
    torch.library.opcheck(OP.default, inputs[:2])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    assert_same_when_compiled(geglu, (problem(rows, 33, 24) for rows in (3, 9, 17)), backend=backend)


def test_autocast_leaves_the_operator_its_dtype_where_pytorch_computes_the_product():
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((3, 6, 65), (34, 65), (34,)))
    expected = OP(x, weight, bias)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(OP(x, weight, bias), expected)


def test_autocast_as_pytorch():
    x, weight, bias = problem(5, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert geglu(x, weight, bias).dtype == torch.bfloat16


def test_the_mps_route_has_the_values_of_the_kernel():
    x, weight, bias = problem(9, 33, 24)
    torch.testing.assert_close(mps_implementation(OP)(x, weight, bias), geglu(x, weight, bias))
    h = torch.randn(5, 8)
    torch.testing.assert_close(mps_implementation(GATE)(h), geglu_gate(h))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2,), (7, 126), (2, 3, 514), (65, 66), (700, 66), (3, 20000), (0, 8), (3, 0)], ids=str
)
def test_gate_alone(shape, dtype, device):
    wide = torch.randn(*shape[:-1], shape[-1] + 6, device=device).to(dtype)
    for projected in (wide[..., 3:-3], wide[..., 3:-3].contiguous(), wide[..., 3:-3].flip(0)):
        assert assert_as_exact_as_torch(geglu_gate, reference_geglu_gate, projected).is_contiguous()


def test_gate_misuse_gradient_and_opcheck():
    words = "geglu_gate: projected must have shape (..., 2 * inner), got (3, 5)"
    assert_same_words(geglu_gate, GATE, lambda t: (t(3, 5),), words)
    h = torch.randn(5, 8)
    assert_gradients((GATE, geglu_gate), reference_geglu_gate, h)
    torch.library.opcheck(GATE.default, (h.requires_grad_(),))
    assert_same_when_compiled(geglu_gate, ((torch.randn(rows, 24),) for rows in (3, 9)), backend="aot_eager")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2,), (1, 126), (2, 63, 130), (65, 66), (257, 514), (3, 20000), (0, 8), (3, 0)], ids=str
)
def test_gate_backward(shape, dtype):
    wide = 4 * torch.randn(*shape[:-1], shape[-1] + 6)
    grad = torch.randn(*shape[:-1], shape[-1] // 2 + 3)[..., 3:].to(dtype)
    for projected in (wide.to(dtype)[..., 3:-3], wide.to(dtype)[..., 3:-3].contiguous()):

        def ours(grad, projected):
            return (GATE_BACKWARD(grad, projected),)

        assert_gradients_as_exact(ours, reference_geglu_gate, grad, projected)
        assert_gradients_as_exact(ours, reference_geglu_gate, grad.flip(0), projected)


def test_gate_backward_far_out():
    """Where the slope is 0 or 1, or the density's square overflows; PyTorch's are NaN for infinite gates."""
    gate = torch.tensor([-1e30, -100.0, -20.0, -13.0, 0.0, 13.0, 20.0, 100.0, 1e30, float("nan")])
    projected = torch.cat([torch.full_like(gate, 3.0), gate])
    grad_value, grad_gate = GATE_BACKWARD(torch.ones_like(gate), projected).chunk(2)
    torch.testing.assert_close(grad_value, F.gelu(gate), equal_nan=True)
    slopes = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, float("nan")])
    torch.testing.assert_close(grad_gate, 3 * slopes, equal_nan=True)


def test_gate_backward_misuse_opcheck_and_threads():
    grad, projected = torch.randn(70, 300), torch.randn(70, 600)
    for given, words in (
        ((torch.zeros(3, 5), torch.zeros(3, 5)), "projected must have shape (..., 2 * inner), got (3, 5)"),
        (
            (torch.zeros(3, 5), torch.zeros(3, 8)),
            "grad must have shape (..., inner) to go with projected (3, 8), got (3, 5)",
        ),
        ((grad.half(), projected), "grad must have the dtype of projected, float32, got float16"),
        ((grad.double(), projected.double()), "dtype must be float32, float16 or bfloat16, got float64"),
    ):
        assert_refused(GATE_BACKWARD, f"geglu_gate_backward: {words}", *given)
    torch.library.opcheck(GATE_BACKWARD.default, (grad[:5, :4], projected[:5, :8]))
    assert_same_bits_on_any_number_of_threads(GATE_BACKWARD, grad, projected)


def test_training_runs_the_gate_and_second_gradients_the_formula():
    x, weight, bias = (t.requires_grad_() for t in problem(5, 8, 4))
    assert "gafext::geglu_gate" in called(lambda: geglu(x, weight, bias))
    assert "gafext::geglu_gate_backward" in called(lambda: geglu(x, weight, bias).sum().backward())
    for function in (OP, geglu):
        assert_second_gradients(function, reference_geglu, x, weight, bias)
    out = GATE_BACKWARD(torch.randn(5, 4), torch.randn(5, 8).requires_grad_())
    with pytest.raises(NotImplementedError, match="geglu_gate_backward: has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_backward_pass_runs_the_kernel(backend):
    h = torch.randn(9, 24, requires_grad=True)
    compiled = torch.compile(geglu_gate, backend=backend, fullgraph=True)
    out = compiled(h)
    assert "gafext::geglu_gate_backward" in called(lambda: out.sum().backward())
    assert_gradients((compiled,), reference_geglu_gate, h.detach())
