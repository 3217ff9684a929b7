"""Single-file checkpoints of Stable Diffusion: selects one network and derives its configuration from shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from gafext.config import CLIPTextConfig, Config, UNetConfig, VAEConfig
from gafext.errors import CheckpointError
from gafext.weights.keys import KeyRule, ldm_unet_rule, ldm_vae_rule, open_clip_text_rule
from gafext.weights.store import WeightFile

Shapes = Mapping[str, "tuple[int, ...]"]

HEAD_WIDTH = 64
"""Width of a head in Stable Diffusion 2's U-Net and in every CLIP text encoder; not derivable from shapes."""


class _Part(NamedTuple):
    """One network of a single-file checkpoint."""

    prefixes: tuple[str, ...]
    config: Callable[[Shapes], Config]
    rule: Callable[[Any], KeyRule]


def take_part(file: WeightFile, config_class: type[Config], config: Config | None = None) -> Config:
    """Reduce a single-file checkpoint to one network, and rename its keys to those of our module.

    Args:
        file: the file, not renamed yet; it is modified in place.
        config_class: UNetConfig, VAEConfig or CLIPTextConfig, which selects the network.
        config: configuration of the network; None: derived from the shapes.

    Returns:
        The network's configuration.

    Raises:
        CheckpointError: the file does not hold that network in latent diffusion's layout.
    """
    if config_class not in _PARTS:
        raise CheckpointError(f"{file.path}: single-file checkpoints hold no network of a {config_class.__name__}")
    part = _PARTS[config_class]
    # Files with only one network have no prefix.
    prefix = next((prefix for prefix in part.prefixes if any(key.startswith(prefix) for key in file)), "")
    file.rename(lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    try:
        config = config or part.config(file.shapes)
    except LookupError as error:
        raise CheckpointError(
            f"{file.path}: expected latent diffusion's keys {part.prefixes[0]}*, but {error} is missing or misshapen"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    file.rename(part.rule(config))
    return config


def _count(shapes: Shapes, name: str, start: int = 0) -> int:
    """Count the consecutive names name.format(start), name.format(start + 1), ... in `shapes`."""
    return sum(1 for _ in takewhile(lambda index: name.format(index) in shapes, itertools.count(start)))


def _one_or_all(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def unet_config(shapes: Shapes) -> UNetConfig:
    """Derive a U-Net's configuration from shapes; heads are 64 wide, or 8 per stage (Stable Diffusion 1).

    Source: github.com/CompVis/latent-diffusion: ldm/modules/diffusionmodules/openaimodel.py.
    """
    stages: list[list[tuple[int, int]]] = [[]]  # (channels, transformer depth) of each residual block
    for index in itertools.count(1):
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            stages.append([])
        elif f"{block}.0.in_layers.2.weight" in shapes:
            depth = _count(shapes, f"{block}.1.transformer_blocks.{{}}.norm1.weight")
            stages[-1].append((shapes[f"{block}.0.in_layers.2.weight"][0], depth))
        else:
            break
    channels = tuple(blocks[0][0] for blocks in stages)
    attends = [blocks[0][1] > 0 for blocks in stages]
    depths = [max(blocks[0][1], 1) for blocks in stages]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        block_out_channels=channels,
        layers_per_block=_one_or_all([len(blocks) for blocks in stages]),
        transformer_layers_per_block=_one_or_all(depths),
        attention_head_dim=tuple(max(width // HEAD_WIDTH, 1) for width in channels) if linear else 8,
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        use_linear_projection=linear,
    )


def vae_config(shapes: Shapes) -> VAEConfig:
    """Derive an autoencoder's configuration from shapes, with Stable Diffusion's scaling factor."""
    stages = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(max(stages, 1))),
        layers_per_block=_count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


def text_config(shapes: Shapes) -> CLIPTextConfig:
    """Derive the configuration of OpenCLIP's text encoder without its last layer, as used by Stable Diffusion 2."""
    width = shapes["ln_final.weight"][0]
    return CLIPTextConfig(
        vocab_size=shapes["token_embedding.weight"][0],
        hidden_size=width,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=_count(shapes, "transformer.resblocks.{}.ln_1.weight") - 1,
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        max_position_embeddings=shapes["positional_embedding"][0],
        hidden_act="gelu",
    )


_PARTS: dict[type[Config], _Part] = {
    UNetConfig: _Part(("model.diffusion_model.",), unet_config, ldm_unet_rule),
    VAEConfig: _Part(("first_stage_model.", "vae."), vae_config, ldm_vae_rule),
    CLIPTextConfig: _Part(("cond_stage_model.model.",), text_config, open_clip_text_rule),
}
