"""Which backend serves a call: "kernel" (gafext's C++/CUDA), "sdpa" (PyTorch's op) or "reference" (the formula).

"auto" takes the kernel unless it cannot serve the inputs or PyTorch is faster at them. The choice is an argument, never
a global: every module keeps its own `attention_backend`, and `set_attention_backend` sets those of a whole tree.
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


def no_reasons() -> list[str]:
    return []


def use_kernel(backend: str, op: str, unsupported: Reasons, slower: Reasons = no_reasons) -> bool:
    """Decide whether the kernel serves a call; each of the two functions is called once at most.

    Args:
        backend: one of `BACKENDS`.
        op: name of the operation, for the error.
        unsupported: returns why the kernel cannot serve the inputs.
        slower: returns why PyTorch's op is the faster one; asked with "auto" alone.

    Raises:
        ValueError: no such backend, or "kernel" was asked for and cannot serve the inputs; the reasons are listed.
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
    """The backend for ops with kernels on some devices only: "kernel" is a preference there, not a demand."""
    return "auto" if backend == "kernel" else backend


def set_attention_backend(module: nn.Module, backend: str) -> None:
    """Set `attention_backend` on every submodule that has one.

    Args:
        module: any network of gafext.
        backend: "auto", "kernel", "sdpa" or "reference".

    Raises:
        ValueError: no such backend.
    """
    check_backend(backend)
    for submodule in module.modules():
        if hasattr(submodule, "attention_backend"):
            submodule.attention_backend = backend
