"""Rules from the tensor names (keys) of each supported file layout to those of gafext's modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from gafext.config import CLIPTextConfig, UNetConfig, VAEConfig

KeyRule = Callable[[str], "str | tuple[str, ...] | None"]
"""Maps a key of a file to a key of our module, to several keys that share its rows evenly, or to None: ignored."""


def same_key(key: str) -> str | None:
    """Read files with the names of our modules: diffusers' for U-Net, K-UNet and VAE, transformers' for CLIP."""
    return key


_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_key(key: str) -> str | None:
    """Read diffusers' AutoencoderKL files, also those before 0.18 (`mid_block.attentions.0.query`, ...)."""
    match = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    return f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.{match[3]}" if match else key


def clip_vision_key(key: str) -> str | None:
    """Read transformers' CLIP files for the image encoder: CLIPVisionModel, or a CLIPModel with both encoders.

    transformers 5 omits the prefix `vision_model.` of a separate image encoder. The text encoder's keys and the
    constant `position_ids` of older files are ignored.
    """
    if key.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")):
        key = f"vision_model.{key}"
    foreign = key.startswith(("text_model.", "text_projection.")) or key == "logit_scale"
    return None if foreign or key.endswith("position_ids") else key


def clip_text_key(key: str) -> str | None:
    """Read transformers' CLIP files for the text encoder: CLIPTextModel, or a CLIPModel with both encoders.

    transformers 5 omits the prefix `text_model.` of a separate text encoder. The image encoder's keys and the constant
    `position_ids` of older files are ignored.
    """
    foreign = key.startswith(("vision_model.", "visual_projection.", "text_projection.")) or key == "logit_scale"
    if foreign or key.endswith("position_ids"):
        return None
    return key if key.startswith("text_model.") else f"text_model.{key}"


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


def ldm_unet_names(config: UNetConfig) -> dict[str, str]:
    """Map latent diffusion's names of layers and blocks (`input_blocks.1.0.in_layers.0`, ...) to diffusers'."""
    return {
        **_LDM_OUTSIDE,
        **_ldm_down(config),
        **_ldm_resnet("middle_block.0", "mid_block.resnets.0"),
        "middle_block.1": "mid_block.attentions.0",
        **_ldm_resnet("middle_block.2", "mid_block.resnets.1"),
        **_ldm_up(config),
    }


def ldm_unet_rule(config: UNetConfig) -> Callable[[str], str]:
    """Read latent diffusion's U-Net (`input_blocks.1.0.in_layers.0`, ...): single files, ImageDream and MVDream.

    The rule expects keys without the prefix `model.diffusion_model.` and returns unknown keys unchanged. Blocks are
    numbered through all stages, so the mapping depends on the configuration; names inside transformers are the same.

    Source: github.com/CompVis/latent-diffusion: ldm/modules/diffusionmodules/openaimodel.py.
    """
    names = ldm_unet_names(config)

    def rule(key: str) -> str:
        parts = key.split(".")
        for length in range(len(parts) - 1, 0, -1):
            name = names.get(".".join(parts[:length]))
            if name is not None:
                return ".".join([name, *parts[length:]])
        return key

    return rule


def _ldm_resnet(ldm_block: str, block: str) -> dict[str, str]:
    return {f"{ldm_block}.{ldm_name}": f"{block}.{name}" for ldm_name, name in _LDM_RESNET.items()}


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
            place = 1  # index of the upsampler: after the attention if the block has one
            if block_type.startswith("CrossAttn"):
                names[f"output_blocks.{index}.1"] = f"up_blocks.{stage}.attentions.{layer}"
                place = 2
            if layer == layers[stage] and stage < len(layers) - 1:
                names[f"output_blocks.{index}.{place}.conv"] = f"up_blocks.{stage}.upsamplers.0.conv"
            index += 1
    return names


_VAE_NAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def ldm_vae_rule(config: VAEConfig) -> KeyRule:
    """Read latent diffusion's autoencoder (`encoder.down.0.block.0.conv1`, ...): single-file checkpoints and VAEs.

    The rule expects keys without the prefix `first_stage_model.` and ignores the training loss (`loss.*`).

    Source: github.com/CompVis/latent-diffusion: ldm/modules/diffusionmodules/model.py.
    """
    last = len(config.block_out_channels) - 1

    def rule(key: str) -> str | None:
        if key.startswith("loss."):
            return None
        for ldm_name, name in _VAE_NAMES:
            key = re.sub(ldm_name, name, key)
        # Latent diffusion numbers the decoder's stages by resolution, diffusers in order of execution.
        return re.sub(r"(?<=\.up_blocks\.)\d{1,4}", lambda match: str(last - int(match[0])), key)

    return rule


