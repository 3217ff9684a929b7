"""What is measured: every operation at the shapes of the published networks, and the forms of PyTorch it competes with.

An opponent is the code that one would write without gafext, in the form that suits it best. Inputs lie in memory as a
projection leaves them, (B, L, H * D); "contiguous" is given copies in its own layout before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gafext.ops import conv3x3, cross_view_attention, flash_attention, geglu, geglu_gate, group_norm_silu, linear
from gafext.ops.conv3x3 import reference_conv3x3
from gafext.ops.cross_view_attention import reference_cross_view_attention, sdpa_cross_view_attention
from gafext.ops.geglu import reference_geglu, reference_geglu_gate
from gafext.ops.group_norm_silu import reference_group_norm_silu


@dataclass(frozen=True)
class Contestant:
    name: str
    run: Callable[..., Tensor]
    prepare: Callable[..., tuple] | None = None  # of the inputs, before the clock starts: copies, packed weights
    context: Callable[[], AbstractContextManager] = nullcontext  # entered around a turn
    optional: bool = False  # left out, with its reason, where it cannot run
    compiled: bool = False  # by torch.compile, in its first call


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    where: str
    bound: str  # "compute" or "memory": which ceiling the table shows
    flops: int  # of the formula: a multiplication and an addition count two; softmax and gelu none
    inputs: Callable[[], tuple[Tensor, ...]]
    contestants: list[Contestant]  # ours first
    ours: str = "gafext"  # whom the opponents are compared with


# (batch, heads, queries, keys, head_dim, where it occurs)
ATTENTION_SHAPES = [
    (4, 5, 1024, 1024, 64, "self-attention, 4 views, 32x32 latents"),
    (1, 5, 4096, 4096, 64, "self-attention, 64x64 latents, or dense over 4 views"),
    (4, 10, 256, 256, 64, "self-attention, 16x16"),
    (4, 20, 64, 64, 64, "self-attention, 8x8"),
    (4, 5, 1024, 257, 64, "image tokens, 32x32"),
    (4, 10, 256, 257, 64, "image tokens, 16x16"),
    (4, 20, 64, 257, 64, "image tokens, 8x8"),
    (4, 5, 1024, 77, 64, "text, 32x32"),
    (4, 10, 256, 77, 64, "text, 16x16"),
    (4, 20, 64, 77, 64, "text, 8x8"),
    (1, 16, 257, 257, 80, "CLIP ViT-H, one portrait"),
    (4, 16, 257, 257, 80, "CLIP ViT-H, four portraits"),
    (1, 1, 1024, 1024, 512, "autoencoder, 32x32: PyTorch's own"),
    (1, 1, 4096, 4096, 512, "autoencoder, 64x64: PyTorch's own"),
    (4, 8, 1024, 1024, 40, "heads of Stable Diffusion 1, 32x32"),
    (4, 8, 256, 256, 96, "other heads"),
    (4, 8, 256, 256, 128, "other heads"),
    (4, 8, 256, 256, 160, "heads of Stable Diffusion 1, inner stages"),
]
# On GPUs besides those.
GPU_ATTENTION_SHAPES = [
    *((8, 8, n, n, width, "64 heads in all") for width in (40, 64, 80, 160) for n in (64, 256, 1024, 4096)),
    *((8, 8, n, n, 128, "64 heads in all") for n in (1024, 4096)),
    *(
        (8, heads, n, keys, 64, f"{what}, 4 views with guidance")
        for keys, what in ((257, "image tokens"), (77, "text"))
        for heads, n in ((20, 64), (10, 256), (5, 1024), (5, 4096))
    ),
    *((1, heads, n, 257, 64, "image tokens, 4 views as one row") for heads, n in ((20, 256), (10, 1024), (5, 4096))),
    (1, 1, 16384, 16384, 512, "autoencoder, 128x128"),
]
# (views, positions, heads of 64, where)
CROSS_VIEW_SHAPES = [
    (4, 1024, 5, "4 views, 32x32"),
    (4, 256, 10, "4 views, 16x16"),
    (4, 64, 20, "4 views, 8x8"),
    (6, 1024, 5, "6 views, 32x32"),
    (8, 1024, 5, "8 views, 32x32"),
    (16, 256, 10, "16 views, 16x16"),
]
# On GPUs besides those, with two portraits: the halves of guidance.
GPU_CROSS_VIEW_SHAPES = [
    (views, positions, heads, f"{views} views with guidance")
    for views in (4, 8)
    for positions, heads in ((1024, 5), (256, 10), (4096, 5))
]
# (rows, channels, where); the inner width is 4 * channels
GEGLU_SHAPES = [
    (4096, 320, "4 views, 32x32"),
    (1024, 640, "4 views, 16x16"),
    (256, 1280, "4 views, 8x8"),
]
# On GPUs besides those.
GPU_GEGLU_SHAPES = [(2 * rows, channels, f"{where}, with guidance") for rows, channels, where in GEGLU_SHAPES]
# (batch, channels, side, where), in 32 groups; on GPUs alone, for on CPUs the operation is PyTorch's
GROUP_NORM_SHAPES = [
    (8, 320, 32, "4 views with guidance, 32x32"),
    (8, 640, 32, "32x32, on the way up"),
    (8, 960, 32, "32x32, on the way up"),
    (8, 640, 16, "16x16"),
    (8, 1920, 16, "16x16, on the way up"),
    (8, 1280, 8, "8x8"),
    (8, 2560, 4, "4x4, on the way up"),
    (8, 320, 64, "64x64 latents"),
    (1, 512, 64, "autoencoder, 64x64"),
    (1, 256, 256, "autoencoder, 256x256"),
    (1, 128, 512, "autoencoder, 512x512"),
]
# (batch, input channels, output channels, side, where); with guidance, 4 views are a batch of 8
CONV_SHAPES = [
    (8, 320, 320, 32, "4 views with guidance, 32x32"),
    (8, 640, 320, 32, "32x32, on the way up"),
    (8, 640, 640, 16, "16x16"),
    (8, 1280, 640, 16, "16x16, on the way up"),
    (8, 1280, 1280, 8, "8x8"),
    (8, 2560, 1280, 8, "8x8, on the way up"),
    (8, 1280, 1280, 4, "4x4"),
    (1, 512, 512, 64, "autoencoder, 64x64"),
]
# (rows, features in, features out, where); with guidance, 4 views are a batch of 8
LINEAR_SHAPES = [
    *(
        (rows, ratio * channels, channels, f"{what}, {side}x{side}")
        for rows, channels, side in ((8192, 320, 32), (2048, 640, 16), (512, 1280, 8), (128, 1280, 4))
        for ratio, what in ((1, "projections of attention"), (4, "feed-forward"))
    ),
    (257, 1280, 1280, "CLIP ViT-H, projections of attention"),
    (257, 1280, 5120, "CLIP ViT-H, feed-forward"),
    (257, 5120, 1280, "CLIP ViT-H, feed-forward"),
]


def cases(device: str, dtype: torch.dtype, *, compiled: bool) -> Iterator[Case]:
    """Every case, in the order of the table; `compiled` adds the contestants that torch.compile makes."""
    kind = {"device": device, "dtype": dtype}
    on_gpu = device == "cuda"
    for *sizes, where in ATTENTION_SHAPES + GPU_ATTENTION_SHAPES * on_gpu:
        yield attention_case(*sizes, where, compiled=compiled, **kind)
    for *sizes, where in CROSS_VIEW_SHAPES:
        yield cross_view_case(*sizes, where, compiled=compiled, **kind)
    for *sizes, where in GPU_CROSS_VIEW_SHAPES * on_gpu:
        yield cross_view_case(*sizes, where, portraits=2, compiled=compiled, **kind)
    geglu_shapes = GEGLU_SHAPES + GPU_GEGLU_SHAPES * on_gpu
    for *sizes, where in geglu_shapes:
        yield geglu_case(*sizes, where, compiled=compiled, **kind)
    for *sizes, where in geglu_shapes:
        yield geglu_gate_case(*sizes, where, compiled=compiled, **kind)
    for *sizes, where in GROUP_NORM_SHAPES * on_gpu:
        yield group_norm_case(*sizes, where, compiled=compiled, **kind)
    if device == "cpu" and dtype == torch.float32:  # the only place where the kernel runs
        for *sizes, where in CONV_SHAPES:
            yield conv3x3_case(*sizes, where)
        for *sizes, where in LINEAR_SHAPES:
            yield linear_case(*sizes, where)


def compiled_form(name: str, run: Callable[..., Tensor]) -> Contestant:
    """One shape at a time: what torch.compile makes of known sizes is faster."""
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    return Contestant(f"{name} compiled", compiled, optional=True, compiled=True)


def heads_first(batch: int, length: int, heads: int, head_dim: int, **kind) -> Tensor:
    """[B,H,L,D] in the memory of [B,L,H*D]."""
    return torch.randn(batch, length, heads * head_dim, **kind).unflatten(-1, (heads, head_dim)).transpose(1, 2)


def contiguous(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def rows_last(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As the projection that follows wants it, [B,L,H,D]: a backend that gives [B,H,L,D] pays for the copy."""
    return lambda query, key, value: attention(query, key, value).transpose(1, 2).contiguous()


