"""3×3 convolution by Winograd's algorithm, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel
from gafext.ops.conv2d import conv2d
from gafext.ops.patches import patches_of

_OP = "conv3x3"
# Below it PyTorch is faster on AMX's tiles: in bfloat16 gafext has .8 of its speed with 32 and 64 channels, 1.26 with
# 128 (two cores of a Sapphire Rapids).
_FEW_CHANNELS_ON_TILES = 128
# Of both sides, and of the wider one. With AVX-512, float32, gafext has .8 to .9 of PyTorch's speed with 32 to 32
# channels, 1.06 to 1.4 with 32 to 64 or back, 1.2 to 1.7 with 64 to 96; with AVX2 1.1, 1.2 and 1.3 to 1.8 (same
# machine). In half precision without AMX the ratios are larger.
_FEW_CHANNELS, _FEW_WIDER_CHANNELS = 32, 64
_FEW_CHANNELS_OF_PATCHES = 128  # of a weight's gradient
# Of a weight's gradient: sums over 8 images of 4x4 in one product had 2.1 times PyTorch's error, over 4 images 1.6.
_IMAGES_OF_A_PRODUCT = 4
# Of a picture in bfloat16 with AMX: the kernel copies it, and keeps the memory (48 MB for smaller ones).
_MOST_COPIED_BYTES = 64 << 20
# With a map of one tile gafext has .2 to .6 of PyTorch's speed with AMX. Without there are never too few tiles: oneDNN
# reorders all weights at each call. With AVX2 one tile of 1280 channels had 4.2, two had 6.8 (one thread); AVX-512 was
# not measured.
_FEW_TILES = 4 if _common.INSTRUCTION_SET == "amx" else 0


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve with a 3×3 kernel, stride 1 and zero padding of 1, and add a bias and a residual.

    out[n, :, y, x] = bias + residual[n, :, y, x] + sum over i, j, c of weight[:, c, i, j] x[n, c, y + i - 1, x + j - 1]

    By Winograd's F(4×4, 3×3), which does a quarter of the multiplications: rounding errors are up to 4 times those of
    PyTorch's conv2d, at most 1e-5 for results of unit scale, and an infinity or a NaN affects up to 4×4 outputs beyond
    the formula's. In bfloat16 with AMX, whose tiles multiply it, directly. Sums are in float32, and rounded once.
    With AVX512_VNNI, layers of bfloat16 with 128 channels or more on both sides are products of 16-bit integers: that
    takes 0.6 to 0.85 of the time, at 1.1 times the errors of PyTorch's conv2d. Pictures whose pixels or channels differ
    so much in size that it would be above about twice are not; filters that cancel what they read, or read only
    channels that are quiet where others are loud, may exceed it.

    Args:
        x: [batch, in_channels, height, width], float32, float16 or bfloat16; copied on a CPU unless its memory format
            is channels-last, as is the residual.
        weight: [out_channels, in_channels, 3, 3], like x.
        bias: [out_channels], or one per image, [batch, out_channels], like x; or None.
        residual: [batch, out_channels, height, width], like x, or None.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both PyTorch's conv2d.

    Returns:
        [batch, out_channels, height, width], channels-last if the kernel ran, or PyTorch because it is faster.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is "kernel" and does not support them.

    With "auto", inputs that the kernel does not support (`unsupported_reasons`) or that PyTorch computes faster
    (`slower_reasons`) fall back to torch's conv2d; torch.ops.gafext.conv3x3 always runs the kernel.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308).
    """
    x, weight, bias, residual = _common.autocast(x, weight, bias, residual)
    check_conv3x3(x, weight, bias, residual)
    slower: list[str] = []

    def keep_slower_reasons() -> list[str]:
        slower.extend(slower_reasons(x, weight))
        return slower

    def unsupported() -> list[str]:
        return unsupported_reasons(x, weight, bias, residual)

    kernel = use_kernel(backend, _OP, unsupported, keep_slower_reasons)
    # oneDNN is 1.1 to 3 times as fast in channels-last memory (32 to 192 channels of 8x8 to 32x32, a Sapphire Rapids),
    # and the convolution's neighbours may run the kernel.
    if kernel or slower:
        x = x.contiguous(memory_format=torch.channels_last)
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    if kernel:
        return _common.call_kernel(torch.ops.gafext.conv3x3.default, x, weight, bias, residual)
    return _with_conv2d(conv2d if backend == "auto" else F.conv2d, x, weight, bias, residual)


