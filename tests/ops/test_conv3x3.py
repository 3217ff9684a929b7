"""conv3x3 against float64, against PyTorch's conv2d, and against misuse."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_same_when_compiled,
    assert_same_words,
    called,
    channels_last,
    max_abs_diff,
)

from gafext import _C, ops
from gafext.ops.conv3x3 import reference_conv3x3, slower_reasons, unsupported_reasons

OP = torch.ops.gafext.conv3x3


def conv3x3(x, weight, bias=None, residual=None):
    """The kernel, also where PyTorch is faster."""
    return OP(x.contiguous(memory_format=torch.channels_last), weight, bias, residual)


def problem(batch, in_channels, out_channels, height, width):
    weight = torch.randn(out_channels, in_channels, 3, 3) * (9 * in_channels) ** -0.5
    return channels_last(batch, in_channels, height, width), weight, torch.randn(out_channels)


def assert_exact(*inputs):
    """To a few roundings of the largest terms: Winograd's transforms and sums both add to the error."""
    out = conv3x3(*inputs)
    x, weight, *addends = (None if t is None else t.double() for t in inputs)
    exact = reference_conv3x3(x, weight, *addends)
    assert out.shape == exact.shape and out.dtype == inputs[0].dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    size = F.conv2d(x.abs(), weight.abs(), padding=1).max()
    rounding = torch.finfo(out.dtype).eps / 2 * exact.abs() if out.dtype != torch.float32 else 0
    assert ((out.double() - exact).abs() <= 1e-6 * size + rounding).all()


