"""Every CUDA kernel under the emulator of tests/emulator.py: odd sizes, random cases, and planted faults."""

import random

import pytest
import torch
from emulated_units import assert_right_product, unit_kernels
from emulator import EmulatorError, emulate, kernels
from emulator_build import KERNELS, MACHINE, needs_compiler
from helpers import DTYPES, LAYOUTS
from helpers import heads_in_layout as heads

from gafext.ops.cross_view_attention import reference_cross_view_attention
from gafext.ops.flash_attention import reference_flash_attention
from gafext.ops.geglu import reference_geglu_gate

pytestmark = needs_compiler
REFERENCES = {
    "cross_view_attention": reference_cross_view_attention,
    "flash_attention": reference_flash_attention,
    "geglu_gate": reference_geglu_gate,
}
CAPABILITIES = [75, 80, 86, 90, 120]  # by which host code chooses among kernels


def assert_as_on_cpu(operation, *args, library=None, capability=80, **kwargs):
    """Within the rounding of the dtype, from what the operation gives on the CPU, or in float32 from float64."""
    expected = getattr(torch.ops.gafext, operation)(*args, **kwargs)
    out = emulate(operation, *args, library=library, capability=capability, **kwargs)
    assert out.shape == expected.shape and out.dtype == expected.dtype and out.stride() == expected.stride()
    if not out.numel():
        return
    # Sums in another order cost float32 some units in the last place, weights rounded to half precision one.
    units = 16 if out.dtype == torch.float32 else 2
    tolerance = units * torch.finfo(out.dtype).eps * max(1.0, expected.abs().max().item())
    if out.dtype == torch.float32:  # where scores are as large as 60, the CPU's own result is further off than that
        wide = (x.double() if torch.is_tensor(x) else x for x in args)
        expected = REFERENCES[operation](*wide, **kwargs).float()
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 17, 64, 65, 128, 255, 256])
def test_every_head_size(head_dim, dtype):
    query, key, value = heads("packed", 3, 1, 1, 9, head_dim, dtype)
    assert_as_on_cpu("flash_attention", query, key, value)
    assert_as_on_cpu("cross_view_attention", *heads("packed", 3, 4, 1, 2, head_dim, dtype), 4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1), (1, 130), (130, 1), (63, 65), (65, 63)], ids=str)
def test_odd_lengths(lengths, is_causal):
    for dtype in (torch.float32, torch.float16):
        query = heads("projection", 1, 1, 2, lengths[0], 16, dtype)[0]
        key, value = heads("packed", 2, 1, 2, lengths[1], 16, dtype)
        assert_as_on_cpu("flash_attention", query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("num_views", [1, 2, 3, 5, 8, 13, 31, 32])
def test_every_number_of_views(num_views):
    for dtype in (torch.float32, torch.float16):
        assert_as_on_cpu("cross_view_attention", *heads("packed", 3, num_views, 1, 3, 24, dtype), num_views)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (5, 3), (3, 257), (300, 31)], ids=str)
def test_odd_gates(sizes):
    rows, inner = sizes
    for dtype in DTYPES:
        assert_as_on_cpu("geglu_gate", torch.randn(rows, 2 * inner).to(dtype))


