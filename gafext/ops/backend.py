"""Choice of the backend of a call: "kernel" (gafext's C++/CUDA), "sdpa" (PyTorch's operation) or "reference" (formula).

"auto" is the kernel unless it does not support the inputs or PyTorch is faster. The choice is an argument, never a
global: every module has its own `attention_backend`, and `set_attention_backend` sets all of a network's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

BACKENDS = ("auto", "kernel", "sdpa", "reference")

Reasons = Callable[[], list[str]]


def check_backend(backend: str) -> None:
    """Raise a ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: expected one of {list(BACKENDS)}, got {backend!r}")


def use_kernel(backend: str, op: str, unsupported: Reasons, slower: Reasons = list) -> bool:
    """Return whether a call runs the kernel.

    Args:
        backend: one of `BACKENDS`.
        op: name of the operation, for the error.
        unsupported: lists why the kernel does not support the inputs; called at most once.
        slower: lists why PyTorch's operation is faster; called at most once, and only with "auto".

    Raises:
        ValueError: `backend` is unknown, or is "kernel" and the kernel does not support the inputs (lists the reasons).
    """
    if backend == "auto":
        return not (unsupported() or slower())
    check_backend(backend)
    if backend != "kernel":
        return False
    reasons = unsupported()
    if reasons:
        raise ValueError(f"backend='kernel' cannot serve this {op}: " + "; ".join(reasons))
    return True


def prefer(backend: str) -> str:
    """Turn "kernel" into "auto", for operations whose kernels exist on some devices only."""
    return "auto" if backend == "kernel" else backend


def set_attention_backend(module: nn.Module, backend: str) -> None:
    """Set `attention_backend` on every submodule that has one.

    Args:
        module: any network of gafext.
        backend: "auto", "kernel", "sdpa" or "reference".

    Raises:
        ValueError: `backend` is unknown.
    """
    check_backend(backend)
    for submodule in module.modules():
        if hasattr(submodule, "attention_backend"):
            # In torch's stubs the attributes of a module are tensors or modules.
            submodule.attention_backend = backend  # pyright: ignore[reportArgumentType]
