"""group_norm_silu against float64, against PyTorch's group_norm and silu, and against misuse.

The CUDA kernel runs here under the emulator, and on a GPU where there is one.
"""

import pytest
import torch
from emulator import ORDERS, emulate
from helpers import (
    BACKENDS,
    DTYPES,
    HAS_CUDA,
    assert_as_exact_as_torch,
    assert_gradients,
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_same_words,
    called,
    channels_last,
    mps_implementation,
    on_devices,
)

from gafext.ops import group_norm_silu
from gafext.ops.group_norm_silu import reference_group_norm_silu, unsupported_reasons

OP = torch.ops.gafext.group_norm_silu


def problem(shape, dtype=torch.float32, device="cpu"):
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    return tuple(t.to(device, dtype) for t in (2 * channels_last(*shape) + 1, weight, bias))


def assert_exact(function, *args, **options):
    out = assert_as_exact_as_torch(function, reference_group_norm_silu, *args, **options)
    assert out.movedim(1, -1).is_contiguous()


def emulated(**machine):
    """The CUDA kernel under the emulator."""
    return lambda *args, **options: emulate("group_norm_silu", *args, **options, **machine)


kernels = pytest.mark.parametrize("kernel", [OP, emulated()], ids=["cpu", "cuda under the emulator"])
SIZES = [  # (shape, groups)
    ((1, 1, 2), 1),
    ((2, 6, 5), 3),
    ((1, 40, 7, 3), 4),
    ((3, 30, 1, 9), 5),
    ((2, 17, 33), 1),
    ((1, 64, 16, 16), 32),
    ((2, 96, 13, 1), 8),
    ((1, 520, 2, 2), 2),
    ((2, 12, 4, 4), 12),
    ((1, 63, 65), 63),
    ((1, 257, 63), 257),
    ((2, 65, 257), 13),
    ((1, 320, 29, 37), 32),
]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", SIZES, ids=str)
def test_odd_sizes(shape, groups, dtype, device):
    x, weight, bias = problem(shape, dtype, device)
    for silu in (True, False):
        assert_exact(OP, x, groups, weight, bias, silu=silu)
    assert_exact(OP, x, groups, eps=0.1)


CUDA_SIZES = [  # (batch, channels, positions), groups, and which way of the kernel that is
    ((2, 320, 9), 32, "a whole slab, 4 packs per thread"),
    ((2, 240, 30), 4, "the same, 60 channels a group"),
    ((33, 80, 500), 8, "a whole slab, 16 packs per thread, 66 slabs"),
    ((2, 32, 2500), 4, "chunks: few blocks"),
    ((1, 960, 130), 8, "chunks: a wide slab"),
    ((2, 30, 41), 6, "single elements"),
    ((1, 33, 1300), 3, "single elements in chunks"),
    ((2, 24, 17), 24, "one channel a group"),
    ((1, 32, 1), 2, "one position"),
    ((1, 511, 6), 1, "one chunk of single elements, more threads than for 16 packs"),
    ((1, 3080, 6), 8, "one chunk of packs, more threads than for 16 packs"),
]


@pytest.mark.parametrize("shape, groups, where", CUDA_SIZES, ids=[where for *_, where in CUDA_SIZES])
def test_the_cuda_kernel_under_the_emulator(shape, groups, where):
    orders = ORDERS if shape[0] < 10 else {"random lanes": ORDERS["random lanes"]}
    for dtype in DTYPES:
        x, weight, bias = problem(shape, dtype)
        assert_exact(emulated(orders=orders), x, groups, weight, bias)
    assert_exact(emulated(orders={"reverse": ORDERS["reverse"]}), x, groups, None, bias, 0.1, silu=False)


@kernels
@pytest.mark.parametrize("first, gap", [(0, 8), (8, 8), (1, 7), (0, 3)])
def test_strides(first, gap, kernel):
    for dtype in DTYPES:
        x = torch.randn(2, 50, first + 24 + gap).to(dtype)[:, ::2, first : first + 24].transpose(1, 2)
        weight = torch.randn(27).to(dtype)[3:]
        assert_exact(kernel, x, 4, weight)
        assert_exact(kernel, x[:1].expand(3, -1, -1), 4)


