"""Whether flash_attention takes the kernel or PyTorch's own operation, and the reasons."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_refused, heads
from torch._subclasses.fake_tensor import FakeTensorMode

from gafext import _C
from gafext.ops import flash_attention
from gafext.ops.flash_attention import GpuShapes, is_faster_on_gpu, slower_reasons, unsupported_reasons

OP = torch.ops.gafext.flash_attention


UNSUPPORTED = {
    "dtype": (torch.float64, 8, 1, "dtype must be float32, float16 or bfloat16, got float64"),
    "head size": (torch.float32, 513, 1, "head_dim must be in 1..512, got 513"),
    "stride": (torch.float32, 8, 2, "the last stride of query must be 1, got 2"),
}


@pytest.mark.parametrize("dtype, head_dim, step, reason", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_goes_to_pytorch_with_the_reason(dtype, head_dim, step, reason):
    query, key, value = (torch.randn(2, 3, 5, head_dim * step).to(dtype)[..., ::step] for _ in range(3))
    assert unsupported_reasons(query, key, value)[0] == reason
    assert torch.equal(flash_attention(query, key, value), F.scaled_dot_product_attention(query, key, value))
    assert_refused(OP, f"flash_attention: {reason}", query, key, value)


SLOWER = {
    "few queries": ((8, 500, 64), torch.float32, "fewer than 12 queries do not pay for packing the keys"),
    "little work": ((16, 16, 16), torch.float16, "so little work that the time is that of a call"),
    "wide": (
        (256, 256, 512),
        torch.float32,
        "PyTorch's matrix products are the faster ones for heads this wide",
    ),
}


@pytest.mark.parametrize("size, dtype, reason", SLOWER.values(), ids=SLOWER)
def test_what_pytorch_does_faster_goes_to_pytorch(size, dtype, reason, pretend_cpu):
    pretend_cpu("avx512")
    length, keys, head_dim = size
    query, key, value = (heads(2, n, 4, head_dim, dtype) for n in (length, keys, keys))
    assert slower_reasons(query, key) == [reason]
    out, kernels = flash_attention(query, key, value), OP(query, key, value)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, value))
    assert out.stride() == kernels.stride()
    torch.testing.assert_close(out, kernels, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=0)


def test_bfloat16_goes_to_pytorch_on_arm_that_multiplies_it(pretend_cpu):
    query = heads(2, 256, 4, 64, torch.bfloat16)
    pretend_cpu("avx512")
    assert slower_reasons(query, query) == []
    pretend_cpu("neon")
    assert slower_reasons(query, query) == ["this processor multiplies bfloat16, and PyTorch makes use of it"]
    assert torch.equal(flash_attention(query, query, query), F.scaled_dot_product_attention(query, query, query))


def test_bfloat16_stays_where_there_are_tiles(pretend_cpu):
    pretend_cpu("amx")
    query, wide = heads(2, 64, 8, 64, torch.bfloat16), heads(2, 64, 8, 256, torch.bfloat16)
    assert slower_reasons(query, query) == []
    assert slower_reasons(wide, wide) == ["fewer than 96 queries do not pay for packing the keys"]


WIDE = {
    "float32": (torch.float32, 256, 256, 512, True),
    "float32, few queries": (torch.float32, 255, 256, 512, False),
    "float32, few keys": (torch.float32, 256, 255, 512, False),
    "float32, hardly wide": (torch.float32, 256, 256, 320, False),
    "float16": (torch.float16, 64, 64, 257, True),
    "float16, few queries": (torch.float16, 63, 64, 257, False),
    "bfloat16": (torch.bfloat16, 1024, 1024, 512, False),
}


@pytest.mark.parametrize("dtype, queries, keys, head_dim, stays", WIDE.values(), ids=WIDE)
def test_wide_heads_stay_where_there_are_tiles(dtype, queries, keys, head_dim, stays, pretend_cpu):
    pretend_cpu("amx")
    query, key = heads(1, queries, 2, head_dim, dtype), heads(1, keys, 2, head_dim, dtype)
    wide = ["PyTorch's matrix products are the faster ones for heads this wide"]
    assert slower_reasons(query, key) == ([] if stays else wide)
    out, kernels = flash_attention(query, key, key), OP(query, key, key)
    torch.testing.assert_close(out, kernels, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=0)
    if stays:
        assert torch.equal(out, kernels)


@pytest.mark.parametrize(
    "zen, dtype, fewest",
    [(4, torch.float32, 512), (5, torch.float32, 256)]
    + [(zen, dtype, 64) for zen in (4, 5) for dtype in (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_wide_heads_stay_where_the_kernels_outrun_mkl(zen, dtype, fewest, pretend_cpu):
    pretend_cpu("avx512", zen=zen)
    enough, few = heads(1, max(fewest, 96), 1, 512, dtype), heads(1, fewest - 1, 1, 512, dtype)
    wide = "PyTorch's matrix products are the faster ones for heads this wide"
    assert slower_reasons(enough, enough) == []
    assert wide in slower_reasons(few, enough) and wide in slower_reasons(enough, few)


@pytest.mark.parametrize("dtype, keys", [(torch.float32, 1024), (torch.float32, 77), (torch.bfloat16, 77)], ids=str)
def test_what_the_kernel_does_faster_stays(dtype, keys):
    query, key = heads(4, 64, 20, 64, dtype), heads(4, keys, 20, 64, dtype)
    assert slower_reasons(query, key) == []
    assert torch.equal(flash_attention(query, key, key), OP(query, key, key))


def test_on_a_gpu_the_kernel_serves_what_was_measured_faster(monkeypatch):
    shapes = GpuShapes(capability=90, head_dims=range(40, 81), queries=range(64, 257), keys=range(1, 258))
    monkeypatch.setattr(sys.modules[GpuShapes.__module__], "FASTER_ON_GPU", (shapes,))
    assert is_faster_on_gpu(90, 64, 64, 257)
    assert not any(is_faster_on_gpu(*other) for other in ((80, 64, 64, 257), (90, 88, 64, 257), (90, 64, 300, 257)))


@pytest.mark.parametrize(
    "dtype, head_dim, most",
    [(torch.float16, 264, None), (torch.float16, 260, 256), (torch.bfloat16, 520, 512), (torch.float32, 264, 256)],
    ids=str,
)
def test_wide_heads_on_a_gpu_are_of_16_bits_and_whole_vectors(dtype, head_dim, most):
    with FakeTensorMode():  # there is none here
        query = torch.empty(1, 2, 16, head_dim, dtype=dtype, device="cuda")
        found = [reason for reason in unsupported_reasons(query, query, query) if "head_dim" in reason]
        assert found == ([f"head_dim must be in 1..{most}, got {head_dim}"] if most else [])
        if most:
            with pytest.raises(ValueError, match=f"flash_attention: {found[0]}"):
                OP(query, query, query)
        else:
            assert OP(query, query, query).shape == query.shape


def test_the_same_choice_within_compiled_code():
    query = heads(1, 64, 2, 32, torch.bfloat16)
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    cpu = _C.build_info()
    on_arm = cpu["instruction_set"] == "neon"
    wanted = F.scaled_dot_product_attention if on_arm and cpu["multiplies_bfloat16"] else OP
    assert torch.equal(compiled(query, query, query), wanted(query, query, query))


def test_inputs_with_gradient_go_to_pytorch():
    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    assert "need a gradient" in unsupported_reasons(query, query, query)[0]
    with torch.no_grad():
        assert unsupported_reasons(query, query, query) == []
