"""linear against float64, against PyTorch's linear, and against misuse."""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BAD_LAYERS,
    DTYPES,
    assert_as_exact_as_torch,
    assert_gradients,
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_same_words,
    called,
)
from torch import nn

from gafext import _C, ops
from gafext.models import int8
from gafext.models.blocks import Attention, FeedForward
from gafext.ops.backend import set_attention_backend
from gafext.ops.linear import linear_layer, slower_reasons, unsupported_reasons

OP = torch.ops.gafext.linear
HAS_AMX = _C.build_info()["instruction_set"] == "amx" and os.environ.get("GAFEXT_EMULATED_CPU", "amx") == "amx"


def problem(rows, in_features, out_features):
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    return torch.randn(rows, in_features), weight, torch.randn(out_features)


def assert_exact(x, weight, bias=None):
    assert assert_as_exact_as_torch(OP, F.linear, x, weight, bias).is_contiguous()


def calls_kernel(function, *args, **options):
    return "gafext::linear" in called(function, *args, **options)


SIZES = [
    (1, 1, 1),
    (7, 33, 24),
    (33, 31, 65),
    (65, 257, 63),
    (13, 640, 257),
    (257, 65, 31),
    (300, 1283, 90),
    (90, 1283, 300),
    (1009, 9, 5),
    (31, 2000, 700),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(sizes, dtype):
    x, weight, bias = (t.to(dtype) for t in problem(*sizes))
    assert_exact(x, weight, bias)
    assert_exact(x, weight)


@pytest.mark.parametrize("sizes", [(2048, 640, 640), (512, 1280, 1280), (128, 5120, 1280), (257, 1280, 5120)], ids=str)
def test_more_exact_than_pytorch_where_it_is_used(sizes):
    x, weight, bias = problem(*sizes)
    exact = F.linear(x.double(), weight.double(), bias.double())
    error, torchs = (
        (t.double() - exact).square().mean().sqrt() for t in (OP(x, weight, bias), F.linear(x, weight, bias))
    )
    assert error <= (0.8 if HAS_AMX else 1.0) * torchs


def test_more_than_fits_the_scratch_memory():
    assert_exact(*problem(1200, 5120, 1240))  # either operand split takes 37 MB; 24 MB at a time


@pytest.mark.parametrize("shape", [(33,), (4, 33), (2, 3, 33), (2, 1, 3, 33)], ids=str)
def test_leading_dimensions(shape):
    _, weight, bias = problem(1, 33, 24)
    assert_exact(torch.randn(shape), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    _, weight, bias = (t.to(dtype) for t in problem(1, 33, 24))
    wide = torch.randn(48, 40, dtype=dtype)
    wide[:, :33] = weight.repeat(2, 1)
    packed, apart = torch.randn(2, 7, 50, dtype=dtype), torch.randn(9, 66, dtype=dtype)
    for x in (packed[..., 3:36], apart[::2, :33], apart[:1, :33].expand(5, 33)):
        assert_exact(x, wide[:24, :33], bias)
        assert_exact(x, wide[::2, :33], bias)
    assert_exact(torch.randn(33, 7, dtype=dtype).T, weight, bias)
    x = torch.randn(2, 5, 3, 33, dtype=dtype).transpose(1, 2)
    assert_exact(x, weight.T.contiguous().T, bias.repeat(2)[::2])


def test_empty_inputs():
    x, weight, bias = problem(100, 8, 4)
    for function in (OP, ops.linear):
        assert function(x[:0], weight, bias).shape == (0, 4)
        assert function(x, weight[:0], bias[:0]).shape == (100, 0)
        assert torch.equal(function(x[:, :0], weight[:, :0], bias), bias.expand(100, 4))
    for rows, outputs, inputs in ((0, 4, 8), (3, 0, 8), (3, 4, 0)):
        given = [t.clone().requires_grad_() for t in (x[:rows, :inputs], weight[:outputs, :inputs], bias[:outputs])]
        for function in (OP, F.linear):
            function(*given).sum().backward()
        assert all(torch.equal(t.grad, 2 * torch.autograd.grad(F.linear(*given).sum(), t)[0]) for t in given)


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_nan_infinity_and_huge_numbers_as_in_pytorch(where):
    x, weight, bias = problem(150, 40, 64)
    poison = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e35, -1e35])
    target = {"x": x, "weight": weight, "bias": bias}[where].view(-1)
    target[torch.randperm(target.numel())[:10]] = poison.repeat(2)
    out, expected = ops.linear(x, weight, bias), F.linear(x, weight, bias)
    assert expected.isnan().any() and expected.isfinite().any()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("exponents", [(-100, 98), (98, -100), (-130, 0), (0, -130), (-70, 0), (0, -70)], ids=str)
