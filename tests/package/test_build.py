"""The compiled module: what is registered, what it links, every instruction set it was built for."""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import gafext.ops
from gafext import _C

OPS = ["flash_attention", "cross_view_attention", "geglu", "geglu_gate", "group_norm_silu"]
INFO = _C.build_info()


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


@pytest.mark.parametrize("key", ["CPU", "Meta", "MPS", "Autograd", *(["CUDA"] if INFO["cuda"] else [])])
@pytest.mark.parametrize("op", OPS)
def test_kernels_are_registered(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gafext::{op}", key)


def test_schemas_are_the_contract():
    schemas = [str(getattr(torch.ops.gafext, op).default._schema) for op in OPS]
    assert schemas == [
        "gafext::flash_attention(Tensor query, Tensor key, Tensor value, *, float? scale=None, bool is_causal=False)"
        " -> Tensor",
        "gafext::cross_view_attention(Tensor query, Tensor key, Tensor value, SymInt num_views, *, float? scale=None)"
        " -> Tensor",
        "gafext::geglu(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        "gafext::geglu_gate(Tensor projected) -> Tensor",
        "gafext::group_norm_silu(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps="
        "1.0000000000000001e-05, *, bool silu=True) -> Tensor",
    ]


def test_build_info_says_what_was_built():
    assert re.fullmatch(r"\d+\.\d+\.\d+", INFO["version"])
    assert tuple(map(int, INFO["torch"].split(".")[:2])) >= (2, 11)
    assert INFO["instruction_set"] in INFO["instruction_sets"] and INFO["instruction_sets"][0] in ("portable", "neon")
    assert INFO["openmp"], "without OpenMP the CPU kernels run on one thread"
    assert bool(INFO["cuda_architectures"]) == bool(INFO["cuda_compiler"]) == INFO["cuda"]


def test_the_extension_is_one_module_of_this_interpreter():
    assert _C.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="needs nm")
def test_only_the_stable_abi_of_torch_is_used():
    symbols = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    names = re.findall(r"^\s+[Uw] (\S+)$", symbols.stdout, re.MULTILINE)
    assert any(name.startswith("aoti_torch_") for name in names)
    unstable = [n for n in names if re.search(r"c10|2at|torch", n) and not n.startswith(("aoti_torch_", "torch_"))]
    assert unstable == []
    assert [n for n in names if n.startswith(("cuda", "__cuda", "cu"))] == []  # the CUDA runtime is inside


def test_the_headers_of_the_oldest_torch_have_all_names():
    """2.11, which pyproject.toml allows; the torch of this test may be newer. The names are those that came later."""
    csrc = ROOT / "csrc"
    later = r"STABLE_TORCH_ERROR_CODE_CHECK|nativeHandle|torch_exception_get_what"
    assert not [p.name for p in csrc.rglob("*.*") if re.search(rf"\b({later})\b", re.sub("//.*", "", p.read_text()))]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="needs readelf")
def test_no_cuda_library_is_needed_to_load_it():
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [n for n in needed if re.match(r"libcu|libnv|libtorch_cuda|libtorch_python", n)]