def reference_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Compute the formula in plain PyTorch: any dtype, float64 included; differentiable."""
    return _with_conv2d(F.conv2d, x, weight, bias, residual)


def _with_conv2d(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias, residual) -> Tensor:
    if bias is not None and bias.dim() == 2:
        out = _sum(bias[:, :, None, None], convolve(x, weight, padding=1))
    else:
        out = convolve(x, weight, bias, padding=1)
    return out if residual is None else _sum(residual, out)


def _sum(addend: Tensor, out: Tensor) -> Tensor:
    """Return the sum, in the memory of `out`, which nobody else has, where no gradient and no memory format differs."""
    alike = addend.dtype == out.dtype and (addend.shape[2:] == (1, 1) or addend.stride() == out.stride())
    if torch.is_grad_enabled() or _common.is_transformed() or not alike:
        return addend + out  # in this order, the sum of two images has the memory format of the addend
    return out.add_(addend)


def unsupported_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    reasons = place_reasons(x, weight, bias, residual, fast_backward=True)
    return reasons + _common.dtype_reasons(x) + channel_reasons(x)


def place_reasons(x: Tensor, *others: Tensor | None, fast_backward: bool = False) -> list[str]:
    """List why the kernels do not support the tensors' device or their need of a gradient."""
    reasons = _common.place_reasons(x, *others, fast_backward=fast_backward)
    if x.device.type not in ("cpu", "meta"):
        reasons.append(f"the kernel is for CPUs, got {x.device.type} tensors")
    return reasons


def channel_reasons(x: Tensor) -> list[str]:
    """List why the kernels do not support the number of channels."""
    return [] if x.shape[1] else [f"channels must be at least 1, got {tuple(x.shape)}"]