def test_tiny_and_huge_inputs(exponents):
    x, weight, _ = problem(130, 257, 63)
    x, weight = x * 2.0 ** exponents[0], weight * 2.0 ** exponents[1]
    out, exact = OP(x, weight).double(), F.linear(x.double(), weight.double())
    assert (out - exact).abs().max() <= 1e-6 * exact.abs().max() + 2.0**-143  # subnormal sums round to 2^-149


@pytest.mark.parametrize("sizes", [(500, 300, 70), (70, 1300, 500)], ids=str)
def test_same_bits_on_any_number_of_threads(sizes):
    counts = (1, 2, 3) if HAS_AMX else (1,)
    assert_same_bits_on_any_number_of_threads(OP, *problem(*sizes), counts=counts)


BAD_INPUTS = {
    "flat weight": (lambda t: (t(3, 8), t(8)), "weight must have shape (out_features, in_features), got (8,)"),
    **BAD_LAYERS,
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(ops.linear, OP, make, f"linear: {words}")


def test_unsupported_goes_to_pytorch_with_the_reason():
    inputs = [t.double() for t in problem(100, 8, 4)]
    reason = "dtype must be float32, float16 or bfloat16, got float64"
    assert unsupported_reasons(*inputs) == [reason]
    assert torch.equal(ops.linear(*inputs), F.linear(*inputs))
    assert_refused(OP, f"linear: {reason}", *inputs)


def test_what_pytorch_does_faster_goes_to_pytorch_with_the_reason(pretend_cpu):
    few, many = problem(191, 40, 40), problem(192, 40, 40)
    pretend_cpu("amx")
    assert slower_reasons(few[0]) == ["fewer than 192 rows do not pay for splitting the weights"]
    assert (
        slower_reasons(many[0]) == slower_reasons(many[0].view(3, 64, 40)) == slower_reasons(torch.ones(128, 640)) == []
    )
    assert slower_reasons(torch.ones(127, 640)) == ["fewer than 128 rows do not pay for splitting the weights"]
    assert not calls_kernel(ops.linear, *few) and calls_kernel(ops.linear, *many)
    pretend_cpu("avx512")
    assert slower_reasons(many[0])[0].startswith("without AMX it is PyTorch's")
    assert not calls_kernel(ops.linear, *many)


def test_float32_runs_the_kernel_where_it_outruns_mkl(pretend_cpu):
    pretend_cpu("avx512", zen=5)
    reason = "fewer than 1048576 products, or one row, do not pay for calling the kernel"
    for rows, features, outputs, few in ((1, 1280, 1280, True), (2, 1280, 1280, False), (8, 320, 320, True)):
        x, weight, bias = problem(rows, features, outputs)
        assert slower_reasons(x, weight) == ([reason] if few else [])
        assert calls_kernel(ops.linear, x, weight, bias) != few
    assert slower_reasons(torch.ones(11, 320)) == [] and slower_reasons(torch.ones(320)) == [reason]
    half = torch.ones(64, 320).bfloat16()
    assert slower_reasons(half) == ["this processor multiplies half precision, and PyTorch makes use of it"]
    with torch.autocast("cpu", torch.bfloat16):
        assert slower_reasons(half.float()) == slower_reasons(half)


def test_zen_4_runs_the_kernel_for_many_products(pretend_cpu):
    pretend_cpu("avx512", bfloat16_pairs=True, zen=4)
    reason = "fewer than {} products, or one row, do not pay for calling the kernel"
    for dtype, rows, fewest in ((torch.float32, 1024, 1 << 26), (torch.bfloat16, 4096, 1 << 28)):
        x, weight, bias = (t.to(dtype) for t in problem(rows, 256, 256))
        assert slower_reasons(x, weight) == [] and calls_kernel(ops.linear, x, weight, bias)
        assert slower_reasons(x[1:], weight) == [reason.format(fewest)]
        assert not calls_kernel(ops.linear, x[1:], weight, bias)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert slower_reasons(x, weight) == ["compiled for all sizes, of which PyTorch computes some faster"]
            pretend_cpu("avx512", zen=5)
            assert slower_reasons(x.float(), weight.float()) == []
        pretend_cpu("avx512", bfloat16_pairs=True, zen=4)


def test_bfloat16_that_is_not_in_pairs_is_pytorchs(pretend_cpu):
    pretend_cpu("avx512", bfloat16_pairs=True, zen=4)
    half = ["this processor multiplies half precision, and PyTorch makes use of it"]
    x, weight = torch.ones(4096, 258).bfloat16(), torch.ones(258, 256).bfloat16()
    assert slower_reasons(x, weight) == slower_reasons(x[:, :256], weight) == []
    assert (
        slower_reasons(x[:, :257], weight) == slower_reasons(torch.ones(4096, 259).bfloat16()[:, :258], weight) == half
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert slower_reasons(x.float(), weight.float()) == half
    pretend_cpu("avx512", zen=4)
    assert slower_reasons(x, weight) == half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_runs_the_kernel_where_pytorch_is_slow(dtype, pretend_cpu):
    inputs = [t.to(dtype) for t in problem(3, 40, 70)]
    pretend_cpu("avx2", multiplies_bfloat16=False, multiplies_float16=False)
    assert slower_reasons(inputs[0]) == [] and calls_kernel(ops.linear, *inputs)
    torch.testing.assert_close(ops.linear(*inputs), F.linear(*inputs), atol=0.02, rtol=0.02)
    for instruction_set in ("avx512", "amx"):
        pretend_cpu(instruction_set, multiplies_bfloat16=True, multiplies_float16=True)
        assert slower_reasons(inputs[0]) == ["this processor multiplies half precision, and PyTorch makes use of it"]
        assert not calls_kernel(ops.linear, *inputs)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(33,), (2, 50, 33)], ids=str)
