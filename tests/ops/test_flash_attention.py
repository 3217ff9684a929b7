"""flash_attention against float64, against PyTorch's own, and against misuse."""

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    HAS_CUDA,
    LAYOUTS,
    assert_as_exact_as_torch,
    assert_gradients,
    assert_gradients_as_exact,
    assert_no_copies,
    assert_same_bits_on_any_number_of_threads,
    assert_same_words,
    assert_second_gradients,
    heads,
    heads_in_layout,
    mps_implementation,
    on_devices,
)

from gafext.ops import flash_attention
from gafext.ops.flash_attention import flash_attention_backward, reference_flash_attention, unsupported_reasons

OP = torch.ops.gafext.flash_attention


def assert_exact(*args, **options):
    torchs = F.scaled_dot_product_attention
    assert_as_exact_as_torch(OP, reference_flash_attention, *args, torchs=torchs, **options)


def in_float32(query, key, value, **options):
    """PyTorch's own. In half precision it spreads infinities further, over rows that do not see them.

    A query with NaN has NaN, where torch 2.14 and 2.15 have zeros.
    """
    out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **options)
    return out.masked_fill(query.isnan().any(dim=-1, keepdim=True), torch.nan).to(query.dtype)


# What rounding the weights and the result may amount to, for values of size 1.
ROUNDING = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
}


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 17, 40, 64, 80, 128, 160, 255, 256])
def test_every_head_size(head_dim, dtype, device):
    query, key, value = (heads(2, length, 3, head_dim, dtype, device) for length in (65, 77, 77))
    for is_causal in (False, True):
        assert_exact(query, key, value, is_causal=is_causal)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 257), (63, 65), (65, 63), (257, 257), (257, 1), (100, 1100), (700, 600)], ids=str
)
def test_odd_lengths(lengths, is_causal, dtype, device):
    query, key, value = (heads(1, n, 2, 40, dtype, device) for n in (lengths[0], lengths[1], lengths[1]))
    assert_exact(query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_values_in_place_over_several_tiles(is_causal):
    """Few rows read float32 values where they are, here from a packed projection."""
    packed = torch.randn(2, 1100, 3, 3, 64)
    query, key, value = (t.transpose(1, 2) for t in packed.unbind(2))
    assert_exact(query[:, :, 900:1000], key, value, is_causal=is_causal)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(256, 256, 64), (1025, 257, 80), (257, 1025, 33), (300, 257, 129), (1057, 2050, 80), (256, 128, 256)],
    ids=str,
)
def test_large_heads(sizes, is_causal, dtype, device):
    """Large enough for the kernel that multiplies on AMX tiles."""
    queries, keys, head_dim = sizes
    query, key, value = (heads(1, length, 2, head_dim, dtype, device) for length in (queries, keys, keys))
    assert_exact(query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(65, 77, 257), (300, 290, 512), (1100, 70, 511)], ids=str)
def test_wide_heads(sizes, dtype):
    queries, keys, head_dim = sizes
    query, key, value = (heads(1, length, 2, head_dim, dtype) for length in (queries, keys, keys))
    for is_causal in (False, True):
        assert_exact(query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [33, 64, 257, 258, 290, 515, 1059], ids=str)
def test_a_few_keys_beyond_whole_steps(keys, dtype):
    """Of AMX tiles, which hold 32 keys: up to four more are multiplied on vectors."""
    query, key, value = (heads(2, length, 2, 72, dtype) for length in (270, keys, keys))
    query[:, :, ::3] = 8 * key[:, :, -1:]  # most weight is on the last key
    assert_exact(query, key, value)


