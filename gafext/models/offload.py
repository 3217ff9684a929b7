"""Networks whose weights rest in main memory, and are on the accelerator while they are used."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gafext.models.base import PretrainedModel


class Offload:
    """Keep the weights of at most one part of some networks on an accelerator, until `remove`.

    A part is a whole network, or with `sequential` one of its blocks. Its weights are copied to the device when a
    method of it is called, and those of the part before are dropped there: the copy in main memory is never written to.

    Args:
        networks: networks, on any device; their weights are moved to main memory.
        device: device to compute on. On the CPU the weights are copied too, which saves nothing.
        sequential: move blocks instead of networks: the least memory, at the cost of copying all weights at every call.
    """

    def __init__(self, networks: Sequence[PretrainedModel], device: torch.device, *, sequential: bool = False):
        self.device, self.sequential = device, sequential
        self._networks = networks
        self._loaded: nn.Module | None = None
        self._resting: list[tuple[Tensor, Tensor]] = []
        self._guarded: list[tuple[nn.Module, str, object]] = []
        for network in networks:
            network.to("cpu")
            network.compute_on(device)
            for part in _parts(network) if sequential and not _owns(network) else [network]:
                for module in part.modules():
                    for name in _methods(module):
                        self._guard(part, module, name)

    def release(self) -> None:
        """Drop the weights that are on the device."""
        for tensor, data in self._resting:
            tensor.data = data
        self._loaded, self._resting = None, []

    def remove(self) -> None:
        """Give the networks back as they were, with their weights in main memory."""
        self.release()
        for module, name, before in reversed(self._guarded):
            vars(module).pop(name)
            if before is not None:
                setattr(module, name, before)
        for network in self._networks:
            network.compute_on(None)

    def _guard(self, part: nn.Module, module: nn.Module, name: str) -> None:
        """Replace a method by one that loads the part first."""
        before, method = vars(module).get(name), getattr(type(module), name)

        @functools.wraps(method)
        def guarded(own: nn.Module, *args, **kwargs):
            self._load(part)
            return method(own, *args, **kwargs) if before is None else before(*args, **kwargs)

        self._guarded.append((module, name, before))
        setattr(module, name, types.MethodType(guarded, module))  # bound, so that a copy of the module has its own

    def _load(self, part: nn.Module) -> None:
        if part is self._loaded:
            return
        self.release()
        self._resting = [(tensor, tensor.data) for tensor in (*part.parameters(), *part.buffers())]
        for tensor, data in self._resting:
            tensor.data = data.to(self.device, copy=True)
        self._loaded = part


def _methods(module: nn.Module) -> set[str]:
    """Return the names of a module's public methods that may read weights."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return set()
    own = [
        kind for kind in type(module).__mro__ if kind.__module__.startswith("gafext.") and kind is not PretrainedModel
    ]
    named = {name for kind in own for name, value in vars(kind).items() if inspect.isfunction(value)}
    return {name for name in named if not name.startswith("_")} | {"forward"}


def _owns(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the smallest modules below a network that can be moved one at a time.

    A linear layer is read by the code of the module that has it, and may be by that of the module above: these stay
    together.
    """
    for child in network.children():
        read = [part for module in (child, *child.children()) for part in module.children()]
        if _owns(child) or (not isinstance(child, nn.ModuleList) and any(isinstance(part, nn.Linear) for part in read)):
            yield child
        else:
            yield from _parts(child)
