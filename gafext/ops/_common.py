"""Helpers shared by the operations: checks (error messages as in csrc/checks.h), reasons to fall back, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gafext import _C
from gafext.versions import has_code_for, oldest_architecture

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256  # kMaxHeadDim of csrc/types.h

_BUILD = _C.build_info()
INSTRUCTION_SET = _BUILD["instruction_set"]  # of the CPU kernels
MULTIPLIES_BFLOAT16 = _BUILD["multiplies_bfloat16"]  # the CPU multiplies it faster than float32, and may
MULTIPLIES_FLOAT16 = _BUILD["multiplies_float16"]  # AVX512_FP16, or it is no x86
BFLOAT16_PAIRS = _BUILD["bfloat16_pairs"]  # the kernels multiply them with AVX512_BF16
ZEN = _BUILD["zen"] if torch.backends.mkl.is_available() else 0  # AMD's generation with AVX-512, which MKL lacks there
INT8_PRODUCTS = _BUILD["int8_products"]
_ARCHITECTURES = _BUILD["cuda_architectures"]


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def require(condition: bool, op: str, message: Callable[[], str]) -> None:
    if not condition:
        raise ValueError(f"{op}: {message()}")


def check_heads_shape(op: str, name: str, tensor: Tensor) -> None:
    require(
        tensor.dim() == 4,
        op,
        lambda: f"{name} must have shape (batch, heads, length, head_dim), got {tuple(tensor.shape)}",
    )


def check_equal_shape(op: str, first_name: str, first: Tensor, name: str, other: Tensor) -> None:
    require(
        other.shape == first.shape,
        op,
        lambda: f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(other.shape)}",
    )


def check_same_kind(op: str, first_name: str, first: Tensor, name: str, other: Tensor) -> None:
    require(
        other.dtype == first.dtype,
        op,
        lambda: f"{name} must have the dtype of {first_name}, {dtype_name(first)}, got {dtype_name(other)}",
    )
    require(other.device == first.device, op, lambda: f"{name} must be on the device of {first_name}")


def check_weight_and_bias(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    shape = tuple(weight.shape)
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            op,
            lambda: f"bias must have shape ({shape[0]},) to go with weight {shape}, got {tuple(bias.shape)}",
        )
    check_same_kind(op, "x", x, "weight", weight)
    if bias is not None:
        check_same_kind(op, "x", x, "bias", bias)


def check_per_channel(op: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    channels, shape = weight.shape[0], tuple(weight.shape)
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None:
            got = tuple(vector.shape)
            require(
                got == (channels,),
                op,
                lambda name=name, got=got: f"{name} must have shape ({channels},) to go with weight {shape}, got {got}",
            )
            require(vector.device == x.device, op, lambda name=name: f"{name} must be on the device of x")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    require(
        scale.dtype == wanted,
        op,
        lambda: f"scale must have dtype {str(wanted).removeprefix('torch.')}, got {dtype_name(scale)}",
    )
    if bias is not None:
        check_same_kind(op, "x", x, "bias", bias)


def dtype_reasons(tensor: Tensor) -> list[str]:
    if tensor.dtype in KERNEL_DTYPES:
        return []
    return [f"dtype must be float32, float16 or bfloat16, got {dtype_name(tensor)}"]


def computes_in(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a CPU tensor is computed in: its own, or autocast's."""
    is_cast = tensor.dtype in KERNEL_DTYPES and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if is_cast else tensor.dtype


def is_slow_half(tensor: Tensor) -> bool:
    """Return whether PyTorch multiplies matrices of the tensor's dtype, or autocast's, many times slower than float32.

    So it is in half precision on a CPU without instructions for it: measured 5 to 15 times with AVX2.
    """
    if not tensor.is_cpu:
        return False
    dtype = computes_in(tensor)
    return (dtype == torch.bfloat16 and not MULTIPLIES_BFLOAT16) or (dtype == torch.float16 and not MULTIPLIES_FLOAT16)


