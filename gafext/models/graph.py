"""CUDA graphs of functions of tensors: what a call launches is recorded once and launched as a whole afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_on_gpu(tensor: Tensor) -> bool:
    """Return whether a graph can record operations on the tensor."""
    return tensor.is_cuda


class GraphedCall:
    """Call a function of CUDA tensors; the second call with the same shapes records a graph, and later ones replay it.

    The first call runs the function as it is, so that libraries choose their algorithms outside of the recording. The
    function may read other tensors, whose memory must stay the same; it may not wait for the device. Outside of CUDA
    every call runs the function. Not run on a GPU yet; the tests replay recordings on the CPU.

    Args:
        function: maps tensors to one tensor.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self._function = function
        self._seen: object = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Compute the function; the result is a new tensor.

        Args:
            tensors: inputs; other shapes, dtypes or devices than before record a new graph.
        """
        if not all(map(is_on_gpu, tensors)):
            return self._function(*tensors)
        kind = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        if kind != self._seen:
            self._seen, self._graph = kind, None
            return self._function(*tensors)
        if self._graph is None:
            self._record(tensors)
        else:
            for mine, given in zip(self._inputs, tensors, strict=True):
                mine.copy_(given)
        assert self._graph is not None and self._output is not None
        with torch.cuda.device_of(self._output):
            self._graph.replay()
        return self._output.clone()

    def _record(self, tensors: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in tensors)
        graph, first = torch.cuda.CUDAGraph(), self._inputs[0]
        # By default PyTorch records on a stream of the device that was current at its first recording.
        options: dict[str, Any] = {"stream": torch.cuda.Stream(first.device)} if first.is_cuda else {}
        with torch.cuda.device_of(first), torch.cuda.graph(graph, **options):
            self._output = self._function(*self._inputs)
        self._graph = graph