def random_case(choose):
    """An operation with its arguments: shapes, strides and dtype by chance."""
    operation = choose.choice(["flash_attention", "flash_attention", "cross_view_attention", "geglu_gate"])
    dtype, layout = choose.choice(DTYPES), choose.choice(LAYOUTS)
    if operation == "geglu_gate":
        rows, inner, gap = choose.randint(1, 40), choose.choice([1, 7, 8, 24, 33, 128, 200]), choose.choice([0, 5, 8])
        return operation, (torch.randn(rows, 2 * inner + gap).to(dtype)[:, : 2 * inner],), {}
    head_dim = choose.choice([1, 3, 8, 16, 24, 32, 40, 64, 80, 100, 128, 160, 256])
    batch, num_heads = choose.randint(1, 2), choose.randint(1, 3)
    options = dict(scale=choose.choice([None, None, 0.3, -1.0]))
    if operation == "cross_view_attention":
        num_views = choose.choice([1, 2, 3, 4, 6, 8, 16, 32])
        length = choose.randint(1, max(1, 40 // num_views))
        return operation, (*heads(layout, 3, batch * num_views, num_heads, length, head_dim, dtype), num_views), options
    longest = min(150, int((300_000 / (batch * num_heads * head_dim)) ** 0.5))
    query_length = key_length = choose.randint(1, longest)
    if choose.random() < 0.7 and layout != "packed":
        key_length = choose.randint(1, longest)
    if key_length == query_length:
        tensors = heads(layout, 3, batch, num_heads, query_length, head_dim, dtype)
    else:
        tensors = heads(layout, 1, batch, num_heads, query_length, head_dim, dtype)
        tensors += heads(layout, 2, batch, num_heads, key_length, head_dim, dtype)
    return operation, tensors, options | dict(is_causal=choose.random() < 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_random_cases(seed):  # 200 in all
    choose = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        operation, args, options = random_case(choose)
        assert_as_on_cpu(operation, *args, capability=choose.choice(CAPABILITIES), **options)


# Planted faults: a text of a source and what it becomes. A fault is found when the emulator says so or when the result
# isn't that of the CPU. tests/cuda_emulator/matmul.cu carries those that have to do with the tensor cores.

FLASH, MATMUL = KERNELS / "flash_attention_simple.cu", MACHINE / "matmul.cu"
LOADED = "    __syncthreads();\n    if (!has_row) continue;"
READ = "__syncthreads();  // the previous tile has been read"
ROWS_OF_A, COLUMNS_OF_A = (
    "lane % 16) * kPitch + kk + lane / 16 * 8",
    "lane % 8 + lane / 16 * 8) * kPitch + kk + (lane & 8)",
)
FAULTS = {
    "a barrier dropped after the keys are loaded": (FLASH, LOADED, "    if (!has_row) continue;"),
    "a barrier dropped before they are overwritten": (FLASH, READ, ""),
    "a causal mask off by one": (FLASH, "j > row)) score", "j >= row)) score"),
    "a key past the last": (FLASH, "first + j < args.key_length", "first + j <= args.key_length"),
    "the last keys not masked": (FLASH, "j >= args.key_length || ", ""),
    "a mask that leaves out a lane": (FLASH, "__shfl_sync(kAllLanes,", "__shfl_sync(kAllLanes >> 1,"),
    "a column not written": (FLASH, "if (d < dim) out[d]", "if (d < dim - 1) out[d]"),
    "the strides of another tensor": (FLASH, "args.value_stride", "args.key_stride"),
    "shared memory a row short": (FLASH, "(kRows + kKeys) *", "(kRows + kKeys - 1) *"),
    "a warp that leaves before a barrier's work": (FLASH, "if (!has_row) continue;", "if (!has_row) return;"),
    "the halves of a fragment swapped": (MATMUL, ROWS_OF_A, COLUMNS_OF_A),
    "rows of the accumulator swapped": (MATMUL, "lane / 4 + i / 2 * 8", "lane / 4 + i % 2 * 8"),
    "a copy not waited for": (MATMUL, "copies_wait<1>", "copies_wait<2>"),
    "a barrier dropped after the wait": (MATMUL, "__syncthreads();  // all of this tile are there", ""),
    "a barrier dropped before the next copies": (MATMUL, "__syncthreads();  // this tile has been read", ""),
    "rows that are not aligned": (MATMUL, "kPitch = 40", "kPitch = 36"),
    "a copy where the matrix has ended": (MATMUL, "column + c < columns", "column + c <= columns"),
    "a transposition forgotten": (MATMUL, "load_matrices_transposed(b,", "load_matrices(b,"),
}


def with_fault(source, text, replacement):
    original = source.read_text()
    assert original.count(text) == 1, f"{source.name} has no longer one {text!r}, where a fault was planted"
    library = kernels() if source.parent == KERNELS else unit_kernels()
    return library.with_changes({source.name: original.replace(text, replacement)})


def exercise(source, library):
    """Raises unless the kernel is right."""
    if source == MATMUL:
        for b_transposed in (True, False):
            assert_right_product(33, 40, 72, torch.float16, b_transposed, library)
        return
    for is_causal in (False, True):
        query, key = (heads("projection", 1, 1, 2, n, 40, torch.float16)[0] for n in (37, 41))
        value = heads("anywhere", 1, 1, 2, 41, 40, torch.float16)[0]
        assert_as_on_cpu("flash_attention", query, key, value, is_causal=is_causal, library=library)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    source, text, replacement = FAULTS[fault]
    library = with_fault(source, text, replacement)
    with pytest.raises((EmulatorError, AssertionError)) as raised:
        exercise(source, library)
    print(f"{fault}: {raised.value}")


@pytest.mark.parametrize("source", [FLASH, MATMUL], ids=lambda path: path.name)
def test_without_a_fault_nothing_is_found(source):
    exercise(source, None)