def test_strides_of_weight_and_bias():
    x, weight, bias = problem((2, 24, 25))
    assert_exact(OP, x, 4, torch.stack([weight, bias], dim=1)[:, 0], weight[:1].expand(24))


@kernels
def test_nan_spreads_as_in_pytorch(kernel):
    x, weight, bias = problem((2, 40, 30))
    x[0, 3, 7], x[1, 39, 0] = float("nan"), float("inf")
    out = kernel(x, 4, weight, bias)
    torch.testing.assert_close(out, reference_group_norm_silu(x, 4, weight, bias), equal_nan=True)
    assert out[0, :10].isnan().all() and out[0, 10:20].isfinite().all() and out[1, :20].isfinite().all()


@kernels
def test_large_means_lose_no_digits(kernel):
    x, weight, bias = problem((2, 64, 500))
    assert_exact(kernel, x + 100, 2, weight, bias)


def test_outliers_and_drifts_lose_no_digits():
    x, weight, bias = problem((2, 64, 500))
    x[:, :, 0] = 3e4  # the first position is nowhere near the mean
    assert_exact(OP, x, 2, weight, bias)
    assert_exact(OP, x.sort(dim=2).values.movedim(1, -1).contiguous().movedim(-1, 1) + 1e3, 2, weight, bias)


@pytest.mark.parametrize("value", [-1e38, -200.0, -89.0, 0.0, 89.0, 200.0, 3e38, float("inf"), -float("inf")])
def test_silu_of_large_values(value):
    x, weight, _ = problem((2, 9, 5))
    bias = torch.full((9,), value)
    out, expected = (function(x, 3, weight, bias) for function in (OP, reference_group_norm_silu))
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 32, 40, 40), (3, 320, 15, 15), (9, 33, 700)], ids=str)
def test_same_bits_on_any_number_of_threads(shape):
    for dtype in DTYPES:
        x, *rest = problem(shape, dtype)
        groups = 32 if shape[1] % 32 == 0 else 3
        assert_same_bits_on_any_number_of_threads(lambda x, *rest, g=groups: OP(x, g, *rest), x, *rest)


@on_devices
@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 0, 3, 3), (2, 8, 0, 3)], ids=str)
def test_empty_inputs(shape, device):
    x = torch.randn(shape[0], *shape[2:], shape[1], device=device).movedim(-1, 1)
    assert OP(x, 4).shape == shape and group_norm_silu(x, 4).shape == shape
    OP(x.requires_grad_(), 4).sum().backward()
    assert x.grad.shape == shape


def test_the_function_takes_the_kernel():
    x, weight, bias = problem((2, 8, 5, 6))
    assert unsupported_reasons(x, 4, weight, bias) == []
    expected = {True: OP(x, 4, weight, bias), False: reference_group_norm_silu(x, 4, weight, bias)}
    for backend in BACKENDS:
        kernel = backend in ("auto", "kernel")
        assert ("gafext::group_norm_silu" in called(group_norm_silu, x, 4, weight, bias, backend=backend)) == kernel
        assert torch.equal(group_norm_silu(x, 4, weight, bias, backend=backend), expected[kernel])


def test_autocast_and_gradients_go_to_pytorch():
    x, weight, bias = problem((2, 8, 5, 6))
    weight.requires_grad_()
    assert "gradient" in " ".join(unsupported_reasons(x, 4, weight, bias))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in " ".join(unsupported_reasons(x, 4, weight, bias))
        assert "gafext::group_norm_silu" not in called(group_norm_silu, x, 4, weight, bias)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_the_network_uses_the_kernel_on_cuda():
    x, weight, bias = problem((2, 64, 16, 16), torch.float16, "cuda")
    for layout, used in ((x, True), (x.contiguous(), False)):
        assert ("gafext::group_norm_silu" in called(group_norm_silu, layout, 32, weight, bias)) == used
        out = group_norm_silu(layout, 32, weight, bias)
        torch.testing.assert_close(out, reference_group_norm_silu(x, 32, weight, bias), atol=1e-2, rtol=1e-2)


