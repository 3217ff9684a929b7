"""Layers and attention of diffusers, computed by gafext's operations; imported once diffusers is.

The classes have no state of their own: see gafext.integrations.layers. An attention's processor stays the one it has,
and is looked at in each call: one that is set later, by an IP-Adapter or by the user, counts at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU as StockGEGLU
from diffusers.models.attention_processor import Attention as StockAttention
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D as StockResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel as StockTransformer2DModel
from torch import Tensor, nn

from gafext.integrations import layers
from gafext.models.attention import merge_heads, split_heads
from gafext.ops import flash_attention, geglu, geglu_gate

# The processors that diffusers itself installs with PyTorch 2; the results of all others are left to them.
KNOWN_PROCESSORS = (AttnProcessor2_0, IPAdapterAttnProcessor2_0)


class GEGLU(StockGEGLU):
    __setstate__ = layers.set_state

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layers.is_plain(self.proj, layers.Linear):
            return geglu(hidden_states, self.proj.weight, self.proj.bias)
        return geglu_gate(self.proj(hidden_states))  # a projection with LoRA, in 8 bits, or with a hook


class ResnetBlock2D(StockResnetBlock2D):
    __setstate__ = layers.set_state

    def forward(self, input_tensor: Tensor, temb: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not _is_usual_block(self) or args or kwargs:
            return StockResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        x = self.conv1(layers.norm_silu(self.norm1, input_tensor))
        if temb is not None:
            if self.time_emb_proj is not None:
                temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
            x = x + temb
        x = self.conv2(self.dropout(layers.norm_silu(self.norm2, x)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        x = shortcut + x
        return x if self.output_scale_factor == 1 else x / self.output_scale_factor


def _is_usual_block(block: StockResnetBlock2D) -> bool:
    return (
        block.time_embedding_norm == "default"
        and layers.is_plain(block.nonlinearity, nn.SiLU)
        and block.upsample is None
        and block.downsample is None
        and not (block.training and torch.is_grad_enabled())  # diffusers copies to a layout that DDP wants
    )


class Transformer2DModel(StockTransformer2DModel):
    __setstate__ = layers.set_state

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        # diffusers copies to [B,C,h,w] order here, and the next convolution back to channels-last.
        x = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
        x = x.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        return residual + (x if self.use_linear_projection else self.proj_out(x))


class Attention(StockAttention):
    __setstate__ = layers.set_state

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        if attention_mask is None and _is_usual_attention(self, encoder_hidden_states, cross_attention_kwargs):
            return _attend(self, hidden_states, encoder_hidden_states)
        return StockAttention.forward(
            self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )


def _is_usual_attention(layer: StockAttention, context: Any, options: dict[str, Any]) -> bool:
    """Return whether `_attend` computes what the processor would."""
    if not (layer.spatial_norm is None and layer.norm_q is None and layer.norm_k is None and not layer.norm_cross):
        return False
    if any(value is not None for name, value in options.items() if name != "temb"):  # of spatial_norm
        return False
    processor: Any = layer.processor
    if type(processor) is IPAdapterAttnProcessor2_0:
        return isinstance(context, tuple) and not any(isinstance(scale, list) for scale in processor.scale)
    return type(processor) is AttnProcessor2_0 and not isinstance(context, tuple)


def _attend(
    layer: StockAttention, hidden_states: Tensor, context: Tensor | tuple[Tensor, list[Tensor]] | None
) -> Tensor:
    assert layer.to_k is not None and layer.to_v is not None and layer.to_out is not None  # for pyright
    text, images = context if isinstance(context, tuple) else (context, [])
    x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states  # [B,L,C]
    if layer.group_norm is not None:
        x = layer.group_norm(x.transpose(1, 2)).transpose(1, 2)
    text = x if text is None else text
    query = split_heads(layer.to_q(x), layer.heads)
    key, value = (split_heads(project(text), layer.heads) for project in (layer.to_k, layer.to_v))
    attended = merge_heads(flash_attention(query, key, value))  # [B,L,H*D]
    for image, scale, to_k, to_v in _adapters(layer, images):
        # [B,images,T,C] or [B,T,C]; the tokens of all images are keys of one attention.
        key, value = (split_heads(project(image).flatten(1, -2), layer.heads) for project in (to_k, to_v))
        attended = attended + scale * merge_heads(flash_attention(query, key, value))
    x = layer.to_out[1](layer.to_out[0](attended))
    if hidden_states.dim() == 4:
        x = x.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
    if layer.residual_connection:
        x = x + hidden_states
    return x if layer.rescale_output_factor == 1 else x / layer.rescale_output_factor


def _adapters(layer: StockAttention, images: list[Tensor]) -> list[tuple[Tensor, float, nn.Module, nn.Module]]:
    """List the image tokens, scale and projections of each IP-Adapter that is not switched off."""
    if not images:
        return []
    processor: Any = layer.processor
    adapters = zip(images, processor.scale, processor.to_k_ip, processor.to_v_ip, strict=False)
    return [adapter for adapter in adapters if adapter[1] != 0]


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    StockAttention: Attention,
    StockGEGLU: GEGLU,
    StockResnetBlock2D: ResnetBlock2D,
    StockTransformer2DModel: Transformer2DModel,
}