SIZES = [
    (1, 1, 1, 1, 1),
    (1, 3, 5, 4, 4),
    (2, 33, 65, 5, 3),
    (3, 70, 100, 13, 17),
    (1, 257, 63, 1, 9),
    (9, 16, 64, 16, 16),
    (1, 65, 16, 63, 65),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(sizes, dtype):
    x, weight, bias = (t.to(dtype) for t in problem(*sizes))
    assert_exact(x, weight, bias)
    assert_exact(x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_bias_per_image_and_a_residual(sizes, dtype):
    x, weight, bias = (t.to(dtype) for t in problem(*sizes))
    batch, _, out_channels, height, width = sizes
    per_image = torch.randn(batch, out_channels, dtype=dtype)
    residual = channels_last(batch, out_channels, height, width).to(dtype)
    for addends in ((per_image,), (per_image, residual), (bias, residual), (None, residual)):
        assert_exact(x, weight, *addends)
        rounding = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # PyTorch rounds each sum
        out, expected = ops.conv3x3(x, weight, *addends), conv3x3(x, weight, *addends)
        torch.testing.assert_close(out, expected, atol=rounding, rtol=rounding)


def test_strides_of_a_residual():
    x, weight, bias = problem(2, 40, 20, 9, 7)
    wide = channels_last(4, 50, 12, 8)
    for residual in (wide[::2, 3:23, 1:10, :7], wide[:1, :20, :9, :7].expand(2, -1, -1, -1)):
        assert_exact(x, weight, bias, residual)
        assert torch.equal(
            ops.conv3x3(x, weight, bias, residual.contiguous(), backend="kernel"), conv3x3(x, weight, bias, residual)
        )
    assert_exact(x, weight, bias.expand(2, -1))


def test_more_tiles_than_fit_the_scratch_memory():
    assert_exact(*problem(3, 1024, 16, 32, 32))  # 192 tiles of 36 x 1024 floats, 24 MB at a time


@pytest.mark.parametrize("sizes", [(8, 320, 320, 32, 32), (8, 640, 320, 16, 16), (2, 1280, 640, 8, 8)], ids=str)
def test_nearly_as_exact_as_pytorch_where_it_is_used(sizes):
    x, weight, bias = problem(*sizes)
    exact = reference_conv3x3(x.double(), weight.double(), bias.double())
    error, allowed = (
        (t.double() - exact).square().mean().sqrt()
        for t in (conv3x3(x, weight, bias), reference_conv3x3(x, weight, bias))
    )
    assert error <= 2.5 * allowed


def test_strides():
    x, weight, bias = problem(2, 40, 20, 9, 7)
    wide = channels_last(4, 50, 12, 8)
    for strided in (wide[::2, 3:43, 1:10, :7], wide[:2, 10:, ::2, ::3], x[:1].expand(3, -1, -1, -1), x.contiguous()):
        assert_exact(strided, weight, bias)
        assert_exact(strided, weight.permute(0, 1, 3, 2), bias.repeat(2)[::2])
    strided = wide[::2, 3:43, 1:10, :7].as_strided((2, 40, 9, 7), (2 * 4800, 1, 400, 50))
    assert "gafext::conv3x3" in called(conv3x3, strided, weight, bias)


def outlying_channels(x):
    return x * torch.where(torch.arange(x.shape[1]) % 50 == 0, 50.0, 1.0)[:, None, None]


def outlying_pixels(x):
    return x * torch.where(torch.rand(1, 1, *x.shape[2:]) < 0.05, 50.0, 1.0)


@pytest.mark.parametrize("sizes", [(1, 128, 128, 1, 1), (2, 129, 257, 5, 3), (3, 320, 130, 13, 17)], ids=str)
@pytest.mark.parametrize(
    "change",
    [F.silu, outlying_channels, outlying_pixels, *(functools.partial(torch.mul, 10.0**i) for i in (-28, -12, 0, 30))],
)
def test_wide_layers_in_bfloat16_are_as_good_as_pytorchs(change, sizes):
    """AVX512_VNNI multiplies them as 16-bit integers: of any size, and beside any others, no term loses its digits."""
    x, weight, bias = (t.bfloat16() for t in problem(*sizes))
    weight[::3] /= 1024
    x = change(x).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = reference_conv3x3(x.double(), weight.double())
    rounding = exact.bfloat16() - exact  # PyTorch's error
    error = conv3x3(x, weight).double() - exact
    assert error.norm() < 1.25 * rounding.norm()
    per_channel = (error.square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).sqrt()
    assert exact[:, 0].numel() == 1 or per_channel.max() < 5e-3
    assert error.abs().max() < 2 * rounding.abs().max()
    bias *= exact.std()
    moved = conv3x3(x, weight, bias).double() - (exact + bias[:, None, None])
    assert moved.norm() < 1.25 * 2**0.5 * rounding.norm()  # of sums as large again


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_channels_whose_weights_make_up_for_their_size_keep_their_digits(spread):
    x, weight, _ = (t.bfloat16() for t in problem(1, 320, 192, 12, 12))
    scale = torch.randn(320, 1, 1).mul(spread).exp()
    x, weight = (x * scale).bfloat16(), (weight / scale).bfloat16()
    exact = reference_conv3x3(x.double(), weight.double())
    assert (conv3x3(x, weight).double() - exact).norm() < 1.7 * (exact.bfloat16() - exact).norm()


@pytest.mark.parametrize("size", [1, 4, 6, 7, 8, 12, 1000])
def test_a_loud_pixel_leaves_its_neighbours_their_digits(size):
    x, weight, _ = (t.bfloat16() for t in problem(1, 256, 192, 16, 16))
    x[:, :, 5, 6] *= size
    exact = reference_conv3x3(x.double(), weight.double())
    of_pixel, rounding = ((out - exact).square().sum(1).sqrt() for out in (conv3x3(x, weight), exact.bfloat16()))
    assert (of_pixel < 2 * rounding).all()
    assert of_pixel.mean() < 1.25 * rounding.mean()


@pytest.mark.parametrize("size", [10, 11])
def test_a_pixel_just_below_the_limit_costs_its_neighbours_little(size):
    x, weight, _ = (t.bfloat16() for t in problem(1, 256, 192, 16, 16))
    x[:, :, 5, 6] *= size
    exact = reference_conv3x3(x.double(), weight.double())
    error, pytorchs, rounding = (
        out - exact for out in (conv3x3(x, weight), F.conv2d(x, weight, padding=1), exact.bfloat16())
    )
    assert error.abs().max() < 2 * pytorchs.abs().max() and error.norm() < 1.25 * pytorchs.norm()
    assert (error.norm(dim=1) < 2.4 * rounding.norm(dim=1)).all()


@pytest.mark.parametrize("factor", [10, 50, 1000])
def test_output_channels_that_hardly_read_loud_channels_keep_their_digits(factor):
    x, weight, _ = (t.bfloat16() for t in problem(2, 320, 192, 16, 16))
    loud = torch.where(torch.arange(320) % 50 == 0, float(factor), 1.0)[:, None, None]
    x = (x * loud).bfloat16()
    groups = torch.arange(192)[:, None] // 16 == torch.arange(320) // 16
    quiet = weight.clone()
    quiet[1::2] = (quiet[1::2] / loud).bfloat16()
    apart = (weight * groups[:, :, None, None]).bfloat16()
    for changed in (quiet, apart):
        exact = reference_conv3x3(x.double(), changed.double())
        errors = [(out.double() - exact).square().sum((0, 2, 3)) for out in (conv3x3(x, changed), exact.bfloat16())]
        assert (errors[0] < 4 * errors[1]).all()


@pytest.mark.parametrize("side", [5, 9, 16])
@pytest.mark.parametrize("pictures", [2, 5])
def test_what_a_picture_is_beside_does_not_change_its_bits(pictures, side):
    x, weight, bias = (t.bfloat16() for t in problem(pictures, 130, 128, side, side))
    x[1, :, 4, 4] *= 1000
    if pictures > 2:
        x[3] *= 0
        x[4, 7] = 1e30
    apart = [conv3x3(picture[None], weight, bias) for picture in x]
    assert torch.equal(conv3x3(x, weight, bias), torch.cat(apart))


@pytest.mark.parametrize("bad_channel", [0, 16, 160])
def test_many_pictures_and_uneven_weights_do_not_change_what_is_beside_them(bad_channel):
    x, weight, _ = (t.bfloat16() for t in problem(19, 200, 161, 9, 9))
    x[[1, 9, 15, 18], :, 4, 4] *= 1000
    assert torch.equal(conv3x3(x, weight), torch.cat([conv3x3(picture[None], weight) for picture in x]))
    loud = torch.where(torch.arange(200) % 50 == 0, 100.0, 1.0)[:, None, None]
    x, quiet = (x[2:5] * loud).bfloat16(), weight.clone()
    quiet[bad_channel] = (quiet[bad_channel] / loud).bfloat16()
    exact = reference_conv3x3(x.double(), quiet.double())[:, bad_channel]
    error = conv3x3(x, quiet)[:, bad_channel].double() - exact
    assert error.norm() < 1.25 * (exact.bfloat16() - exact).norm()


def test_zeros_in_bfloat16_give_the_bias():
    bias = torch.randn(130).bfloat16()
    x = channels_last(1, 200, 9, 9).bfloat16()
    for image, weight in ((0 * x, torch.randn(130, 200, 3, 3)), (x, torch.zeros(130, 200, 3, 3))):
        assert torch.equal(conv3x3(image, weight.bfloat16(), bias), bias[:, None, None].expand(1, -1, 9, 9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_wide_layers_of_bfloat16(bad):
    x, weight = channels_last(1, 130, 12, 12).bfloat16(), torch.randn(150, 130, 3, 3).bfloat16()
    x[0, 128, 5, 5] = bad
    finite = conv3x3(x, weight).isfinite().all(dim=1)[0]
    assert not finite[4:7, 4:7].any() and finite[:4].all() and finite[8:].all()
    x[0, 128, 5, 5] = 0
    weight[3, 129, 1, 1] = bad
    finite = conv3x3(x, weight).isfinite()
    assert not finite[:, 3].any() and finite[:, :3].all() and finite[:, 4:].all()


def test_empty_inputs():
    x, weight, bias = problem(2, 8, 4, 5, 6)
    assert conv3x3(x[:0], weight, bias).shape == (0, 4, 5, 6)
    assert conv3x3(x[:, :, :0], weight, bias).shape == (2, 4, 0, 6)
    assert conv3x3(x, weight[:0], bias[:0]).shape == (2, 0, 5, 6)


def test_a_nan_stays_within_its_tiles():
    x, weight, bias = problem(1, 8, 4, 16, 16)
    x[0, 3, 9, 9] = float("nan")
    out = conv3x3(x, weight, bias).isnan().any(dim=1)[0]
    assert out[8:11, 8:11].all()
    assert not out[:4].any() and not out[:, :4].any() and not out[12:].any() and not out[:, 12:].any()


def test_same_bits_on_any_number_of_threads():
    assert_same_bits_on_any_number_of_threads(conv3x3, *problem(3, 70, 100, 13, 17))
    for sizes in ((3, 150, 200, 13, 17), (1, 128, 128, 32, 32)):
        wide = (t.bfloat16() for t in problem(*sizes))
        assert_same_bits_on_any_number_of_threads(conv3x3, *wide)


BAD_INPUTS = {
    "flat x": (lambda t: (t(3, 8), t(5, 8, 3, 3)), "x must have shape (batch, channels, height, width), got (3, 8)"),
    "weight": (
        lambda t: (t(1, 8, 4, 4), t(5, 9, 3, 3)),
        "weight must have shape (out_channels, 8, 3, 3) to go with x (1, 8, 4, 4), got (5, 9, 3, 3)",
    ),
    "kernel": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 1, 1)),
        "weight must have shape (out_channels, 8, 3, 3) to go with x (1, 8, 4, 4), got (5, 8, 1, 1)",
    ),
    "bias": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3), t(8)),
        "bias must have shape (5,) or (1, 5) to go with x (1, 8, 4, 4) and weight (5, 8, 3, 3), got (8,)",
    ),
    "bias per image": (
        lambda t: (t(2, 8, 4, 4), t(5, 8, 3, 3), t(3, 5)),
        "bias must have shape (5,) or (2, 5) to go with x (2, 8, 4, 4) and weight (5, 8, 3, 3), got (3, 5)",
    ),
    "residual": (
        lambda t: (t(2, 8, 4, 4), t(5, 8, 3, 3), t(5), t(2, 8, 4, 4)),
        "residual must have shape (2, 5, 4, 4) to go with x (2, 8, 4, 4) and weight (5, 8, 3, 3), got (2, 8, 4, 4)",
    ),
    "residual's dtype": (
        lambda t: (t(2, 8, 4, 4), t(5, 8, 3, 3), None, t(2, 5, 4, 4).half()),
        "residual must have the dtype of x, float32, got float16",
    ),
    "dtype": (
        lambda t: (t(1, 8, 4, 4), t(5, 8, 3, 3).half()),
        "weight must have the dtype of x, float32, got float16",
    ),
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(ops.conv3x3, OP, make, f"conv3x3: {words}")