S = (2, 8, 5, 6)
BAD_INPUTS = {
    "2 dimensions": (
        lambda t: (t(2, 8), 4),
        "x must have shape (batch, channels, length) or (batch, channels, height, width), got (2, 8)",
    ),
    "groups": (lambda t: (t(*S), 3), "num_groups must divide the channels of x (2, 8, 5, 6), got 3"),
    "no groups": (lambda t: (t(*S), 0), "num_groups must divide the channels of x (2, 8, 5, 6), got 0"),
    "weight": (lambda t: (t(*S), 4, t(7)), "weight must have shape (8,) to go with x (2, 8, 5, 6), got (7,)"),
    "bias": (
        lambda t: (t(*S), 4, t(8), t(8, 1)),
        "bias must have shape (8,) to go with x (2, 8, 5, 6), got (8, 1)",
    ),
    "dtype": (lambda t: (t(*S), 4, t(8).half()), "weight must have the dtype of x, float32, got float16"),
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(group_norm_silu, OP, make, f"group_norm_silu: {words}")


UNSUPPORTED = {
    "dtype": (lambda: (problem(S)[0].double(), 4), "dtype must be float32, float16 or bfloat16, got float64"),
    "a wide group": (lambda: (channels_last(1, 513, 2), 1), "a group must have at most 512 channels, got 513"),
    "layout": (
        lambda: (torch.randn(S), 4),
        "x must be channels-last, got a stride of 30 from channel to channel",
    ),
    "rows apart": (
        lambda: (channels_last(2, 8, 5, 7)[..., :6], 4),
        "x must have a stride of 48 from row to row, got 56",
    ),
}


@pytest.mark.parametrize("make, words", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_goes_to_pytorch_with_the_reason(make, words):
    x, groups = make()
    assert unsupported_reasons(x, groups)[0] == words
    assert torch.equal(group_norm_silu(x, groups), reference_group_norm_silu(x, groups))
    assert_refused(OP, f"group_norm_silu: {words}", x, groups)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("affine", [2, 1, 0])
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (3, 8, 7)], ids=str)
def test_gradients(shape, affine, silu):
    def on(function):
        return lambda x, *affine: function(x, 4, *affine, silu=silu)

    assert_gradients((on(OP), on(group_norm_silu)), on(reference_group_norm_silu), *problem(shape)[: 1 + affine])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, weight, bias = (t.requires_grad_() for t in problem((2, 8, 5, 6), dtype))
    torch.library.opcheck(OP.default, (x, 4, weight, bias))


@pytest.mark.parametrize(
    "shape", [(2, 8, 7), (2, 8, 1, 1), (1, 4, 1), (2, 8, 1, 6), (2, 8, 6, 1), (0, 4, 2, 3)], ids=str
)
def test_the_fake_has_the_memory_of_the_kernel(shape):
    x = channels_last(*shape)
    torch.library.opcheck(OP.default, (x, 4), {"silu": False}, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [OP, group_norm_silu], ids=["operation", "function"])
def test_compile_in_one_graph_with_dynamic_shapes(function, backend):
    compiled = torch.compile(
        lambda x, weight, bias: function(x, 4, weight, bias), backend=backend, fullgraph=True, dynamic=True
    )
    for batch, side in ((2, 5), (3, 9), (5, 8)):
        inputs = problem((batch, 8, side, side + 1))
        expected = reference_group_norm_silu(inputs[0], 4, *inputs[1:])
        torch.testing.assert_close(compiled(*inputs), expected, atol=1e-5, rtol=1e-5)


def test_the_mps_route_has_the_values_and_the_memory_of_the_kernel():
    x, weight, bias = problem((2, 8, 5, 6))
    ours, mps = OP(x, 4, weight, bias), mps_implementation(OP)(x, 4, weight, bias)
    assert mps.stride() == ours.stride()
    torch.testing.assert_close(mps, ours)