def attention_case(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, where: str, *, compiled: bool, device: str, **kind
) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        lengths = (queries, keys, keys)
        return tuple(heads_first(batch, length, heads, head_dim, device=device, **kind) for length in lengths)

    contestants = attention_on_gpu() if device == "cuda" else attention_on_cpu(compiled=compiled)
    return Case(
        op="flash_attention",
        shape=f"{batch},{heads},{queries}x{keys},{head_dim}",
        where=where,
        bound="compute",
        flops=4 * batch * heads * queries * keys * head_dim,
        inputs=inputs,
        contestants=contestants,
    )


def attention_on_cpu(*, compiled: bool) -> list[Contestant]:
    # SDPA compiled is SDPA again, behind a guard. torch.compile(flex_attention), the form that Inductor writes itself,
    # took 1.25 times as long as that on the CPU (4,5,1024x1024,64).
    return [
        Contestant("gafext", flash_attention),
        Contestant("sdpa", sdpa),
        Contestant("sdpa contiguous", sdpa, prepare=contiguous),
        *([compiled_form("sdpa", sdpa)] if compiled else []),
        pinned("sdpa math", sdpa, SDPBackend.MATH),
    ]


def attention_on_gpu() -> list[Contestant]:
    """Each of PyTorch's backends by itself, and what it chooses; from (B,L,H*D) to (B,L,H*D).

    "gafext kernel" is the kernel also where `flash_attention` hands over to PyTorch. "sdpa contiguous" gets and gives
    (B,H,L,D), the layout that SDPA is documented for, with no copy counted.
    """
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return [
        Contestant("gafext", rows_last(flash_attention)),
        Contestant("gafext kernel", rows_last(torch.ops.gafext.flash_attention), optional=True),
        Contestant("sdpa", rows_last(sdpa)),
        Contestant("sdpa contiguous", lambda *inputs: sdpa(*inputs).transpose(1, 2), prepare=contiguous),
        *(pinned(f"sdpa {name}", rows_last(sdpa), backend) for name, backend in backends.items()),
    ]