@pytest.mark.parametrize("exponents", [(-70, 66, 0), (66, -70, 0), (0, 0, -120), (0, 0, 110), (-100, 0, 20)], ids=str)
def test_tiny_and_huge_inputs(exponents):
    tensors = [heads(1, length, 2, 64) for length in (257, 1025, 1025)]
    query, key, value = (t * 2.0**exponent for t, exponent in zip(tensors, exponents, strict=True))
    out, torchs = OP(query, key, value), F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out * 2.0 ** -exponents[2], torchs * 2.0 ** -exponents[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_denormal_numbers(dtype):
    """Where all weight is on one key, that of the others is down to 2^-149, and must not spoil their neighbours'."""
    key, value = heads(1, 1100, 2, 64, dtype), heads(1, 1100, 2, 64, dtype)
    query = 8 * key[:, :, torch.randperm(1100)[:300]]
    assert_exact(query, key, value)


@pytest.mark.parametrize("exponents", [(-70, 66, 0), (66, -70, 0), (0, 0, -124), (0, 0, 110), (-100, 0, 20)], ids=str)
def test_tiny_and_huge_bfloat16(exponents):
    """Subnormal numbers, which AMX takes for zero, and products that overflow."""
    tensors = [heads(1, length, 2, 64) for length in (257, 1025, 1025)]
    query, key, value = ((t * 2.0**e).bfloat16() for t, e in zip(tensors, exponents, strict=True))
    out, torchs = OP(query, key, value), in_float32(query, key, value)
    factor = 2.0 ** -exponents[2]
    torch.testing.assert_close(out.double() * factor, torchs.double() * factor, **ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_among_large_scores(dtype):
    """Up to 2^16 and beyond, where the weights of AMX tiles end; a row's largest weight is 1 whatever it is."""
    key, value = heads(1, 300, 2, 64, dtype), heads(1, 300, 2, 64, dtype)
    for factor in (8, 300, 1000, 8000):
        query = factor * key[:, :, :257]
        assert_exact(query, key, value)
        assert_exact(query, key, value, scale=-0.125)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype, device):
    query, key, value = (heads(1, 33, 2, 16, dtype, device) for _ in range(3))
    for scale in (0.05, 1.0, -0.5, 0.0):
        assert_exact(query, key, value, scale=scale)


def packed_qkv():
    return heads_in_layout("packed", 3, 2, 4, 65, 24)


def contiguous_heads():
    return tuple(torch.randn(2, 4, length, 24) for length in (65, 33, 33))


def broadcast_keys():  # one key and value for all heads: strides of 0
    query, key, value = (torch.randn(2, n, 65, 24) for n in (4, 1, 1))
    return query, key.expand(2, 4, 65, 24), value.expand(2, 4, 65, 24)


def padded_rows():  # slices of a wider memory, not aligned to anything
    return tuple(torch.randn(2, 4, 66, 31)[:, :, 1:, 3:27] for _ in range(3))


@pytest.mark.parametrize("inputs", [packed_qkv, contiguous_heads, broadcast_keys, padded_rows])
def test_strides_without_copies(inputs):
    query, key, value = inputs()
    assert unsupported_reasons(query, key, value) == []
    assert_exact(query, key, value)
    assert_no_copies(OP, "flash_attention", query, key, value)
    _, num_heads, length, head_dim = query.shape
    assert OP(query, key, value).stride() == (num_heads * length * head_dim, head_dim, num_heads * head_dim, 1)


@on_devices
@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)], ids=str)
def test_empty_inputs(shape, device):
    query = torch.randn(shape, device=device)
    assert flash_attention(query, query, query).shape == OP(query, query, query).shape == shape


@on_devices
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_keys_gives_zeros_as_in_pytorch(is_causal, device):
    query, key = torch.randn(2, 3, 5, 8, device=device), torch.randn(2, 3, 0, 8, device=device)
    out = OP(query, key, key, is_causal=is_causal)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, key, is_causal=is_causal))
    assert torch.equal(out, torch.zeros_like(query))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_and_infinity_spread_as_in_pytorch(where, poison, is_causal, dtype, device):
    query, key, value = (heads(1, 600, 1, 8, dtype, device) for _ in range(3))
    # Row 300 has its own sign at column 2, so an infinity gives scores of both signs, and rows that are all -inf.
    (query if where == "query" else key)[0, 0, 300, 2] = poison
    out = OP(query, key, value, is_causal=is_causal)
    torchs = in_float32(query, key, value, is_causal=is_causal)
    assert torch.equal(out.isnan(), torchs.isnan())
    torch.testing.assert_close(out, torchs, equal_nan=True, **ROUNDING[dtype])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_infinity_in_the_key_beyond_whole_steps(poison):
    query, key, value = (heads(1, length, 1, 64) for length in (300, 257, 257))
    key[0, 0, 256, 2] = poison
    out, torchs = OP(query, key, value), F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(out.isnan(), torchs.isnan())
    torch.testing.assert_close(out, torchs, equal_nan=True)


def test_the_largest_numbers_as_queries():
    """Times log2(e), which the kernel folds in, and rounded to bfloat16, an AMX tile's type, they are infinite."""
    query, key, value = heads(1, 300, 1, 64).sign(), heads(1, 288, 1, 64), heads(1, 288, 1, 64)
    key *= 2.0**-45
    query *= torch.finfo(torch.float32).max * 0.9999 * math.log(2)
    out = OP(query, key, value, scale=1.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, scale=1.0))