_TEXT_OUTSIDE = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def open_clip_text_rule(config: CLIPTextConfig) -> KeyRule:
    """Read OpenCLIP's text encoder (`transformer.resblocks.0.attn.in_proj_weight`, ...) of single-file checkpoints.

    The rule expects keys without the prefix `cond_stage_model.model.`; `in_proj` is split into query, key and value,
    and the image encoder, the projection and the layer after `num_hidden_layers` are ignored.

    Source: github.com/mlfoundations/open_clip: src/open_clip/transformer.py.
    """

    def rule(key: str) -> str | tuple[str, ...] | None:
        if key in ("text_projection", "logit_scale", "attn_mask") or key.startswith("visual."):
            return None
        match = re.fullmatch(r"transformer\.resblocks\.(\d{1,4})\.(.+)[._](weight|bias)", key)
        if match is None:
            return _TEXT_OUTSIDE.get(key, key)
        layer, name, kind = match.groups()
        if int(layer) == config.num_hidden_layers:
            return None
        prefix = f"text_model.encoder.layers.{int(layer)}"
        if name == "attn.in_proj":
            return tuple(f"{prefix}.self_attn.{which}_proj.{kind}" for which in "qkv")
        return f"{prefix}.{_TEXT_LAYER.get(name, name)}.{kind}"

    return rule


def ip_adapter_rule(block_names: Iterable[str], keys: Iterable[str]) -> KeyRule:
    """Read IP-Adapter files, published (`image_proj.*`, `ip_adapter.1.to_k_ip.weight`) or as their trainer saves them.

    The trainer's checkpoints have `image_proj_model.*`, `adapter_modules.1.to_k_ip.weight` and the whole U-Net, which
    is ignored. The U-Net shares the adapter's tensors: where the file has each tensor once, as safetensors written by
    accelerate, they are `unet.*.attn2.processor.to_k_ip.weight` alone. Unknown keys are returned unchanged.

    Args:
        block_names: names of the U-Net's transformer blocks. The file numbers attention layers in diffusers' order
            (down blocks, up blocks, mid block): even numbers are attn1, which has no weights, odd numbers attn2.
        keys: keys of the file.

    Source: github.com/tencent-ailab/IP-Adapter: its ModuleList over diffusers' `unet.attn_processors`;
    tutorial_train.py.
    """
    ordered = sorted(block_names, key=lambda name: name.startswith("mid_block"))  # stable: down, up, middle
    names = {
        f"ip_adapter.{2 * index + 1}.{which}.weight": f"{block}.attn2.{which}.weight"
        for index, block in enumerate(ordered)
        for which in ("to_k_ip", "to_v_ip")
    }
    shared = not any(key.startswith(("adapter_modules.", "ip_adapter.")) for key in keys)

    def rule(key: str) -> str | None:
        if key.startswith("unet."):
            return key.removeprefix("unet.").replace(".processor.", ".") if shared and "_ip." in key else None
        key = re.sub(r"^adapter_modules\.", "ip_adapter.", key)
        return names.get(key, re.sub(r"^image_proj(_model)?\.", "image_projection.", key))

    return rule


_MV_ADAPTER_LAYER = re.compile(r"(.+)\.attn1\.processor\.to_(q|k|v|out)_(mv|ref)\.(.+)")


def mv_adapter_key(key: str) -> str:
    """Read MV-Adapter files (`*.attn1.processor.to_q_mv.weight`, `adapter.conv_in.weight`, ...).

    The condition encoder's keys may have its name as a prefix. Unknown keys are returned unchanged.

    Source: github.com/huanngzh/MV-Adapter: mvadapter/pipelines/pipeline_mvadapter_i2mv_sd.py, _save_custom_adapter.
    """
    match = _MV_ADAPTER_LAYER.fullmatch(key)
    if match is not None:
        block, projection, kind, rest = match.groups()
        return f"{block}.adapter.{kind}.to_{projection}.{rest}"
    encoder = key.removeprefix("cond_encoder.")
    return f"ray_encoder.{encoder.removeprefix('adapter.')}" if encoder.startswith("adapter.") else key


# Prefixes that training code adds. Latent diffusion's own `model.diffusion_model.` is none of them.
_PREFIX = r"(?:module|model(?!\.diffusion_model)|unet|denoiser|_orig_mod|state_dict|ema|ema_model)\."
_PREFIXES = re.compile(f"^(?:{_PREFIX})+")


def unwrapped_rule(keys: Iterable[str]) -> KeyRule:
    """Read state dicts of wrapped networks: remove prefixes such as `module.` or `unet.unet.` that all keys have."""
    prefix, start = "", re.compile(_PREFIX)
    keys = list(keys)
    while (
        keys and (match := start.match(keys[0], len(prefix))) and all(k.startswith(match[0], len(prefix)) for k in keys)
    ):
        prefix += match[0]
    return lambda key: key.removeprefix(prefix)


# Other names of training code for the same tensors.
_ALIASES = (
    (r"\.attn_(?:mv|multiview|cross_view|view)\.", ".attn_cv."),
    (r"\.norm_(?:mv|multiview|cross_view|view)\.", ".norm_cv."),
    (r"\.attn_(?:image|img|clip)\.", ".attn_ip."),
    (r"\.norm_(?:image|img|clip)\.", ".norm_ip."),
    (r"^(?:pose|camera)_(?:embedding|embed|mlp)\.", "class_embedding."),
    (r"^image_proj\.", "image_projection."),
)


def trained_key(key: str) -> str:
    """Read state dicts of GAF-style training code (`module.unet.*`, `attn_mv`, `pose_embedding`, `image_proj`, ...)."""
    key = _PREFIXES.sub("", key)
    for pattern, name in _ALIASES:
        key = re.sub(pattern, name, key)
    return key
