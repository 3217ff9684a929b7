"""Small checkpoints in the layouts of diffusers and transformers, and how the tests run a pipeline."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import max_abs_diff, randomized
from PIL import Image
from plain_imagedream import IMAGEDREAM, write
from safetensors.torch import save_file

from gafext.config import SD_X2_UNET, UNetConfig
from gafext.guidance import guide
from gafext.models.k_unet import KUNet
from gafext.models.unet import MultiViewUNet
from gafext.predictor import Predictor
from gafext.upsampler import LatentUpsampler, PromptEmbeds

# Machines with a GPU may not have them: a module of tests that imports this one is then skipped.
diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))

SIZE = 8  # of the latents; pictures are four times as large, and twice that when upsampled

# Stock networks, of diffusers and transformers.

SMALL_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
NARROW = {"block_out_channels": (16, 32), "cross_attention_dim": 12}  # changes to SMALL_UNET
SMALL_CLIP = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 32,
    "projection_dim": 16,
}
SMALL_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def filled(module, seed):
    """Random weights of the seed; None keeps those of the initialisation."""
    return (module if seed is None else randomized(module, seed=seed)).eval()


def stock_unet(settings=SMALL_UNET, *, seed=0, **changes):
    sizes = {"sample_size": SIZE, "cross_attention_dim": 40, "norm_num_groups": 8}
    return filled(diffusers.UNet2DConditionModel(**{**sizes, **settings, **changes}), seed)


def stock_vae(widths=(8, 16), *, seed=0, **changes):
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    settings = {"block_out_channels": widths, "norm_num_groups": 4, **blocks, **changes}
    return filled(diffusers.AutoencoderKL(**settings), seed)


def stock_clip(settings=SMALL_CLIP, *, kind=transformers.CLIPVisionModelWithProjection, seed=0, **changes):
    """A tower of transformers, by default the one for images."""
    return filled(kind(kind.config_class(**{**settings, **changes})), seed)


def stock_text(*, kind=transformers.CLIPTextModel, seed=0, **changes):
    return stock_clip(SMALL_TEXT, kind=kind, seed=seed, **changes)


VOCABULARY = {
    **{word: index for index, word in enumerate(["!", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>"])},
    **{"<|startoftext|>": 8, "<|endoftext|>": 9},
}
MERGES = "#version: 0.2\na b</w>\n"


def stock_tokenizer(folder, **changes):
    """A small CLIP tokenizer in the files that published folders have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text(MERGES)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **changes}))
    return folder


# Pipelines of diffusers, wide enough for every kernel.

WIDE = {**SMALL_UNET, "block_out_channels": (128, 128), "sample_size": 16, "cross_attention_dim": 32}
PIPELINES = {
    "sd15": {"use_linear_projection": False},
    "sd21": {},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 64,
    },
}


def wide_unet(kind="sd21", **changes):
    return stock_unet(WIDE, **PIPELINES[kind], **changes)


def stock_pipeline(kind, folder, **changes):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(stock_tokenizer(folder / "tokenizer", model_max_length=12))
    parts = {
        "unet": wide_unet(kind, **changes),
        "vae": stock_vae((128, 128), norm_num_groups=8),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "text_encoder": stock_text(),
        "tokenizer": tokenizer,
        "feature_extractor": None,
        "image_encoder": None,
    }
    if kind == "sdxl":
        second = stock_text(kind=transformers.CLIPTextModelWithProjection, projection_dim=16, seed=1)
        pipe = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        pipe = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Our own networks.


def multi_view_config(**changes):
    additions = {"cross_view": "position", "image_attention": True, "image_embed_dim": 24}
    pose = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12}
    sizes = {"sample_size": SIZE, "in_channels": 8, "cross_attention_dim": 40, "norm_num_groups": 8}
    return UNetConfig(**{**SMALL_UNET, **sizes, **pose, **additions, **changes})


def multi_view_unet(*, seed=1, **changes):
    return randomized(MultiViewUNet(multi_view_config(**changes)), seed=seed).eval()