def are_plain_heads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the checks and reasons in this module pass without autocast, apart from key's shape and query's.

    False only means that the individual checks have to run.
    """
    # One expression takes 2 us, the individual checks take 8, and a small attention takes 10.
    dtype = query.dtype
    return (
        not torch.compiler.is_compiling()  # this expression would add guards
        and (query.is_cpu and key.is_cpu and value.is_cpu)
        and not torch.is_autocast_enabled("cpu")
        and (dtype in KERNEL_DTYPES and key.dtype == dtype and value.dtype == dtype)
        and (query.dim() == 4 and key.dim() == 4 and key.shape == value.shape)
        and (query.stride(3) == 1 and key.stride(3) == 1 and value.stride(3) == 1)
        and 1 <= query.shape[3] <= MAX_HEAD_DIM
        and not is_transformed()
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    )


def head_reasons(query: Tensor, key: Tensor, value: Tensor, max_head_dim: int = MAX_HEAD_DIM) -> list[str]:
    """List why the attention kernels of every device do not support these tensors."""
    head_dim = query.shape[3]
    reasons = dtype_reasons(query)
    if not 1 <= head_dim <= max_head_dim:
        reasons.append(f"head_dim must be in 1..{max_head_dim}, got {int(head_dim)}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if head_dim != 1 and tensor.stride(3) != 1:
            reasons.append(f"the last stride of {name} must be 1, got {int(tensor.stride(3))}")
    return reasons


def _cuda_reason(index: int | None) -> str:
    if not _BUILD["cuda"]:
        return "gafext was built without its CUDA kernels"
    if torch.cuda.is_available():  # fake CUDA tensors exist without a GPU
        gpu = torch.cuda.get_device_properties(index)
        number, oldest = 10 * gpu.major + gpu.minor, oldest_architecture(_ARCHITECTURES)
        if number < oldest:
            return f"the CUDA kernels need compute capability {oldest / 10}, this GPU has {gpu.major}.{gpu.minor}"
        if not has_code_for(_ARCHITECTURES, number):
            built = ", ".join(_ARCHITECTURES)
            return f"the CUDA kernels are built for {built}, none of which runs on compute capability {number / 10}"
    return ""


# Undocumented: without it, a transform of torch.func fails in the kernels or loses their tangents.
_has_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_functorch = getattr(torch._C, "_functorch", None)
_is_batched = getattr(_functorch, "is_legacy_batchedtensor", lambda tensor: False)  # by is_grads_batched=True


def is_transformed() -> bool:
    """Return whether torch.func (vmap, grad, jvp) or forward-mode differentiation follows calls."""
    return not torch.compiler.is_compiling() and (_has_transforms() or forward_ad._current_level >= 0)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd follows a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def place_reasons(*tensors: Tensor | None, fast_backward: bool = False, cuda_backward: bool = False) -> list[str]:
    """List why the kernels do not support the tensors' device or their need of a gradient.

    Args:
        tensors: of one device and dtype.
        fast_backward: the backward pass was measured to be faster than PyTorch's, in float32 on a CPU.
        cuda_backward: it has a kernel for CUDA, which moves fewer bytes than PyTorch's; not measured yet.
    """
    first = next(t for t in tensors if t is not None)
    device = first.device
    reasons = []
    if device.type == "cuda":
        reason = _cuda_reason(device.index)
        reasons += [reason] if reason else []
    elif device.type not in ("cpu", "mps", "meta"):
        reasons.append(f"there is no kernel for {device.type} tensors")
    if is_transformed():
        reasons.append("torch.func or forward-mode differentiation follows the call, which the kernel cannot")
    is_fast = fast_backward and device.type == "cpu" and first.dtype == torch.float32
    is_fast |= cuda_backward and device.type == "cuda"
    if not is_fast and needs_gradient(*tensors):
        reasons.append("inputs need a gradient, and PyTorch's operation has the faster backward pass")
    return reasons


def require_supported(op: str, reasons: list[str]) -> None:
    """Raise the first reason as a ValueError; the fake kernels fail like the real ones."""
    require(not reasons, op, lambda: reasons[0])


# Undocumented: torch.library's autograd kernel enters this context when no input needs a gradient. Entering it here
# bypasses that kernel, whose Python code takes 5 of the 13 us of a call.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def call_without_gradient(op: Callable[..., Tensor], *args, **options) -> Tensor:
    """Make a call that autograd does not follow, bypassing the operation's autograd kernel."""
    with _below_autograd():
        return op(*args, **options)


def call_kernel(op: Callable[..., Tensor], *args, **options) -> Tensor:
    """Call an operation, bypassing its autograd kernel under torch.no_grad: 2 of 19 ms of a pass of a small U-Net."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args, **options)
    return call_without_gradient(op, *args, **options)


def has_backward_kernel(grad: Tensor, *, cuda: bool = False) -> bool:
    """Return whether a backward pass runs its kernel, unless autograd follows it (create_graph=True).

    Args:
        grad: gradient of the result.
        cuda: there is a kernel for CUDA too, beside that for CPUs.
    """
    placed = grad.is_cpu or (cuda and grad.is_cuda and not _cuda_reason(grad.device.index))
    return placed and not torch.is_grad_enabled() and not is_transformed() and not _is_batched(grad)


def register_autograd(op: str, backward: Callable, *, setup_context: Callable) -> None:
    """Register the gradients of an operation, which autocast leaves in their dtype as it leaves the operation.

    A backward pass in a region of autocast is not what PyTorch advises, and happens.
    """

    def outside_autocast(ctx, *grads):
        grad = next(grad for grad in grads if grad is not None)
        if not is_autocast(grad):
            return backward(ctx, *grads)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, *grads)

    torch.library.register_autograd(f"gafext::{op}", outside_autocast, setup_context=setup_context)


def refuse_second_order(op: str) -> None:
    """Make differentiating an operation an error, which itself computes gradients."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{op}: has no gradient; torch.autograd.grad(..., create_graph=True) does without it")

    torch.library.register_autograd(f"gafext::{op}", refuse)


def is_autocast(tensor: Tensor) -> bool:
    """Tell whether torch.autocast is on for the tensor's device."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast tensors, of which any but the first may be None, to the dtype of an active torch.autocast.

    PyTorch's linear and attention do the same.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # is_autocast, without the 0.2 us of a call
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in KERNEL_DTYPES else t for t in tensors)


def heads_like(out: Tensor) -> Tensor:
    """Copy `out` [B,H,L,D] to the memory layout [B,L,H,D], in which the kernels return it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def save_x_and_weight(ctx, inputs, output):
    """Save x and weight for the backward pass of an operation with an optional bias."""
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def gradients_needed(ctx) -> list[bool]:
    """List whether x, weight and bias need a gradient; an omitted bias has no entry in needs_input_grad."""
    return [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
