"""FaceLift's folder, and its U-Net: diffusers' own, with attn1 rendered in plain PyTorch."""

import json

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from helpers import edit_json, randomized
from safetensors.torch import save_file
from small_checkpoints import SD_SCHEDULE, stock_clip, stock_text, stock_unet, stock_vae

VIEWS = 6
UPSTREAM = {
    "_class_name": "UNetMV2DConditionModel",
    "down_block_types": ["CrossAttnDownBlockMV2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlockMV2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlockMV2D"],
    "num_views": VIEWS,
    "multiview_attention": True,
    "sparse_mv_attention": True,
    "cd_attention_last": False,
    "cd_attention_mid": False,
    "selfattn_block": "custom",
    "addition_downsample": False,
    "addition_channels": [1280, 1280, 1280],
}
LETTERS = "abcdefghijklmnopqrstuvwxyz3._,"
TOKENS = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


class FrontAndOwn:
    """Attention of each view to the tokens of the first view of its portrait and to its own."""

    def __call__(self, attn, hidden_states, *_, **__):
        x = hidden_states.unflatten(0, (-1, VIEWS))  # [B,V,L,C]
        context = torch.cat([x[:, :1].expand_as(x), x], dim=2)
        query, key, value = (
            layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(2, 3)
            for layer, tokens in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return attn.to_out[0]((scores.softmax(-1) @ value).transpose(2, 3).flatten(3).flatten(0, 1))


def plain_unet(folder, *, seed=0) -> UNet2DConditionModel:
    """A small U-Net, saved with FaceLift's class, block names and fields."""
    labels = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32}
    unet = stock_unet(in_channels=8, upcast_attention=True, seed=seed, **labels)
    unet.save_pretrained(folder)
    edit_json(folder / "config.json", **UPSTREAM)
    processors = {name: FrontAndOwn() if ".attn1." in name else p for name, p in unet.attn_processors.items()}
    unet.set_attn_processor(processors)
    return unet


def write_text(folder):
    """A text encoder, and a tokenizer that has letters only."""
    sizes = {"hidden_size": 40, "max_position_embeddings": 77, "eos_token_id": len(TOKENS) - 1}
    stock_text(vocab_size=len(TOKENS), bos_token_id=len(TOKENS) - 2, **sizes).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 77}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))


def write(folder, *, seed=0) -> UNet2DConditionModel:
    """The folder that FaceLift's train_diffusion.py saves, with the texts as a file; returns the plain U-Net."""
    unet = plain_unet(folder / "unet", seed=seed)
    stock_vae(seed=seed).save_pretrained(folder / "vae")
    stock_clip(seed=seed).save_pretrained(folder / "image_encoder")
    normalizer = randomized(StableUnCLIPImageNormalizer(16), seed=seed)
    normalizer.std.data.abs_().add_(0.3)
    normalizer.save_pretrained(folder / "image_normalizer")
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noising.save_pretrained(folder / "image_noising_scheduler")
    diffusers.DDIMScheduler(
        **SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    ).save_pretrained(folder / "scheduler")
    embeds = torch.randn(VIEWS, 7, 40, generator=torch.Generator().manual_seed(seed))
    save_file({"prompt_embeds": embeds.half()}, folder / "prompt_embeds.safetensors")
    index = {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "unet": ["mvdiffusion.models.unet_mv2d_condition", "UNetMV2DConditionModel"],
        "num_views": VIEWS,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return unet