def slower_reasons(x: Tensor, weight: Tensor) -> list[str]:
    """List why PyTorch's operation is faster for inputs that the kernel supports; empty when it is not."""
    reasons = copied_reasons(x)
    fewest, most = min(weight.shape[:2]), max(weight.shape[:2])
    if _on_tiles(x):
        few, words = fewest < _FEW_CHANNELS_ON_TILES, f"{_FEW_CHANNELS_ON_TILES} channels"
    else:
        few = fewest < _FEW_CHANNELS or most < _FEW_WIDER_CHANNELS
        words = f"{_FEW_CHANNELS} channels on one side or {_FEW_WIDER_CHANNELS} on both"
    if few:
        reasons.append(f"fewer than {words}: the transforms outweigh the products")
    # Not while compiling: it would add a guard on sizes.
    batch, _, height, width = x.shape
    if not torch.compiler.is_compiling() and batch * -(-height // 4) * -(-width // 4) < _FEW_TILES:
        reasons.append(f"fewer than {_FEW_TILES} tiles of 4×4 do not pay for transforming the weights")
    return reasons


def copied_reasons(x: Tensor) -> list[str]:
    """List why pictures of this size are too large for a copy."""
    if _on_tiles(x) and not torch.compiler.is_compiling() and x.nbytes > _MOST_COPIED_BYTES * x.shape[0]:
        return [f"pictures beyond {_MOST_COPIED_BYTES >> 20} MiB would be copied as a whole"]
    return []


def _on_tiles(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and _common.INSTRUCTION_SET == "amx"


def check_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of its file in csrc/ops."""
    check_shapes(_OP, x, weight)
    _common.check_same_kind(_OP, "x", x, "weight", weight)
    check_addends(_OP, x, weight, bias, residual)


def check_addends(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise a ValueError that begins with `op` for a bias or a residual that does not match."""
    batch, channels = x.shape[0], weight.shape[0]
    sizes = f"to go with x {tuple(x.shape)} and weight {tuple(weight.shape)}"
    if bias is not None:
        _common.require(
            bias.shape in ((channels,), (batch, channels)),
            op,
            lambda: f"bias must have shape ({channels},) or ({batch}, {channels}) {sizes}, got {tuple(bias.shape)}",
        )
        _common.check_same_kind(op, "x", x, "bias", bias)
    if residual is not None:
        shape = (batch, channels, *x.shape[2:])
        _common.require(
            residual.shape == shape,
            op,
            lambda: f"residual must have shape {shape} {sizes}, got {tuple(residual.shape)}",
        )
        _common.check_same_kind(op, "x", x, "residual", residual)


def check_shapes(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise a ValueError that begins with `op` unless x is an image and weight a 3×3 kernel for its channels."""
    shape = tuple(weight.shape)
    _common.require(
        x.dim() == 4, op, lambda: f"x must have shape (batch, channels, height, width), got {tuple(x.shape)}"
    )
    _common.require(
        weight.dim() == 4 and weight.shape[1:] == (x.shape[1], 3, 3),
        op,
        lambda: f"weight must have shape (out_channels, {x.shape[1]}, 3, 3) to go with x {tuple(x.shape)}, got {shape}",
    )


@torch.library.register_fake("gafext::conv3x3")
def _fake(x, weight, bias=None, residual=None):
    check_conv3x3(x, weight, bias, residual)
    _common.require_supported(_OP, _common.dtype_reasons(x))
    if residual is not None:
        check_channels_last(_OP, "residual", residual)
    return fake_result(_OP, x, weight, _common.dtype_reasons(x))


def fake_result(op: str, x: Tensor, weight: Tensor, dtype_reasons: list[str], name: str = "x") -> Tensor:
    """Return what the kernel `op` gives for tensors of matching shapes, without values; raise its errors."""
    _common.require_supported(op, dtype_reasons + channel_reasons(x))
    check_channels_last(op, name, x)
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, weight.shape[0]).permute(0, 3, 1, 2)


def check_channels_last(op: str, name: str, image: Tensor) -> None:
    _common.require(
        image.shape[1] == 1 or image.stride(1) == 1,
        op,
        lambda: f"{name} must be channels-last, got a stride of {image.stride(1)} from channel to channel",
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dims = 0 if bias is None else bias.dim()
    ctx.needs = [needed and given is not None for needed, given in zip(ctx.needs_input_grad, inputs, strict=False)]


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of `conv3x3` for x: a convolution with the weight's other transpose, its taps reversed.

    dx[n, :, y, x] = sum over i, j, o of weight[o, :, i, j] grad[n, o, y + 1 - i, x + 1 - j]

    Args:
        grad: [batch, out_channels, height, width], like x.
        x: [batch, in_channels, height, width].
        weight: [out_channels, in_channels, 3, 3], like x.

    Returns:
        [batch, in_channels, height, width].
    """
    if _common.has_backward_kernel(grad) and grad.shape[1] and x.shape[1] and not slower_reasons(x, weight):
        grad = grad.contiguous(memory_format=torch.channels_last)
        return torch.ops.gafext.conv3x3_input_gradient(grad, weight)
    return _torchs_backward(grad, x, weight, [True, False, False])[0]


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, *, patch_floats: int = 2**24) -> Tensor:
    """Compute the gradient of `conv3x3` for its weight, as one product with the patches of x where that is faster.

    dw[o, c, i, j] = sum over n, y, x of grad[n, o, y, x] x[n, c, y + i - 1, x + j - 1]

    Args:
        grad: [batch, out_channels, height, width], like x.
        x: [batch, in_channels, height, width].
        weight: [out_channels, in_channels, 3, 3], like x.
        patch_floats: numbers of patches to hold at a time; 2^24 take 64 MiB. Larger images are PyTorch's.

    Returns:
        [out_channels, in_channels, 3, 3].
    """
    # On one thread of an EPYC with AVX2, as fast as oneDNN's: 1.25 times with 4 images of 320 channels, 16x16, 1.5 with
    # 640 channels, 2.6 with 1280 of 8x8, 4.7 with 2 images of 1280, 4x4. With 64 or 96 channels .2 to .7 (AVX-512).
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    images = min(patch_floats // max(9 * channels * positions, 1), _IMAGES_OF_A_PRODUCT)
    fits = images and x.dtype == torch.float32 and min(weight.shape[:2]) >= _FEW_CHANNELS_OF_PATCHES
    if not fits or not _common.has_backward_kernel(grad) or slower_reasons(x, weight):
        return _torchs_backward(grad, x, weight, [False, True, False])[1]
    total = weight.new_zeros(weight.shape[0], 9 * channels)
    for some_grad, some_x in zip(grad.split(images), x.split(images), strict=True):
        rows = some_grad.permute(0, 2, 3, 1).flatten(0, 2)  # [positions, out_channels]
        total.addmm_(rows.T, patches_of(some_x, (3, 3), padding=1).flatten(0, 2))
    return total.view_as(weight)


def _torchs_backward(grad, x, weight, needs):
    channels = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, channels, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needs
    )


@torch.library.register_fake("gafext::conv3x3_input_gradient")
def _fake_input_gradient(grad, weight):
    op = "conv3x3_input_gradient"
    _common.require(
        grad.dim() == 4, op, lambda: f"grad must have shape (batch, channels, height, width), got {tuple(grad.shape)}"
    )
    _common.require(
        weight.dim() == 4 and weight.shape[0] == grad.shape[1] and weight.shape[2:] == (3, 3),
        op,
        lambda: (
            f"weight must have shape ({grad.shape[1]}, in_channels, 3, 3) to go with grad {tuple(grad.shape)}, "
            f"got {tuple(weight.shape)}"
        ),
    )
    _common.check_same_kind(op, "grad", grad, "weight", weight)
    return fake_result(op, grad, weight.transpose(0, 1), _common.dtype_reasons(grad), "grad")


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs = [*ctx.needs, False, False][:4]
    grad_x = input_gradient(grad, x, weight) if needs[0] else None
    grad_weight = weight_gradient(grad, x, weight) if needs[1] else None
    grad_bias = grad.sum(dim=(0, 2, 3) if ctx.bias_dims == 1 else (2, 3)) if needs[2] else None
    return grad_x, grad_weight, grad_bias, grad if needs[3] else None


_common.register_autograd("conv3x3", _backward, setup_context=_setup_context)
_common.refuse_second_order("conv3x3_input_gradient")
