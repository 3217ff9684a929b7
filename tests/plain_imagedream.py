"""The layout of ImageDream's and MVDream's U-Nets, and a plain-PyTorch rendering that reads it."""

import json
import math

import torch
import torch.nn.functional as F
from helpers import UNET_WEIGHTS
from safetensors.torch import save_file

HEAD = 16
IMAGEDREAM = {
    "_class_name": "MultiViewUNetModel",
    "_diffusers_version": "0.25.0",
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 2,
    "attention_resolutions": [2, 1],
    "channel_mult": [1, 2, 2],
    "num_head_channels": HEAD,
    "transformer_depth": 1,
    "context_dim": 40,
    "camera_dim": 16,
    "ip_dim": 5,
}
MVDREAM = {**{k: v for k, v in IMAGEDREAM.items() if k != "ip_dim"}, "num_res_blocks": 1, "transformer_depth": 2}


def ldm_state(config, *, seed):
    """Random weights under the published names."""
    generator, state = torch.Generator().manual_seed(seed), {}
    base, context, camera, ip = (config.get(k) for k in ("model_channels", "context_dim", "camera_dim", "ip_dim"))

    def put(name, *shape, bias=True, norm=False):
        values = torch.randn(shape, generator=generator)
        state[f"{name}.weight"] = 1 + 0.2 * values if norm else values / math.prod(shape[1:]) ** 0.5
        if bias:
            state[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)

    def resnet(name, cin, cout):
        put(f"{name}.in_layers.0", cin, norm=True)
        put(f"{name}.in_layers.2", cout, cin, 3, 3)
        put(f"{name}.emb_layers.1", cout, 4 * base)
        put(f"{name}.out_layers.0", cout, norm=True)
        put(f"{name}.out_layers.3", cout, cout, 3, 3)
        if cin != cout:
            put(f"{name}.skip_connection", cout, cin, 1, 1)

    def transformer(name, c):
        put(f"{name}.norm", c, norm=True)
        put(f"{name}.proj_in", c, c)
        put(f"{name}.proj_out", c, c)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(config["transformer_depth"])):
            for attn, width, more in (("attn1", c, ()), ("attn2", context, ("to_k_ip", "to_v_ip") if ip else ())):
                put(f"{block}.{attn}.to_q", c, c, bias=False)
                for projection in ("to_k", "to_v", *more):
                    put(f"{block}.{attn}.{projection}", c, width, bias=False)
                put(f"{block}.{attn}.to_out.0", c, c)
            for norm in ("norm1", "norm2", "norm3"):
                put(f"{block}.{norm}", c, norm=True)
            put(f"{block}.ff.net.0.proj", 8 * c, c)
            put(f"{block}.ff.net.2", c, 4 * c)

    for name, width in (("time_embed", base), *([("camera_embed", camera)] if camera else [])):
        put(f"{name}.0", 4 * base, width)
        put(f"{name}.2", 4 * base, 4 * base)
    put("input_blocks.0.0", base, config["in_channels"], 3, 3)
    skips, c, index, factors = [base], base, 1, config["channel_mult"]
    for level, factor in enumerate(factors):
        for _ in range(config["num_res_blocks"]):
            resnet(f"input_blocks.{index}.0", c, base * factor)
            c = base * factor
            if 2**level in config["attention_resolutions"]:
                transformer(f"input_blocks.{index}.1", c)
            skips, index = [*skips, c], index + 1
        if level < len(factors) - 1:
            put(f"input_blocks.{index}.0.op", c, c, 3, 3)
            skips, index = [*skips, c], index + 1
    resnet("middle_block.0", c, c)
    transformer("middle_block.1", c)
    resnet("middle_block.2", c, c)
    index = 0
    for level, factor in reversed(list(enumerate(factors))):
        for layer in range(config["num_res_blocks"] + 1):
            resnet(f"output_blocks.{index}.0", c + skips.pop(), base * factor)
            c, place = base * factor, 1
            if 2**level in config["attention_resolutions"]:
                transformer(f"output_blocks.{index}.1", c)
                place = 2
            if level and layer == config["num_res_blocks"]:
                put(f"output_blocks.{index}.{place}.conv", c, c, 3, 3)
            index += 1
    put("out.0", base, norm=True)
    put("out.2", config["out_channels"], base, 3, 3)
    if ip:
        state["image_embed.latents"] = torch.randn(1, ip, context, generator=generator)
        put("image_embed.proj_in", context, 1280)
        put("image_embed.proj_out", context, context)
        put("image_embed.norm_out", context, norm=True)
        for layer in (f"image_embed.layers.{i}" for i in range(4)):
            put(f"{layer}.0.norm1", context, norm=True)
            put(f"{layer}.0.norm2", context, norm=True)
            put(f"{layer}.0.to_q", 768, context, bias=False)
            put(f"{layer}.0.to_kv", 2 * 768, context, bias=False)
            put(f"{layer}.0.to_out", context, 768, bias=False)
            put(f"{layer}.1.0", context, norm=True)
            put(f"{layer}.1.1", 4 * context, context, bias=False)
            put(f"{layer}.1.3", context, 4 * context, bias=False)
    return state