def pinned(name: str, run: Callable[..., Tensor], backend: SDPBackend) -> Contestant:
    return Contestant(name, run, context=partial(sdpa_kernel, backend), optional=True)


def cross_view_elementwise(query: Tensor, key: Tensor, value: Tensor, num_views: int) -> Tensor:
    """Products and sums over broadcast pairs of views: no copies, and the form that torch.compile fuses best."""
    query, key, value = (x.unflatten(0, (-1, num_views)) for x in (query, key, value))
    weights = ((query[:, :, None] * key[:, None]).sum(-1, keepdim=True) * query.shape[-1] ** -0.5).softmax(2)
    return (weights * value[:, None]).sum(2).flatten(0, 1)


def cross_view_case(
    views: int, positions: int, heads: int, where: str, *, portraits: int = 1, compiled: bool, **kind
) -> Case:
    forms = {"sdpa": sdpa_cross_view_attention, "elementwise": cross_view_elementwise}

    def of_views(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda query, key, value: form(query, key, value, views)

    contestants = [Contestant("gafext", of_views(cross_view_attention))]
    contestants += [Contestant(name, of_views(form)) for name, form in forms.items()]
    if compiled:
        contestants += [compiled_form(name, of_views(form)) for name, form in forms.items()]
    contestants.append(Contestant("matmul", of_views(reference_cross_view_attention)))
    return Case(
        op="cross_view_attention",
        shape=f"{portraits}x" * (portraits > 1) + f"V={views},({positions},{heads * 64})",
        where=where,
        bound="memory",
        flops=4 * portraits * views * views * heads * positions * 64,
        inputs=lambda: tuple(heads_first(portraits * views, positions, heads, 64, **kind) for _ in range(3)),
        contestants=contestants,
    )


def pack_by_mkl(x: Tensor, weight: Tensor, bias: Tensor) -> tuple:
    return x, torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x)), weight, bias


