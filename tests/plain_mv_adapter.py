"""MV-Adapter's files, and a rendering of them in plain PyTorch on diffusers' own U-Net and T2IAdapter."""

import diffusers
import torch
import torch.nn.functional as F
from helpers import randomized
from safetensors.torch import load_file, save_file


def condition_encoder(unet):
    channels, layers = unet.config.block_out_channels, unet.config.layers_per_block
    return diffusers.T2IAdapter(in_channels=6, channels=channels, num_res_blocks=layers, downscale_factor=8)


def save_mv_adapter(path, unet, *, seed=0, kinds=("mv", "ref"), prefix=""):
    """A file for a stock U-Net under the published names; without "ref", that of the text-to-multi-view kind."""
    generator = torch.Generator().manual_seed(seed)
    encoder = randomized(condition_encoder(unet), seed=seed)
    tensors = {prefix + name: value for name, value in encoder.state_dict().items()}
    for name, module in unet.named_modules():
        for kind in kinds if name.endswith(".attn1") else ():
            channels = module.to_q.in_features
            for projection in ("to_q_{}", "to_k_{}", "to_v_{}", "to_out_{}.0"):
                weight = torch.randn(channels, channels, generator=generator) * channels**-0.5
                tensors[f"{name}.processor.{projection.format(kind)}.weight"] = weight
            tensors[f"{name}.processor.to_out_{kind}.0.bias"] = 0.2 * torch.randn(channels, generator=generator)
    save_file(tensors, path)
    return path


class Processor:
    """Self-attention, plus attention to the same row in all views as a mask, plus attention to the features."""

    def __init__(self, weights):
        self.weights, self.features, self.views, self.seen = weights, None, None, None

    def attend(self, attn, kind, x, context, mask=None):
        heads = [
            F.linear(t, self.weights[f"to_{name}_{kind}.weight"]).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for name, t in (("q", x), ("k", context), ("v", context))
        ]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
        return F.linear(out, self.weights[f"to_out_{kind}.0.weight"], self.weights[f"to_out_{kind}.0.bias"])

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.seen = hidden_states
        own = diffusers.models.attention_processor.AttnProcessor2_0()(attn, hidden_states)
        if self.features is None:
            return own
        length = hidden_states.shape[1]
        row = (torch.arange(length) // round(length**0.5)).repeat(self.views)
        views = hidden_states.reshape(-1, self.views * length, hidden_states.shape[2])
        across = self.attend(attn, "mv", views, views, mask=row[:, None] == row)
        portrait = self.attend(attn, "ref", hidden_states, self.features.repeat_interleave(self.views, dim=0))
        return own + across.view_as(own) + portrait


class Plain:
    """A stock U-Net with the adapter of a file: unet(sample, t, text, rays [V,6,8h,8w], reference, drop)."""

    def __init__(self, unet, path):
        state = load_file(path)
        self.unet, self.encoder = unet, condition_encoder(unet).eval()
        self.encoder.load_state_dict({key: value for key, value in state.items() if key.startswith("adapter.")})
        processors = dict(unet.attn_processors)
        self.own = {name: Processor({}) for name in processors if name.endswith("attn1.processor")}
        for name, processor in self.own.items():
            processor.weights = {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
        unet.set_attn_processor({**processors, **self.own})

    def __call__(self, sample, t, text, *, rays, reference, dropped=()):
        """`text` is [R,T,C], the last for the portraits; those in `dropped` are replaced by features of zeros."""
        for processor in self.own.values():
            processor.features = None
        self.unet(reference, 0, text[-1:].expand(len(reference), -1, -1))
        for processor in self.own.values():
            processor.features, processor.views = processor.seen.clone(), len(rays)
            processor.features[list(dropped)] = 0
        added = [each.repeat(len(sample) // len(rays), 1, 1, 1) for each in self.encoder(rays)]
        text = text.repeat_interleave(len(sample) // len(text), dim=0)
        return self.unet(sample, t, text, down_intrablock_additional_residuals=added).sample
