"""linear_int8 against the exact sums of the same rounded numbers, against float32, and against misuse."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_refused, assert_same_bits_on_any_number_of_threads, assert_same_words, called, max_abs_diff

from gafext import _C, ops
from gafext.ops.geglu import reference_geglu_gate
from gafext.ops.linear_int8 import MAX_FEATURES, quantize_weight, reference_linear_int8, unsupported_reasons

OP = torch.ops.gafext.linear_int8
SIZES = [
    (1, 1, 1),
    (7, 33, 24),
    (33, 31, 65),
    (65, 257, 63),
    (13, 640, 257),
    (257, 65, 31),
    (300, 1283, 90),
    (1009, 9, 5),
    (31, 2000, 700),
    (19, 2700, 130),  # several slices of features with every instruction set
]


def whole_problem(rows, in_features, out_features):
    """Rows that round to themselves: whole numbers up to 127, times a power of two of each row."""
    x = torch.randint(-127, 128, (rows, in_features)).float()
    x[:, 0] = 127
    x *= 2.0 ** torch.randint(-20, 20, (rows, 1))
    weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    return x, weight, 2.0 ** torch.randint(-9, 9, (out_features,)).float(), torch.randn(out_features)


def problem(rows, in_features, out_features):
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    return torch.randn(rows, in_features), *quantize_weight(weight), torch.randn(out_features)


def assert_exact(x, weight, scale, bias=None):
    out = OP(x, weight, scale, bias)
    exact = (x.double() @ weight.double().T) * scale.double()
    assert torch.equal(OP(x, weight, scale), exact.float())
    exact = exact if bias is None else exact + bias.double()
    torch.testing.assert_close(out, exact.float(), rtol=2e-7, atol=1e-7)  # one rounding of the product, one of the sum
    assert out.is_contiguous()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_are_exact_at_odd_sizes(sizes):
    assert_exact(*whole_problem(*sizes))


def test_the_largest_sums_are_exact():
    x = torch.full((3, MAX_FEATURES), 127.0)
    weight = torch.full((2, MAX_FEATURES), -127, dtype=torch.int8)
    weight[1] = 127
    scale = torch.ones(2)
    assert OP(x, weight, scale).tolist() == [[-(127.0**2) * MAX_FEATURES, 127.0**2 * MAX_FEATURES]] * 3


@pytest.mark.parametrize("sizes", [(2048, 320, 320), (100, 1280, 640), (65, 257, 63)], ids=str)
def test_close_to_float32(sizes):
    weight = torch.randn(sizes[2], sizes[1]) * sizes[1] ** -0.5
    x, exact_bias = torch.randn(sizes[0], sizes[1]) * torch.logspace(-3, 3, sizes[0])[:, None], torch.zeros(sizes[2])
    exact = F.linear(x, weight, exact_bias)
    out = OP(x, *quantize_weight(weight), exact_bias)
    errors = (out - exact).norm(dim=1) / exact.norm(dim=1)
    assert 1e-4 < errors.max() < 0.02


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_formula_in_pytorch(sizes):
    """A number halfway between two integers may round to either: then one product differs, by a step."""
    x, weight, scale, bias = problem(*sizes)
    out, formula = OP(x, weight, scale, bias), reference_linear_int8(x, weight, scale, bias)
    step = x.abs().amax(1, keepdim=True) / 127 * scale * 127
    assert ((out - formula).abs() <= 2 * step + 1e-5).all()
    assert ((out - formula).abs() <= 1e-4).float().mean() > 0.9
    assert torch.equal(ops.linear_int8(x, weight, scale, bias, backend="reference"), formula)


@pytest.mark.parametrize("shape", [(33,), (4, 33), (2, 3, 33)], ids=str)
def test_leading_dimensions(shape):
    _, weight, scale, bias = whole_problem(1, 33, 24)
    x = torch.randint(-127, 128, shape).float()
    x[..., 5] = -127
    assert_exact(x, weight, scale, bias)


def test_strides():
    x, weight, scale, bias = whole_problem(48, 40, 24)
    x[:, 3] = 127 * x[:, 0] / 127
    for rows in (x[::2, 3:36], x[3:4, 3:36].expand(5, 33), x[:, 3:36].T.contiguous().T):
        assert_exact(rows, weight[:, :33], scale, bias)
        assert_exact(rows, weight[::2, 5:38], scale[::2], bias[::2])
        assert_exact(rows, weight[:, :33].T.contiguous().T, scale.repeat(2)[::2].contiguous(), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_residual_is_added_before_rounding(sizes, dtype):
    x, weight, scale, bias = problem(*sizes)
    x, bias, residual = x.to(dtype), bias.to(dtype), torch.randn(sizes[0], 2 * sizes[2]).to(dtype)
    for added in (residual[:, : sizes[2]], residual[:, 1::2], residual[:, sizes[2] :].contiguous()):
        exact = OP(x.float(), weight, scale, bias.float()) + added.float()
        assert torch.equal(OP(x, weight, scale, bias, added), exact.to(dtype))
        formula = reference_linear_int8(x, weight, scale, bias, added)
        torch.testing.assert_close(OP(x, weight, scale, bias, added), formula, atol=0.1, rtol=0.03)
    torch.testing.assert_close(OP(x, weight, scale, None, added), OP(x, weight, scale) + added, atol=0.05, rtol=0.02)


def test_a_residual_of_leading_dimensions():
    x, weight, scale, bias = problem(24, 33, 17)
    residual = torch.randn(2, 17, 12).transpose(1, 2)  # neither contiguous nor of one stride from row to row
    out = ops.linear_int8(x.view(2, 12, 33), weight, scale, bias, residual)
    assert torch.equal(out, OP(x, weight, scale, bias).view(2, 12, 17) + residual)
    reference = ops.linear_int8(x.view(2, 12, 33), weight, scale, bias, residual, backend="reference")
    assert torch.equal(
        reference, ops.linear_int8(x, weight, scale, bias, backend="reference").view(2, 12, 17) + residual
    )


def test_empty_inputs():
    x, weight, scale, bias = problem(10, 8, 4)
    for function in (OP, ops.linear_int8, reference_linear_int8):
        assert function(x[:0], weight, scale, bias).shape == (0, 4)
        assert function(x, weight[:0], scale[:0], bias[:0]).shape == (10, 0)
        assert torch.equal(function(x[:, :0], weight[:, :0], scale, bias), bias.expand(10, 4))


def test_a_row_that_is_not_finite_is_nan_and_no_other():
    x, weight, scale, bias = problem(70, 65, 33)
    good = OP(x, weight, scale, bias)
    x[3, 64], x[20, 0], x[69, 7] = float("nan"), float("inf"), float("-inf")
    for function in (OP, reference_linear_int8):
        out = function(x, weight, scale, bias)
        assert out.isnan().all(1).nonzero().flatten().tolist() == [3, 20, 69]
    kept = ~OP(x, weight, scale, bias).isnan().any(1)
    assert torch.equal(OP(x, weight, scale, bias)[kept], good[kept])


def test_tiny_and_huge_rows():
    x, weight, scale, _ = whole_problem(4, 65, 33)
    x = x / x[:, :1] * 127 * torch.tensor([2.0**-133, 2.0**-120, 2.0**110, 0.0])[:, None]
    out, exact = OP(x, weight, scale).double(), (x.double() @ weight.double().T) * scale.double()
    assert torch.equal(out[1:], exact.float().double()[1:])
    assert (out[0] - exact[0]).abs().max() <= 2.0**-126 * 127 * 65 * scale.max()  # below float32's normal numbers


@pytest.mark.parametrize("sizes", [(500, 300, 70), (70, 1300, 500)], ids=str)
def test_same_bits_on_any_number_of_threads(sizes):
    assert_same_bits_on_any_number_of_threads(OP, *problem(*sizes))


@pytest.mark.parametrize("instruction_set", _C.build_info()["instruction_sets"])
def test_every_instruction_set(instruction_set):
    """All that this processor has compute the same sums; portable runs the shifted quads of AVX512_VNNI."""
    environment = {**os.environ, "GAFEXT_INSTRUCTION_SET": instruction_set, "OMP_NUM_THREADS": "1"}
    environment.pop("GAFEXT_EMULATED_CPU", None)
    tests = [
        f"{__file__}::{name}" for name in ("test_sums_are_exact_at_odd_sizes", "test_strides", "test_empty_inputs")
    ]
    more = ("test_a_row_that_is_not_finite_is_nan_and_no_other", "test_a_residual_is_added_before_rounding")
    tests += [f"{__file__}::{name}" for name in (*more, "test_geglu_is_the_gate_of_the_layer")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "has no such kernels" in done.stdout + done.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert done.returncode == 0, done.stdout


def whole(t, *shape):
    return t(*shape).to(torch.int8)


BAD_INPUTS = {
    "flat weight": (
        lambda t: (t(3, 8), whole(t, 8), t(8)),
        "weight must have shape (out_features, in_features), got (8,)",
    ),
    "weight dtype": (lambda t: (t(3, 8), t(6, 8), t(6)), "weight must have dtype int8, got float32"),
    "columns": (
        lambda t: (t(3, 8), whole(t, 6, 9), t(6)),
        "x must have shape (..., 9) to go with weight (6, 9), got (3, 8)",
    ),
    "scalar": (lambda t: (t(), whole(t, 6, 1), t(6)), "x must have shape (..., 1) to go with weight (6, 1), got ()"),
    "scale": (
        lambda t: (t(3, 8), whole(t, 6, 8), t(6, 1)),
        "scale must have shape (6,) to go with weight (6, 8), got (6, 1)",
    ),
    "scale dtype": (
        lambda t: (t(3, 8), whole(t, 6, 8), t(6).half()),
        "scale must have dtype float32, got float16",
    ),
    "bias": (
        lambda t: (t(3, 8), whole(t, 6, 8), t(6), t(3)),
        "bias must have shape (6,) to go with weight (6, 8), got (3,)",
    ),
    "bias dtype": (
        lambda t: (t(3, 8), whole(t, 6, 8), t(6), t(6).double()),
        "bias must have the dtype of x, float32, got float64",
    ),
    "residual": (
        lambda t: (t(3, 8), whole(t, 6, 8), t(6), t(6), t(6)),
        "residual must have shape (..., 6) to go with x (3, 8), got (6,)",
    ),
    "residual dtype": (
        lambda t: (t(3, 8), whole(t, 6, 8), t(6), None, t(3, 6).double()),
        "residual must have the dtype of x, float32, got float64",
    ),
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(ops.linear_int8, OP, make, f"linear_int8: {words}")


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 8, 2), (31, 64, 40), (32, 63, 17), (100, 257, 65), (0, 8, 4)], ids=str)
def test_geglu_is_the_gate_of_the_layer(sizes, dtype, most):
    rows, in_features, inner = sizes
    x, weight, scale, bias = problem(rows, in_features, 2 * inner)
    x, bias = x.to(dtype), bias.to(dtype)
    exact = reference_geglu_gate(reference_linear_int8(x.double(), weight, scale.double(), bias.double()))
    out = torch.ops.gafext.geglu_int8(x, weight, scale, bias)
    assert out.shape == (rows, inner) and out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=most, rtol=most)
    torch.testing.assert_close(ops.geglu_int8(x, weight, scale, bias, backend="reference"), out, atol=most, rtol=most)
    without = reference_geglu_gate(reference_linear_int8(x.double(), weight, scale.double()))
    torch.testing.assert_close(ops.geglu_int8(x, weight, scale).double(), without, atol=most, rtol=most)


def test_geglu_misuse_opcheck_and_threads():
    op = torch.ops.gafext.geglu_int8
    words = "geglu_int8: weight must have shape (2 * inner, in_features), got (5, 8)"
    assert_same_words(ops.geglu_int8, op, lambda t: (t(3, 8), whole(t, 5, 8), t(5)), words)
    torch.library.opcheck(op.default, problem(40, 8, 4))
    assert_same_bits_on_any_number_of_threads(op, *problem(500, 70, 300))


def test_unsupported_goes_to_the_formula_with_the_reason():
    x, weight, scale, bias = problem(10, 8, 4)
    inputs = (x.double(), weight, scale.double(), bias.double())
    assert unsupported_reasons(*inputs) == ["dtype must be float32, float16 or bfloat16, got float64"]
    assert_refused(OP, "linear_int8: dtype must be float32, float16 or bfloat16, got float64", *inputs)
    assert "gafext::linear_int8" not in called(ops.linear_int8, *inputs)
    assert "gafext::linear_int8" in called(ops.linear_int8, x, weight, scale, bias)
    wide = (torch.zeros(1, MAX_FEATURES + 1), torch.zeros(1, MAX_FEATURES + 1, dtype=torch.int8), torch.ones(1))
    assert unsupported_reasons(*wide) == [f"in_features must be at most {MAX_FEATURES}, got {MAX_FEATURES + 1}"]
    assert_refused(OP, f"linear_int8: in_features must be at most {MAX_FEATURES}, got {MAX_FEATURES + 1}", *wide)
    with pytest.raises(ValueError, match="backend='kernel' cannot serve this linear_int8: inputs need a gradient"):
        ops.linear_int8(x.requires_grad_(), weight, scale, bias, backend="kernel")
    for call in (ops.linear_int8, ops.geglu_int8):
        with pytest.raises(ValueError, match="_int8: x must not need a gradient: rounding has none"):
            call(x, weight, scale, bias)


@torch.no_grad()
def test_more_rows_than_are_rounded_at_a_time():
    """Blocks of 1024 rows where they are this long; of a layer with a gate and of one with a residual."""
    x, weight, scale, bias = problem(2050, 12290, 6)
    residual = torch.randn(2050, 6)
    out, gated = ops.linear_int8(x, weight, scale, bias, residual), ops.geglu_int8(x, weight, scale, bias)
    for rows in (slice(1000, 1048), slice(2040, 2050)):
        assert torch.equal(out[rows], ops.linear_int8(x[rows], weight, scale, bias, residual[rows]))
        assert torch.equal(gated[rows], ops.geglu_int8(x[rows], weight, scale, bias))


@torch.no_grad()
def test_autocast_as_pytorch():
    x, weight, scale, bias = problem(40, 64, 32)
    for call in (ops.linear_int8, ops.geglu_int8):
        with torch.autocast("cpu", torch.bfloat16):
            out = call(x, weight, scale, bias)
        assert torch.equal(out, call(x.bfloat16(), weight, scale, bias.bfloat16()))


def test_exports_with_any_number_of_features():
    x, weight, scale, _ = problem(5, 48, 32)
    features = torch.export.Dim("features", max=MAX_FEATURES)

    class Layer(torch.nn.Module):
        def forward(self, x, weight, scale):
            return ops.linear_int8(x, weight, scale)

    program = torch.export.export(
        Layer(), (x, weight, scale), dynamic_shapes={"x": {1: features}, "weight": {1: features}, "scale": None}
    )
    x, weight, scale, _ = problem(5, 50, 32)
    assert torch.equal(program.module()(x, weight, scale), ops.linear_int8(x, weight, scale))


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype, rows):
    x, weight, scale, bias = problem(rows, 77, 45)
    x, bias = x.to(dtype), bias.to(dtype)
    out = OP(x, weight, scale, bias)
    assert torch.equal(out, OP(x.float(), weight, scale, bias.float()).to(dtype))
    assert max_abs_diff(out, ops.linear_int8(x, weight, scale, bias, backend="reference")) <= 0.01 * out.abs().max()


def test_opcheck():
    torch.library.opcheck(OP.default, problem(40, 8, 4))
    torch.library.opcheck(OP.default, problem(40, 8, 4)[:3])
    torch.library.opcheck(OP.default, (*problem(40, 8, 4), torch.randn(40, 4)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    whole = torch.compile(ops.linear_int8, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 99):
            inputs = problem(rows, 33, 24)
            assert torch.equal(whole(*inputs), OP(*inputs))