class Plain:
    """The public U-Net's arithmetic in float64: what a layer is, the names of its weights tell."""

    def __init__(self, state):
        self.state = {name: value.double() for name, value in state.items()}

    def __contains__(self, name):
        return f"{name}.weight" in self.state

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, name, x, eps=1e-5):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.group_norm(x, 32, weight, bias, eps) if x.ndim == 4 else F.layer_norm(x, x.shape[-1:], weight, bias)

    @staticmethod
    def attention(q, k, v, head):
        q, k, v = (t.unflatten(2, (-1, head)).transpose(1, 2) for t in (q, k, v))
        return ((q @ k.transpose(2, 3) * head**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def resnet(self, name, x, emb):
        h = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.norm(f"{name}.out_layers.0", h)))
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection" in self else x)

    def block(self, name, x, text, tokens, views):
        n = self.norm(f"{name}.norm1", x).reshape(-1, views * x.shape[1], x.shape[2])
        q, k, v = (self.linear(f"{name}.attn1.{to}", n) for to in ("to_q", "to_k", "to_v"))
        x = x + self.linear(f"{name}.attn1.to_out.0", self.attention(q, k, v, HEAD)).view_as(x)
        q = self.linear(f"{name}.attn2.to_q", self.norm(f"{name}.norm2", x))
        k, v = (self.linear(f"{name}.attn2.{to}", text) for to in ("to_k", "to_v"))
        mixed = self.attention(q, k, v, HEAD)
        if tokens is not None:
            k, v = (self.linear(f"{name}.attn2.{to}", tokens) for to in ("to_k_ip", "to_v_ip"))
            mixed = mixed + self.attention(q, k, v, HEAD)
        x = x + self.linear(f"{name}.attn2.to_out.0", mixed)
        value, gate = self.linear(f"{name}.ff.net.0.proj", self.norm(f"{name}.norm3", x)).chunk(2, dim=-1)
        return x + self.linear(f"{name}.ff.net.2", value * F.gelu(gate))

    def layer(self, name, x, emb, text, tokens, views):
        if f"{name}.in_layers.0" in self:
            return self.resnet(name, x, emb)
        if f"{name}.proj_in" in self:
            h = self.linear(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6).flatten(2).transpose(1, 2))
            for i in range(2):
                if f"{name}.transformer_blocks.{i}.norm1" in self:
                    h = self.block(f"{name}.transformer_blocks.{i}", h, text, tokens, views)
            return x + self.linear(f"{name}.proj_out", h).transpose(1, 2).unflatten(2, x.shape[2:])
        if f"{name}.op" in self:
            return self.conv(f"{name}.op", x, stride=2)
        if f"{name}.conv" in self:
            return self.conv(f"{name}.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(name, x) if name in self else x

    def tokens(self, clip):
        x, latents = self.linear("image_embed.proj_in", clip), self.state["image_embed.latents"].repeat(len(clip), 1, 1)
        for i in range(4):
            attn, ff = f"image_embed.layers.{i}.0", f"image_embed.layers.{i}.1"
            queries = self.norm(f"{attn}.norm2", latents)
            keys = torch.cat([self.norm(f"{attn}.norm1", x), queries], dim=1)
            k, v = self.linear(f"{attn}.to_kv", keys).chunk(2, dim=-1)
            mixed = self.attention(self.linear(f"{attn}.to_q", queries), k, v, 64)
            latents = latents + self.linear(f"{attn}.to_out", mixed)
            inner = F.gelu(self.linear(f"{ff}.1", self.norm(f"{ff}.0", latents)))
            latents = latents + self.linear(f"{ff}.3", inner)
        return self.norm("image_embed.norm_out", self.linear("image_embed.proj_out", latents))

    def __call__(self, x, timestep, text, camera, *, views, tokens=None, reference=None):
        base = self.state["time_embed.0.weight"].shape[1]
        frequencies = 10000 ** (-torch.arange(base // 2).double() / (base // 2))
        angles = torch.full((len(x), 1), float(timestep)).double() * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = sum(
            self.linear(f"{name}.2", F.silu(self.linear(f"{name}.0", given)))
            for name, given in (("time_embed", waves), ("camera_embed", camera.double()))
        )
        tokens = None if tokens is None else tokens.repeat_interleave(views, dim=0)
        h, text, skips = x.double(), text.double(), []
        if reference is not None:
            h[views - 1 :: views] = reference.double()

        def count(part):
            return 1 + max(int(name.split(".")[1]) for name in self.state if name.startswith(part))

        def run(name, h):
            for i in range(3):
                h = self.layer(f"{name}.{i}", h, emb, text, tokens, views)
            return h

        for i in range(count("input_blocks")):
            h = run(f"input_blocks.{i}", h)
            skips.append(h)
        h = run("middle_block", h)
        for i in range(count("output_blocks")):
            h = run(f"output_blocks.{i}", torch.cat([h, skips.pop()], dim=1))
        return self.conv("out.2", F.silu(self.norm("out.0", h)))


def write(folder, config=IMAGEDREAM, *, seed=0):
    state = ldm_state(config, seed=seed)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / UNET_WEIGHTS)
    return state