def spoil(tensor, generator):
    """An infinity, a NaN or a huge number somewhere, or along a whole row."""
    value = [float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 1e15][torch.randint(6, (), generator=generator)]
    row = torch.randint(tensor.shape[2], (), generator=generator)
    column = torch.randint(tensor.shape[3], (), generator=generator)
    columns = slice(None) if torch.rand((), generator=generator) < 0.25 else slice(column, column + 1)
    # a tensor, because torch 2.15 refuses numbers that become infinite
    value = torch.tensor(value).to(tensor.dtype)
    tensor[0, torch.randint(tensor.shape[1], (), generator=generator), row, columns] = value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(64, 64), (70, 77), (33, 600), (600, 900), (300, 257)], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_spoilt_inputs_give_what_pytorch_gives(lengths, seed, is_causal, dtype):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (heads(1, length, 2, 40, dtype) for length in (lengths[0], lengths[1], lengths[1]))
    for tensor in (query, key, value) if seed % 2 else (query, key):
        spoil(tensor, generator)
    if seed >= 6:  # every score -inf
        query[..., 0], key[..., 0] = 1.0, float("-inf")
    out = OP(query, key, value, is_causal=is_causal)
    torchs = in_float32(query, key, value, is_causal=is_causal)
    if is_causal and not value.isfinite().all():
        # Weight 0 times a spoilt value is NaN: PyTorch has it in the rows of a whole block before the value.
        assert not (out.isnan() & ~torchs.isnan()).any()
        out = out.masked_fill(torchs.isnan(), float("nan"))
    torch.testing.assert_close(out, torchs, equal_nan=True, **ROUNDING[dtype])


@on_devices
def test_all_scores_minus_infinity(device):
    query, key, value = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 70, 4), torch.randn(1, 1, 70, 4)
    key[..., 0] = float("-inf")
    query, key, value = query.to(device), key.to(device), value.to(device)
    assert torch.equal(OP(query, key, value), F.scaled_dot_product_attention(query, key, value))


@on_devices
def test_huge_scores(device):
    query, key, value = (heads(1, 70, 2, 16, device=device) for _ in range(3))
    torchs = F.scaled_dot_product_attention(query * 1e15, key * 1e15, value)
    torch.testing.assert_close(OP(query * 1e15, key * 1e15, value), torchs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_key_has_no_weight(dtype):
    query, key, value = (heads(1, 64, 2, 16, dtype) for _ in range(3))
    before = OP(query, key, value, is_causal=True)
    large = 1e9 if dtype == torch.float32 else 1e3
    key[:, :, 40:], value[:, :, 40:] = large, -large
    after = OP(query, key, value, is_causal=True)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    inputs = [heads(2, 700, 3, 40, dtype) for _ in range(3)]
    assert_same_bits_on_any_number_of_threads(functools.partial(OP, is_causal=True), *inputs)


@pytest.mark.parametrize("shape", [(5, 64), (1, 256), (1, 512)], ids=str)
def test_long_sequences_need_little_memory(shape):
    # 16384 x 16384 float32 scores would be 1 GiB for each head.
    code = f"""
import resource, torch, gafext.ops
torch.set_num_threads(2)
query = torch.randn(1, {shape[0]}, 16384, {shape[1]})
op = torch.ops.gafext.flash_attention
short = query[:, :, :64]
op(short, short, short)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = op(query[:, :, :2048], query, query)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - out.nbytes // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 1024  # KiB


S = (2, 3, 5, 8)
BAD_INPUTS = {
    "3 dimensions": (
        lambda t: (t(2, 5, 8), t(*S), t(*S)),
        "query must have shape (batch, heads, length, head_dim), got (2, 5, 8)",
    ),
    "value of 1": (lambda t: (t(*S), t(*S), t(5)), "value must have shape (batch, heads, length, head_dim), got (5,)"),
    "heads": (
        lambda t: (t(*S), t(2, 4, 5, 8), t(2, 4, 5, 8)),
        "key must have the batch, heads and head_dim of query, (2, 3, 5, 8), got (2, 4, 5, 8)",
    ),
    "batch": (
        lambda t: (t(*S), t(1, 3, 5, 8), t(1, 3, 5, 8)),
        "key must have the batch, heads and head_dim of query, (2, 3, 5, 8), got (1, 3, 5, 8)",
    ),
    "head_dim": (
        lambda t: (t(*S), t(2, 3, 5, 9), t(2, 3, 5, 9)),
        "key must have the batch, heads and head_dim of query, (2, 3, 5, 8), got (2, 3, 5, 9)",
    ),
    "lengths": (
        lambda t: (t(*S), t(2, 3, 7, 8), t(2, 3, 6, 8)),
        "value must have the shape of key, (2, 3, 7, 8), got (2, 3, 6, 8)",
    ),
    "dtype": (
        lambda t: (t(*S), t(*S), t(*S).half()),
        "value must have the dtype of query, float32, got float16",
    ),
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(flash_attention, OP, make, f"flash_attention: {words}")


@pytest.mark.skipif(not HAS_CUDA, reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("length", [77, 1024])
def test_wide_heads_on_cuda(length, dtype):
    """The one head of a VAE, aligned rows or not."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("needs compute capability 8.0")
    query, key, value = (heads(1, n, 1, 512, dtype, "cuda") for n in (length, 257, 257))
    for is_causal in (False, True):
        assert_exact(query, key, value, is_causal=is_causal)
    odd = torch.randn(1, 1, 65, 515, device="cuda").to(dtype)[..., 3:]
    assert_exact(odd, odd, odd)


@pytest.mark.skipif(not HAS_CUDA, reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 64, 4096, 64), (8, 20, 300, 77, 64), (1, 1, 100, 2048, 512)], ids=str)
def test_divided_work_on_cuda(sizes, dtype):
    """Keys split over blocks, blocks of 128 rows; and the same bits each time."""
    batch, num_heads, length, keys, head_dim = sizes
    query, key, value = (heads(batch, n, num_heads, head_dim, dtype, "cuda") for n in (length, keys, keys))
    assert_exact(query, key, value)
    results = [OP(query, key, value) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(is_causal):
    tensors = [heads(2, length, 2, 16) for length in (33, 41, 41)]
    ours, theirs, reference = (
        functools.partial(function, is_causal=is_causal, scale=0.3)
        for function in (OP, flash_attention, reference_flash_attention)
    )
    assert_gradients((ours, theirs), reference, *tensors)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 257), (63, 65), (257, 63)], ids=str)