def save_checkpoint(folder, *, multi_view=True, prediction_type="epsilon", seed=0):
    """A checkpoint folder with diffusers' and transformers' own files; the U-Net is ours where it is multi-view."""
    torch.manual_seed(seed)
    pose = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12}
    unet = multi_view_unet(seed=seed) if multi_view else stock_unet(in_channels=8, seed=seed, **pose)
    unet.save_pretrained(folder / "unet")
    stock_vae((8, 16, 16), seed=None, scaling_factor=0.3).save_pretrained(folder / "vae")
    stock_clip(num_hidden_layers=3, seed=None).save_pretrained(folder / "image_encoder")
    diffusers.DDIMScheduler(
        **SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    return folder


def save_imagedream(folder, config=IMAGEDREAM, *, seed=0):
    """The folder that ashawkey/imagedream-ipmv-diffusers is: LDM keys, a CLIP tower without projection, CLIP-H text."""
    folder.mkdir(exist_ok=True)
    state = write(folder / "unet", config, seed=seed)
    torch.manual_seed(seed)
    stock_vae(seed=None).save_pretrained(folder / "vae")
    sizes = {"num_hidden_layers": 2, "hidden_act": "gelu"}
    text = {**sizes, "hidden_size": 40, "intermediate_size": 80, "num_attention_heads": 2, "vocab_size": 49408}
    stock_clip(text, kind=transformers.CLIPTextModel, seed=None).save_pretrained(folder / "text_encoder")
    vision = {**sizes, "hidden_size": 1280, "intermediate_size": 64, "num_attention_heads": 16, "patch_size": 56}
    stock_clip(vision, kind=transformers.CLIPVisionModel, seed=None).save_pretrained(folder / "image_encoder")
    scheduler = diffusers.DDIMScheduler(**SD_SCHEDULE, clip_sample=False, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "MVDreamPipeline",
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "requires_safety_checker": False,
        "unet": ["mv_unet", "MultiViewUNetModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return state


def save_upsampler(folder):
    """A small K-block upsampler with a ready empty prompt."""
    config = replace(
        SD_X2_UNET,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=24,
        time_cond_proj_dim=128 + 24,
    )
    prompt = PromptEmbeds(torch.randn(1, 5, 24), torch.randn(1, 24))
    upsampler = LatentUpsampler(randomized(KUNet(config), seed=2), empty_prompt=prompt).eval()
    upsampler.save_pretrained(folder)
    return upsampler


def save_ip_adapter(path, *, attentions=(32, 32, 32, 64), tokens=4, context=40, embeds=16, seed=0):
    """An IP-Adapter file for `SMALL_UNET` and `SMALL_CLIP`; `attentions`: channels of each, down, up, middle."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "proj.weight": (tokens * context, embeds),
        "proj.bias": (tokens * context,),
        "norm.weight": (context,),
        "norm.bias": (context,),
    }
    tensors = {f"image_proj.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for index, channels in enumerate(attentions):
        for which in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * index + 1}.{which}.weight"] = torch.randn(channels, context, generator=generator)
    save_file(tensors, path)
    return path


def save_lora(path, *, channels=32, rank=4):
    """A LoRA file for one layer of `SMALL_UNET`."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {
        f"{name}.lora_A.weight": torch.randn(rank, channels),
        f"{name}.lora_B.weight": torch.randn(channels, rank),
    }
    save_file(factors, path)
    return path


# Runs of a pipeline.


def portrait(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def run(pipe, image=None, **options):
    defaults = {"num_inference_steps": 2, "generator": 0, "output_type": "pt", "progress_bar": False}
    return pipe(portrait() if image is None else image, **{**defaults, **options})


def count_rows(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


@torch.no_grad()
def assert_conditional_pass_alone(pipe, **options):
    """Each pass alone gives what it gives beside the other one: outside the guidance interval, and in two processes."""
    defaults = {"num_inference_steps": 2, "generator": 0, "guidance_scale": 3.0, **options}
    made = pipe.prepare([portrait(0), portrait(1)], guidance_interval=(1e8, 1e9), **defaults)
    assert made.conditions.passes == 2
    rows, timestep = count_rows(pipe), made.timesteps[0].item()
    alone = Predictor(pipe.unet, made)(made.latents, timestep)
    both = replace(made, guidance_interval=None, guidance_scale=1.0)
    expected = Predictor(pipe.unet, both)(made.latents, timestep)
    assert 2 * rows[0] == rows[1] and max_abs_diff(alone, expected) < 1e-4
    guided = Predictor(pipe.unet, replace(made, guidance_interval=None))(made.latents, timestep)
    assert max_abs_diff(guided, expected) > 1e-3
    halves = [half(made.num_portraits) for half in (made.conditions.unconditional, made.conditions.conditional)]
    parts = [Predictor(pipe.unet, replace(both, conditions=half))(made.latents, timestep) for half in halves]
    assert max_abs_diff(guide(*parts, made.guidance_scale), guided) < 1e-4