def linear_packed_by_mkl(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What Inductor makes of a linear layer whose weights are frozen."""
    return torch.ops.mkl._mkl_linear(x, packed, weight, bias, len(x))


def geglu_packed_by_mkl(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = linear_packed_by_mkl(x, packed, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu_case(rows: int, channels: int, where: str, *, compiled: bool, **kind) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(8 * channels, channels, **kind) * channels**-0.5
        return torch.randn(rows, channels, **kind), weight, torch.randn(8 * channels, **kind)

    contestants = [Contestant("gafext", geglu), Contestant("eager", reference_geglu)]
    if compiled:
        contestants.append(compiled_form("eager", reference_geglu))
    if kind["device"] == "cpu" and kind["dtype"] == torch.float32 and torch.backends.mkl.is_available():
        contestants.append(Contestant("eager packed by MKL", geglu_packed_by_mkl, prepare=pack_by_mkl))
    return Case(
        op="geglu",
        shape=f"{rows}x{channels}",
        where=where,
        bound="compute",
        flops=2 * rows * channels * 8 * channels,
        inputs=inputs,
        contestants=contestants,
    )


def geglu_gate_case(rows: int, channels: int, where: str, *, compiled: bool, **kind) -> Case:
    inner = 4 * channels
    contestants = [Contestant("gafext", geglu_gate), Contestant("eager", reference_geglu_gate)]
    if compiled:
        contestants.append(compiled_form("eager", reference_geglu_gate))
    return Case(
        op="geglu_gate",
        shape=f"{rows},{2 * inner}->{inner}",
        where=where,
        bound="memory",
        flops=rows * inner,
        inputs=lambda: (torch.randn(rows, 2 * inner, **kind),),
        contestants=contestants,
    )


def channels_last(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)


def group_norm_case(batch: int, channels: int, side: int, where: str, *, compiled: bool, **kind) -> Case:
    def of_32(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: form(x, 32, weight, bias)

    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(batch, channels, side, side, **kind)
        return *channels_last(x), torch.randn(channels, **kind), torch.randn(channels, **kind)

    contestants = [
        Contestant("gafext", of_32(group_norm_silu)),
        Contestant("eager channels-last", of_32(reference_group_norm_silu)),
        Contestant("eager contiguous", of_32(reference_group_norm_silu), prepare=contiguous),
    ]
    if compiled:
        contestants.append(compiled_form("eager", of_32(reference_group_norm_silu)))
    return Case(
        op="group_norm_silu",
        shape=f"{batch},{channels},{side}x{side}",
        where=where,
        bound="memory",
        flops=8 * batch * channels * side * side,
        inputs=inputs,
        contestants=contestants,
    )


def pack_by_onednn(x: Tensor, weight: Tensor, bias: Tensor) -> tuple:
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), [1, 1], [1, 1], [1, 1], 1, list(x.shape))
    return x, packed, bias


def conv_packed_by_onednn(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """What Inductor makes of a convolution whose weights are frozen."""
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "")


def conv3x3_case(batch: int, in_channels: int, out_channels: int, side: int, where: str) -> Case:
    """torch.compile is no contestant: it calls the same conv2d."""

    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(out_channels, in_channels, 3, 3) * (9 * in_channels) ** -0.5
        return *channels_last(torch.randn(batch, in_channels, side, side)), weight, torch.randn(out_channels)

    contestants = [
        Contestant("gafext", conv3x3),
        Contestant("conv2d channels-last", reference_conv3x3, prepare=channels_last),
        Contestant("conv2d contiguous", reference_conv3x3, prepare=contiguous),
    ]
    if torch.backends.mkldnn.is_available():
        contestants.append(Contestant("conv2d prepacked", conv_packed_by_onednn, prepare=pack_by_onednn))
    return Case(
        op="conv3x3",
        shape=f"{batch},{in_channels}->{out_channels},{side}x{side}",
        where=where,
        bound="compute",
        flops=2 * 9 * batch * in_channels * out_channels * side * side,  # Winograd's algorithm does a quarter of them
        inputs=inputs,
        contestants=contestants,
    )


def linear_case(rows: int, in_features: int, out_features: int, where: str) -> Case:
    """torch.compile is no contestant: it calls the same linear."""

    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        return torch.randn(rows, in_features), weight, torch.randn(out_features)

    contestants = [Contestant("gafext", linear), Contestant("eager", F.linear)]
    if torch.backends.mkl.is_available():
        contestants.append(Contestant("packed by MKL", linear_packed_by_mkl, prepare=pack_by_mkl))
    return Case(
        op="linear",
        shape=f"{rows},{in_features}->{out_features}",
        where=where,
        bound="compute",
        flops=2 * rows * in_features * out_features,
        inputs=inputs,
        contestants=contestants,
    )
