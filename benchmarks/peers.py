"""Contestants of `full_size.py --peers`: a stock U-Net of SD 2.1 in gafext, diffusers, torch.compile and OpenVINO.

All have the same random weights and inputs, 2 threads or as many as torch has, and results of [batch,4,size,size].
torch.compile freezes the weights. OpenVINO gets static shapes; its 8 bits are NNCF's post-training quantization of
weights and activations with the settings for transformers, and what they leave has the precision that OpenVINO prefers:
bfloat16 where the processor multiplies it, as gafext's "int8-bfloat16" has.
"""

import copy
import functools
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from race import Contestant, diffusers_sd21, race, random_network
from torch import Tensor, nn

from gafext.bench.environment import environment, watch_others
from gafext.config import SD21_UNET
from gafext.models import int8
from gafext.models.unet import MultiViewUNet

PEERS = {"openvino": ("openvino", "nncf"), "diffusers": ("diffusers",), "compile": ("diffusers",)}
"""Packages that each needs."""
PRECISIONS = ("float32", "bfloat16", "int8", "int8-bfloat16")
_PEERS_WITH = {"int8": ("openvino",), "int8-bfloat16": ()}
"""Which peers have it, where not all have."""
_CALIBRATION_TIMESTEPS = (981.0, 721.0, 461.0, 201.0)  # one batch of noise at each


def missing_packages(peers: list[str]) -> list[str]:
    """List the packages that the peers need and that are not installed."""
    needed = dict.fromkeys(package for peer in ("compile", *peers) for package in PEERS[peer])
    return [package for package in needed if importlib.util.find_spec(package) is None]


class Inputs(NamedTuple):
    """Arguments of a pass."""

    latents: Tensor
    timestep: Tensor
    text: Tensor

    @classmethod
    def random(cls, batch: int, size: int, *, seed: int, timestep: float) -> "Inputs":
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(batch, 4, size, size, generator=generator)
        return cls(latents, torch.tensor(timestep), torch.randn(batch, 77, 1024, generator=generator))

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(self.latents.to(dtype), self.timestep, self.text.to(dtype))

    def arrays(self) -> list:
        return [tensor.numpy() for tensor in self]


class Positional(nn.Module):
    """diffusers' U-Net with positional arguments and a tensor as its result."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents, timestep, text, return_dict=False)[0]


class Field:
    """Builds the contestants; those of one dtype share the weights.

    Args:
        batch: rows of the latents.
        size: height and width of the latents.
    """

    def __init__(self, batch: int, size: int):
        self.inputs = Inputs.random(batch, size, seed=0, timestep=500.0)
        self.calibration = [
            Inputs.random(batch, size, seed=1 + seed, timestep=timestep).arrays()
            for seed, timestep in enumerate(_CALIBRATION_TIMESTEPS)
        ]
        stock = Positional(random_network(diffusers_sd21, None, torch.device("cpu"), torch.float32))
        self._stock = {torch.float32: stock}

    def stock(self, precision: str) -> tuple[Positional, Inputs]:
        dtype = getattr(torch, precision)
        if dtype not in self._stock:
            self._stock[dtype] = copy.deepcopy(self._stock[torch.float32]).to(dtype)
        return self._stock[dtype], self.inputs.to(dtype)

    def gafext(self, precision: str) -> Callable[[], Tensor]:
        if precision.startswith("int8"):
            int8.require_supported(torch.device("cpu"))
        floats = {"int8": "float32", "int8-bfloat16": "bfloat16"}.get(precision, precision)
        stock, inputs = self.stock(floats)
        with torch.device("meta"):
            network = MultiViewUNet(SD21_UNET).eval()
        network.load_state_dict(stock.unet.state_dict(), assign=True)
        if precision != floats:
            int8.quantize(network)
        return lambda: network(*inputs)

    def diffusers(self, precision: str) -> Callable[[], Tensor]:
        network, inputs = self.stock(precision)
        return lambda: network(*inputs)

    def compile(self, precision: str) -> Callable[[], Tensor]:
        network, inputs = self.stock(precision)
        compiled = torch.compile(network, dynamic=False, options={"freezing": True})
        return lambda: compiled(*inputs)

    def openvino(self, precision: str) -> Callable[[], Tensor]:
        from openvino import Core

        core = Core()
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        if precision != "int8":
            settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[precision]
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bfloat16" and "BF16" not in capabilities:
            raise ValueError(f"OpenVINO has no bfloat16 on this processor, only {', '.join(capabilities)}")
        model = self.quantized_model() if precision == "int8" else self.openvino_model
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        arrays = self.inputs.arrays()
        return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True)[0])

    @functools.cached_property
    def openvino_model(self) -> Any:
        from openvino import convert_model

        network, inputs = self.stock("float32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return convert_model(network, example_input=tuple(inputs), input=[list(x.shape) for x in inputs])

    def quantized_model(self) -> Any:
        import nncf

        nncf.set_log_level(logging.ERROR)
        data = nncf.Dataset(self.calibration)
        size = {"subset_size": len(self.calibration)}
        return nncf.quantize(self.openvino_model, data, model_type=nncf.ModelType.TRANSFORMER, **size)


def makers(field: Field, peers: list[str], precisions: list[str]) -> dict[str, Callable[[], Contestant]]:
    """Return by name what builds each contestant, gafext in float32 first, each in the precisions that it has."""

    def maker(name: str, peer: str, precision: str) -> Callable[[], Contestant]:
        return lambda: Contestant(name, getattr(field, peer)(precision)).warmed_up()

    pairs = [("gafext", "float32")] + [
        (peer, precision)
        for precision in precisions
        for peer in ("gafext", *peers)
        if peer == "gafext" or peer in _PEERS_WITH.get(precision, (peer,))
    ]
    names = {f"{peer} {precision}": (peer, precision) for peer, precision in pairs}
    return {name: maker(name, *pair) for name, pair in names.items()}


@torch.no_grad()
def race_peers(peers: list[str], precisions: list[str], *, batch: int, size: int, rounds: int) -> dict:
    """Race gafext and its peers on a pass of [batch,4,size,size] latents with 77 text tokens.

    Returns:
        The machine, the load during the race, and under "unet" the result of `race.race`.
    """
    load, share_of_others = os.getloadavg(), watch_others()
    found = race(makers(Field(batch, size), peers, precisions), rounds, torch.device("cpu"))
    packages = dict.fromkeys(package for peer in peers for package in PEERS[peer])
    return {
        "environment": environment("cpu"),
        "peers": {package: importlib.metadata.version(package) for package in packages},
        "load": [load, os.getloadavg()],
        "others_busy": share_of_others(),
        "unet": found,
    }