CHECK_ALL_OPS = """
import torch
from gafext import _C
import gafext.ops
from gafext.ops.conv3x3_int8 import reference_conv3x3_int8
from gafext.ops.cross_view_attention import cross_view_attention, reference_cross_view_attention
from gafext.ops.flash_attention import flash_attention, reference_flash_attention
from gafext.ops.geglu import geglu, reference_geglu
from gafext.ops.group_norm_silu import group_norm_silu, reference_group_norm_silu

torch.manual_seed(0)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

def check(function, reference, *inputs, **options):
    exact = reference(*(t.double() if torch.is_tensor(t) else t for t in inputs), **options)
    error = (function(*inputs, **options).double() - exact).abs().max() / exact.abs().max()
    assert error < TOLERANCE[inputs[0].dtype], f"{function.__name__} {inputs[0].dtype}: {error}"

for dtype in TOLERANCE:
    for head_dim in (1, 17, 40, 64, 80, 160, 256):
        query, key, value = (torch.randn(2, n, 2, head_dim).to(dtype).transpose(1, 2) for n in (65, 77, 77))
        check(flash_attention, reference_flash_attention, query, key, value)
        check(flash_attention, reference_flash_attention, query, key, value, is_causal=True)
        for views in (2, 3, 4, 17):
            query, key, value = (torch.randn(views, 2, 9, head_dim).to(dtype) for _ in range(3))
            check(cross_view_attention, reference_cross_view_attention, query, key, value, views)
    query, key, value = (torch.randn(1, n, 2, 64).to(dtype).transpose(1, 2) for n in (300, 600, 600))
    check(flash_attention, reference_flash_attention, query, key, value)  # large enough for AMX
    for rows, columns, inner in ((1, 1, 1), (65, 257, 63), (7, 640, 100)):
        inputs = torch.randn(rows, columns), torch.randn(2 * inner, columns) / columns**0.5, torch.randn(2 * inner)
        check(geglu, reference_geglu, *(t.to(dtype) for t in inputs))
    for batch, positions, channels, groups in ((1, 2, 1, 1), (3, 65, 63, 7), (2, 300, 257, 1)):
        x, weight, bias = torch.randn(batch, positions, channels) + 1, torch.randn(channels), torch.randn(channels)
        inputs = x.to(dtype).transpose(1, 2), groups, weight.to(dtype), bias.to(dtype)
        check(group_norm_silu, reference_group_norm_silu, *inputs)

for sizes in ((2, 33, 65, 5, 3), (1, 257, 63, 13, 9), (1, 1, 1, 1, 1)):
    batch, inner, outer, height, width = sizes
    x = torch.randn(batch, inner, height, width).contiguous(memory_format=torch.channels_last)
    weight, scale = torch.randint(-127, 128, (outer, inner, 3, 3)).to(torch.int8), torch.rand(outer)
    exact = reference_conv3x3_int8(x.double(), weight, scale.double(), scale.double())
    error = (torch.ops.gafext.conv3x3_int8(x, weight, scale, scale) - exact).norm() / exact.norm()
    assert error < 0.01, f"conv3x3_int8 {sizes}: {error}"

# Every bit pattern of a half through load and store: V = 1 returns its values, times a weight of exactly 1.
every = torch.arange(-32768, 32768).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    value = every.view(dtype).reshape(1, 1, 256, 256)
    value = torch.where(value.isfinite(), value, 0)
    zero = torch.zeros_like(value)
    assert torch.equal(cross_view_attention(zero, zero, value, 1), value), dtype

# NaN and infinity come through the conversions and the softmax.
for dtype in TOLERANCE:
    query, key, value = (torch.randn(1, 1, 20, 8).to(dtype) for _ in range(3))
    query[0, 0, 3, 0] = float("nan")
    value[0, 0, 7, 5] = float("inf")
    out = flash_attention(query, key, value)
    assert out[0, 0, 3].isnan().all() and (out[0, 0, :3, 5] == float("inf")).all()
    assert out[0, 0, :3, :5].isfinite().all()
print(_C.build_info()["instruction_set"])
"""


@pytest.mark.parametrize("instruction_set", INFO["instruction_sets"])
def test_every_instruction_set(instruction_set):
    done = run_python(CHECK_ALL_OPS, GAFEXT_INSTRUCTION_SET=instruction_set)
    if done.returncode and "this processor" in done.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == instruction_set


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices():
    done = run_python("import torch; from gafext import _C; _C.build_info()", GAFEXT_INSTRUCTION_SET="sse9")
    assert done.returncode != 0
    choices = "neon, on this processor" if "neon" in INFO["instruction_sets"] else "portable, avx2, avx512 or amx"
    assert f"GAFEXT_INSTRUCTION_SET=sse9: must be {choices}" in done.stderr


@pytest.mark.skipif(not (torch.cuda.is_available() and INFO["cuda"]), reason="no GPU: no operation ran on CUDA")
def test_the_operations_run_on_cuda():
    """The other files run their comparisons on "cuda" as well, where there is one; this says so when there is none."""
    query = torch.randn(4, 2, 65, 40, device="cuda")
    reference = gafext.ops.flash_attention(query.cpu(), query.cpu(), query.cpu())
    torch.testing.assert_close(torch.ops.gafext.flash_attention(query, query, query).cpu(), reference)


def test_torch_set_num_threads_is_respected():
    code = """
import os, time, torch
from gafext.ops import flash_attention
query = torch.randn(4, 8, 512, 64)
torch.set_num_threads(1)
flash_attention(query, query, query)
wall, cpu = time.perf_counter(), time.process_time()
for _ in range(5):
    flash_attention(query, query, query)
print((time.process_time() - cpu) / (time.perf_counter() - wall))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.3  # processors in use