UNSUPPORTED = {
    "dtype": (lambda x: x.double(), "dtype must be float32, float16 or bfloat16, got float64"),
    "layout": (lambda x: x.contiguous(), "x must be channels-last, got a stride of 30 from channel to channel"),
}


@pytest.mark.parametrize("change, words", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_the_bare_operation_says_what_it_cannot_do(change, words):
    x, weight, _ = problem(2, 8, 4, 5, 6)
    x = change(x)
    assert_refused(OP, f"conv3x3: {words}", x, weight.to(x.dtype))


def test_unsupported_goes_to_pytorch_with_the_reason():
    inputs = [t.double() for t in problem(2, 8, 4, 5, 6)]
    assert unsupported_reasons(*inputs) == ["dtype must be float32, float16 or bfloat16, got float64"]
    assert torch.equal(ops.conv3x3(*inputs), reference_conv3x3(*inputs))


def test_a_residual_of_another_layout_is_refused():
    x, weight, bias = problem(2, 8, 4, 5, 6)
    words = "conv3x3: residual must be channels-last, got a stride of 30 from channel to channel"
    assert_refused(OP, words, x, weight, bias, torch.zeros(2, 4, 5, 6))


def test_opcheck():
    inputs = tuple(t.requires_grad_() for t in problem(2, 8, 4, 5, 6))
    torch.library.opcheck(OP.default, inputs)
    torch.library.opcheck(OP.default, inputs[:2])
    residual = channels_last(2, 4, 5, 6).requires_grad_()
    torch.library.opcheck(OP.default, (*inputs[:2], torch.randn(2, 4, requires_grad=True), residual))
    torch.library.opcheck(OP.default, tuple(t.detach().bfloat16() for t in (*inputs, residual)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    sizes = ((2, 5), (3, 9), (5, 8))
    inputs = (problem(batch, 8, 4, size, size + 1) for batch, size in sizes)
    assert_same_when_compiled(conv3x3, inputs, backend=backend)


def test_the_network_uses_it_for_wide_convolutions_in_inference():
    wide, narrow = problem(1, 64, 32, 8, 8), problem(1, 31, 128, 8, 8)
    for backend, inputs, used in (
        ("auto", wide, True),
        ("kernel", wide, True),
        ("sdpa", wide, False),
        ("auto", narrow, False),
    ):
        assert ("gafext::conv3x3" in called(ops.conv3x3, *inputs, backend=backend)) == used
        out = ops.conv3x3(*inputs, backend=backend)
        torch.testing.assert_close(out, reference_conv3x3(*inputs), atol=1e-5, rtol=1e-5)


def test_pictures_too_large_to_copy_go_to_pytorch(pretend_cpu):
    weight = torch.empty(128, 128, 3, 3, dtype=torch.bfloat16, device="meta")
    large = torch.empty(1, 128, 512, 513, dtype=torch.bfloat16, device="meta")
    pretend_cpu("amx")
    assert slower_reasons(large, weight) == ["pictures beyond 64 MiB would be copied as a whole"]
    assert slower_reasons(large[..., :512], weight) == slower_reasons(large.float(), weight.float()) == []
    pretend_cpu("avx512")
    assert slower_reasons(large, weight) == []


def test_more_pictures_than_are_copied_at_a_time():
    """On tiles 48 MB: 7 pictures of 160x160 pixels of 128 channels."""
    x, weight, bias = channels_last(9, 128, 160, 160).bfloat16(), torch.randn(16, 128, 3, 3), torch.randn(9, 16)
    weight, bias = (weight / 34).bfloat16(), bias.bfloat16()
    residual = channels_last(9, 16, 160, 160).bfloat16()
    out = OP(x, weight, bias, residual)
    for image in (0, 6, 7, 8):
        one = slice(image, image + 1)
        assert torch.equal(OP(x[one], weight, bias[one], residual[one]), out[one])
    exact = reference_conv3x3(x.float(), weight.float(), bias.float(), residual.float())
    assert max_abs_diff(out, exact) < 0.05


def test_what_pytorch_does_faster_goes_to_pytorch_with_the_reason():
    few_channels, few_tiles, enough = problem(4, 31, 64, 8, 8), problem(3, 32, 64, 4, 4), problem(4, 64, 32, 4, 4)
    few = "fewer than 32 channels on one side or 64 on both: the transforms outweigh the products"
    assert slower_reasons(*few_channels[:2]) == slower_reasons(*problem(4, 63, 63, 8, 8)[:2]) == [few]
    on_amx = _C.build_info()["instruction_set"] == "amx"
    reasons = ["fewer than 4 tiles of 4×4 do not pay for transforming the weights"] if on_amx else []
    assert slower_reasons(*few_tiles[:2]) == reasons
    assert slower_reasons(*enough[:2]) == []
    for_few = reference_conv3x3 if on_amx else OP
    for inputs, kernel in ((few_channels, reference_conv3x3), (few_tiles, for_few), (enough, OP)):
        assert torch.equal(ops.conv3x3(*inputs), kernel(*inputs))
    x, weight, bias = few_channels
    assert ops.conv3x3(x.contiguous(), weight, bias).is_contiguous(memory_format=torch.channels_last)


def test_in_bfloat16_amx_needs_more_channels(pretend_cpu):
    x, weight = (tensor.bfloat16() for tensor in problem(4, 127, 128, 8, 8)[:2])
    pretend_cpu("amx")
    assert slower_reasons(x, weight) == ["fewer than 128 channels: the transforms outweigh the products"]
    assert slower_reasons(x.float(), weight.float()) == []
    pretend_cpu("avx512")
    assert slower_reasons(x, weight) == []
