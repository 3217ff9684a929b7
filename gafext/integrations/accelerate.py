"""Exchange of the layers of a diffusers pipeline, or of a network of diffusers or transformers, for gafext's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from gafext.integrations import layers
from gafext.models.base import PretrainedModel
from gafext.ops.memory import keep_freed_memory

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: layers.Linear,
    nn.Conv2d: layers.Conv2d,
    nn.GroupNorm: layers.GroupNorm,
}


class Acceleration(NamedTuple):
    """Result of `accelerate`."""

    swapped: dict[str, int]
    """Number of layers that gafext computes from now on, by the name of their class."""
    left_alone: dict[str, str]
    """Layers of these classes, and networks, that stay as they are: path, and why."""


def accelerate(pipe: Any) -> Acceleration:
    """Let gafext's operations compute the layers of a diffusers pipeline or of a network, in place.

    Attention, GEGLU, residual blocks, 3×3 convolutions, linear layers and group normalisations are exchanged in all
    networks of a pipeline: U-Net, autoencoder, ControlNet, and CLIP of transformers. Parameters, keys, configuration,
    hooks and attention processors stay the same objects; results change by rounding only, and on a CPU features of 16
    channels and more become channels-last, which `view` of their shape may refuse. What gafext does not
    compute (masks, a custom processor) is left to diffusers in each call. LoRA, IP-Adapters and processors may come
    before or after; a second call takes in layers that are new. For the CPU, malloc keeps freed memory from now on
    (see `gafext.ops.memory`).

    Channels-last weights of 3×3 convolutions on the CPU that are not in training are stored in PyTorch's default
    order, until `restore`; the kernel copies others in each call. Networks to be trained are therefore best given in
    training: fused optimizers want their states in the layout of the weights.

    Args:
        pipe: a diffusers pipeline, or a torch.nn.Module such as UNet2DConditionModel, AutoencoderKL or CLIPTextModel.

    Returns:
        The number of layers exchanged, and what was left alone: layers whose processor or forward is a custom one,
        networks with another attention implementation than "sdpa", and gafext's own.

    Raises:
        TypeError: `pipe` is neither.
    """
    swapped: Counter[str] = Counter()
    left_alone = {}
    swaps = _swaps()
    own: set[nn.Module] = set()  # gafext's networks and all in them; they know their layers by the class
    for path, module in _modules(pipe):
        kind = type(module)
        if module in own:
            continue
        if isinstance(module, PretrainedModel):
            own.update(module.modules())
            reason, exchanged = "it is gafext's own", False
        elif _is_transformer(module):
            reason = _transformers().reason_to_leave(module)
            exchanged = not reason and _transformers().set_attention(module, gafext=True)
        elif _is_candidate(module, swaps):
            reason = _reason_to_leave(module)
            exchanged = not reason and kind in swaps
            if exchanged:
                _change_class(module, swaps[kind])
                if isinstance(module, layers.Conv2d):
                    layers.lay_out(module)
        else:
            continue
        if reason:
            left_alone[path] = reason
        swapped[kind.__name__] += exchanged
    keep_freed_memory()
    layers.register_names()
    return Acceleration(dict(+swapped), left_alone)


def restore(pipe: Any) -> None:
    """Undo `accelerate`: every layer has the class, forward, processor and memory format that it had before.

    Args:
        pipe: what was given to `accelerate`; nothing happens to layers that were not exchanged.

    Raises:
        TypeError: `pipe` is neither a pipeline nor a module.
    """
    originals = {new: old for old, new in _swaps().items()}
    for _, module in _modules(pipe):
        if _is_transformer(module):
            _transformers().set_attention(module, gafext=False)
        elif type(module) in originals:
            _change_class(module, originals[type(module)])
            layers.give_layout_back(module)


def _modules(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Yield every module of a pipeline or a network, with its path."""
    networks = {"": pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", None)
    if not isinstance(networks, dict):
        raise TypeError(f"pipe: expected a diffusers pipeline or a torch.nn.Module, got {type(pipe).__name__}")
    for name, network in networks.items():
        if isinstance(network, nn.Module):
            for path, module in network.named_modules():
                yield f"{name}.{path}".strip("."), module


def _swaps() -> dict[type[nn.Module], type[nn.Module]]:
    """Map classes of layers to gafext's; a network has diffusers' only if diffusers is imported."""
    if "diffusers" not in sys.modules:
        return SWAPS
    from gafext.integrations import diffusers

    return SWAPS | diffusers.SWAPS


def _transformers():
    from gafext.integrations import transformers

    return transformers


def _is_transformer(module: Any) -> bool:
    return "transformers" in sys.modules and isinstance(module, _transformers().PreTrainedModel)


def _is_candidate(module: nn.Module, swaps: dict[type[nn.Module], type[nn.Module]]) -> bool:
    """Return whether gafext computes layers of this class and these settings."""
    if not (type(module) in swaps or type(module) in swaps.values()):
        return False
    # The parameters of quantized layers are of other classes, with products of their own.
    plain = all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
    return plain and (not isinstance(module, nn.Conv2d) or layers.is_conv3x3(module))


def _reason_to_leave(module: nn.Module) -> str:
    """Say what of a layer is a custom one; empty if nothing is."""
    # The hooks of Hugging Face's accelerate keep a layer's own forward under this name.
    forward = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return "its forward is a custom one"
    processor = getattr(module, "processor", None)  # only diffusers' attention has one
    if processor is not None:
        from gafext.integrations.diffusers import KNOWN_PROCESSORS

        if type(processor) not in KNOWN_PROCESSORS:
            return f"its processor is {type(processor).__name__}"
    return ""


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Make a layer one of another class, also where hooks keep its bound forward."""
    old = type(module)
    keepers = [module.__dict__]
    # Those of diffusers, layerwise casting and group offloading among them, keep it in a chain.
    keepers += [vars(reference) for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ())]
    for keeper in keepers:
        for name in ("forward", "_old_forward", "original_forward"):
            if getattr(keeper.get(name), "__func__", None) is old.forward:
                keeper[name] = MethodType(new.forward, module)
    module.__class__ = new