def test_gradients(shape, with_bias):
    _, weight, bias = problem(1, 33, 24)
    tensors = [torch.randn(shape), weight, bias][: 3 if with_bias else 2]
    assert_gradients((OP, ops.linear), F.linear, *tensors)


def test_opcheck():
    inputs = tuple(t.requires_grad_() for t in problem(40, 8, 4))
    torch.library.opcheck(OP.default, inputs)
    torch.library.opcheck(OP.default, inputs[:2])
    torch.library.opcheck(OP.default, tuple(t.detach().bfloat16() for t in inputs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    compiled = torch.compile(OP, backend=backend, fullgraph=True, dynamic=True)
    whole = torch.compile(ops.linear, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 99, 170):
        x, weight, bias = problem(rows, 33, 24)
        assert torch.equal(compiled(x, weight, bias), OP(x, weight, bias))
        torch.testing.assert_close(whole(x, weight, bias), OP(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_autocast_as_pytorch():
    x, weight, bias = problem(100, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, torchs = ops.linear(x, weight, bias), F.linear(x, weight, bias)
    assert out.dtype == torchs.dtype == torch.bfloat16
    exact = F.linear(*(t.bfloat16().double() for t in (x, weight, bias)))
    assert (out - exact).abs().max() <= 1.01 * (torchs - exact).abs().max()


@pytest.mark.skipif(not HAS_AMX, reason="the kernel needs AMX")
def test_the_networks_use_it_in_inference():
    x = torch.randn(2, 100, 64)
    for module in (Attention(64, 2), FeedForward(64)):
        assert not calls_kernel(module, x)  # which trains
        for backend, used in (("auto", True), ("kernel", True), ("sdpa", False), ("reference", False)):
            set_attention_backend(module, backend)
            with torch.no_grad():
                assert calls_kernel(module, x) == used
                out = module(x)
        set_attention_backend(module, "auto")
        with torch.no_grad():
            torch.testing.assert_close(module(x), out, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_stands_for_a_linear_layer_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, layer = torch.randn(200, 32), nn.Linear(32, 16)
    assert torch.equal(linear_layer(nn.Identity(), x), x)
    torch.manual_seed(1)
    doubled = Doubled(32, 16)
    torch.manual_seed(1)
    torch.testing.assert_close(linear_layer(doubled, x), 2 * nn.Linear(32, 16)(x))
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    linear_layer(layer, x)
    handle.remove()
    linear_layer(layer, x)
    assert seen == [(200, 16)]
    if not int8.unsupported_reasons(x.device):
        quantized = int8.Int8Linear(layer)
        assert torch.equal(linear_layer(quantized, x), quantized(x))


def test_a_forward_of_its_own_and_backward_hooks_are_called():
    x, layer, calls = torch.randn(200, 32), nn.Linear(32, 16).requires_grad_(False), []
    handle = layer.register_full_backward_hook(lambda *gradients: calls.append(gradients))
    linear_layer(layer, x.requires_grad_()).sum().backward()
    assert len(calls) == 1
    handle.remove()
    layer.forward = lambda x: x[..., :3]
    assert linear_layer(layer, x).shape == (200, 3)


def test_a_wrong_backend_is_an_error():
    with pytest.raises(ValueError, match="attention backend: expected one of"):
        linear_layer(nn.Linear(3, 3), torch.ones(1, 3), backend="fast")