def test_backward(lengths, layout, is_causal):
    query, grad = heads_in_layout(layout, 2, 2, 3, lengths[0], 24)
    key, value = heads_in_layout(layout, 2, 2, 3, lengths[1], 24)
    options = {"is_causal": is_causal, "scale": 0.3}
    forms = [
        functools.partial(form, **options)
        for form in (flash_attention_backward, reference_flash_attention, F.scaled_dot_product_attention)
    ]
    for given in (grad, grad[..., :1].expand_as(grad)):  # that of a sum has strides of 0
        assert_gradients_as_exact(*forms[:2], given, query, key, value, torchs=forms[2])


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)], ids=str)
def test_backward_of_nothing(lengths):
    query, key, value = (heads(2, n, 3, 8).requires_grad_() for n in (lengths[0], lengths[1], lengths[1]))
    OP(query, key, value).sum().backward()
    for tensor in (query, key, value):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_backward_holds_no_score_matrix():
    query, key, value = (heads(1, 2048, 2, 16).requires_grad_() for _ in range(3))
    out = OP(query, key, value)
    with torch.profiler.profile(profile_memory=True) as profile:
        out.sum().backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 2048 * 2048 * 4  # of one of the two heads


def test_second_gradients_are_the_formulas():
    tensors = [heads(2, length, 2, 16) for length in (33, 41, 41)]
    assert_second_gradients(OP, reference_flash_attention, *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    inputs = tuple(heads(2, 9, 2, 8, dtype).requires_grad_() for _ in range(3))
    torch.library.opcheck(OP.default, inputs, {"is_causal": True, "scale": 0.5})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    compiled = torch.compile(flash_attention, backend=backend, fullgraph=True, dynamic=True)
    for length in (9, 17, 33):
        query, key, value = (heads(2, n, 2, 8) for n in (length, length + 4, length + 4))
        assert torch.equal(compiled(query, key, value), OP(query, key, value))  # no guard on sizes: the kernel


def test_export_keeps_the_operation():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return flash_attention(query, key, value, is_causal=True)

    inputs = tuple(heads(2, 9, 2, 8) for _ in range(3))
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(Attention(), inputs, dynamic_shapes=({2: length},) * 3)
    assert "gafext.flash_attention" in str(exported.graph)
    longer = tuple(heads(2, 21, 2, 8) for _ in range(3))
    assert torch.equal(exported.module()(*longer), OP(*longer, is_causal=True))


def test_autocast_as_pytorch():
    query = torch.randn(2, 3, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(query, query.bfloat16(), query).dtype == torch.bfloat16


def test_the_mps_route_has_the_values_and_the_memory_of_the_kernel():
    query, key, value = (heads(2, 9, 3, 8) for _ in range(3))
    ours, mps = OP(query, key, value), mps_implementation(OP)(query, key, value)
    assert mps.stride() == ours.stride()
    torch.testing.assert_close(mps, ours)
