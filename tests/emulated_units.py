"""The kernels of tests/cuda_emulator that try the emulator itself: single instructions, and a matrix product."""

import functools

import torch
from emulator import Call, Library, emulate_call
from emulator_build import MACHINE


@functools.cache
def unit_kernels():
    return Library([MACHINE / "unit_kernels.cu", MACHINE / "matmul.cu"], [MACHINE / "unit_kernels.h"])


def run(operation, out_shape, out_dtype=torch.int32, library=None, device=None, **arguments):
    def make_call():
        out = torch.empty(out_shape, dtype=out_dtype)
        return Call(out, arguments | dict(out=out))

    return emulate_call(library or unit_kernels(), operation, make_call, **(device or {}))


def product(a, b, b_transposed, library=None, **device):
    columns = b.shape[0] if b_transposed else b.shape[1]
    sizes = dict(rows=a.shape[0], columns=columns, depth=a.shape[1], b_transposed=b_transposed, dtype=a.dtype)
    strides = dict(a_stride=a.stride(0), b_stride=b.stride(0), out_stride=columns)
    return run("matmul", (a.shape[0], columns), torch.float32, library, device, a=a, b=b, **sizes, **strides)


def assert_right_product(rows, columns, depth, dtype, b_transposed, library=None):
    a = torch.randn(rows, depth + 8).to(dtype)[:, :depth]
    b = torch.randn(columns, depth + 8).to(dtype)[:, :depth]
    b = b if b_transposed else b.T.contiguous()
    expected = a.double() @ (b.T if b_transposed else b).double()
    out = product(a, b, b_transposed, library)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
