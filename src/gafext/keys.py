"""Foreign names of the U-Net's tensors: latent diffusion's (ImageDream, MVDream, SD in one file) and IP-Adapter's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gafext.config import UNetConfig
from gafext.weights import KeyRule

_LDM_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LDM_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "camera_embed.0": "class_embedding.linear_1",
    "camera_embed.2": "class_embedding.linear_2",
    "image_embed": "image_projection",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def ldm_unet_rule(config: UNetConfig) -> KeyRule:
    """Names of latent diffusion's U-Net, without a prefix, to ours; what it does not know keeps its name.

    Latent diffusion numbers its blocks through all stages, so that a block's place depends on the configuration.
    Transformers have the same names inside.

    Source: github.com/CompVis/latent-diffusion: ldm/modules/diffusionmodules/openaimodel.py.
    """
    names = {**_LDM_OUTSIDE, **_ldm_down(config), **_ldm_up(config)}
    names.update(_ldm_resnet("middle_block.0", "mid_block.resnets.0"))
    names["middle_block.1"] = "mid_block.attentions.0"
    names.update(_ldm_resnet("middle_block.2", "mid_block.resnets.1"))

    def rule(key: str) -> str:
        parts = key.split(".")
        for length in range(len(parts) - 1, 0, -1):
            ours = names.get(".".join(parts[:length]))
            if ours is not None:
                return ".".join([ours, *parts[length:]])
        return key

    return rule


def _ldm_resnet(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}.{our_name}" for name, our_name in _LDM_RESNET.items()}


def _ldm_down(config: UNetConfig) -> dict[str, str]:
    names, index = {}, 1  # block 0 is conv_in
    layers = config.per_stage(config.layers_per_block)
    for stage, block_type in enumerate(config.down_block_types):
        for layer in range(layers[stage]):
            names.update(_ldm_resnet(f"input_blocks.{index}.0", f"down_blocks.{stage}.resnets.{layer}"))
            if block_type.startswith("CrossAttn"):
                names[f"input_blocks.{index}.1"] = f"down_blocks.{stage}.attentions.{layer}"
            index += 1
        if stage < len(layers) - 1:
            names[f"input_blocks.{index}.0.op"] = f"down_blocks.{stage}.downsamplers.0.conv"
            index += 1
    return names


def _ldm_up(config: UNetConfig) -> dict[str, str]:
    names, index = {}, 0
    layers = config.per_stage(config.layers_per_block)[::-1]
    for stage, block_type in enumerate(config.up_block_types):
        for layer in range(layers[stage] + 1):
            names.update(_ldm_resnet(f"output_blocks.{index}.0", f"up_blocks.{stage}.resnets.{layer}"))
            place = 1  # the upsampler comes behind the attention, or in its place
            if block_type.startswith("CrossAttn"):
                names[f"output_blocks.{index}.1"] = f"up_blocks.{stage}.attentions.{layer}"
                place = 2
            if layer == layers[stage] and stage < len(layers) - 1:
                names[f"output_blocks.{index}.{place}.conv"] = f"up_blocks.{stage}.upsamplers.0.conv"
            index += 1
    return names


def ip_adapter_rule(block_names: Iterable[str]) -> KeyRule:
    """Names of an IP-Adapter file to ours; what it does not know keeps its name.

    Args:
        block_names: the U-Net's transformer blocks. The file numbers attentions in diffusers' order: the blocks on the
            way down, then up, then the middle; each attn1 takes an even number (and has nothing), attn2 the odd one.

    Source: github.com/tencent-ailab/IP-Adapter: its ModuleList over diffusers' `unet.attn_processors`.
    """
    ordered = sorted(block_names, key=lambda name: name.startswith("mid_block"))  # stable: down, up, middle
    names = {
        f"ip_adapter.{2 * index + 1}.{which}.weight": f"{block}.attn2.{which}.weight"
        for index, block in enumerate(ordered)
        for which in ("to_k_ip", "to_v_ip")
    }

    def rule(key: str) -> str:
        if key.startswith("image_proj."):
            return "image_projection." + key.removeprefix("image_proj.")
        return names.get(key, key)

    return rule


def image_projection_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of `UNetConfig` that the shapes of `image_projection.*` tell; {} when they tell none."""

    def size(name: str, axis: int, ndim: int = 2) -> int | None:
        shape = shapes.get(f"image_projection.{name}")
        return shape[axis] if shape is not None and len(shape) == ndim else None

    if size("latents", 1, 3) is not None:
        layers = {name.split(".")[2] for name in shapes if name.startswith("image_projection.layers.")}
        return {
            "image_projection": "resampler",
            "image_embed_dim": size("proj_in.weight", 1),
            "image_tokens": size("latents", 1, 3),
            "resampler_width": size("latents", 2, 3),
            "resampler_depth": len(layers),
            "resampler_heads": (size("layers.0.0.to_q.weight", 0) or 0) // 64,  # a head is 64 wide in every file
        }
    width, rows = size("norm.weight", 0, 1), size("proj.weight", 0)
    if rows is None:
        return {}
    fields = {"image_projection": "linear", "image_embed_dim": size("proj.weight", 1)}
    return fields if width is None else {**fields, "image_projection": "pooled", "image_tokens": rows // max(width, 1)}
