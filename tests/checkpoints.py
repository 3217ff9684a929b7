"""Small checkpoints in the layouts of diffusers and transformers, and how the tests run a pipeline."""

from dataclasses import replace

import diffusers
import numpy as np
import torch
import transformers
from helpers import randomized
from PIL import Image
from test_unet import multi_view_config
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gafext.config import SD_X2_UNET
from gafext.models.k_unet import KUNet
from gafext.models.unet import MultiViewUNet
from gafext.upsampler import LatentUpsampler, PromptEmbeds

SIZE = 8  # of the latents; pictures are four times as large, and twice that when upsampled


def save_checkpoint(folder, *, multi_view=True, prediction_type="epsilon", seed=0):
    """A checkpoint folder with diffusers' and transformers' own files; the U-Net is ours where it is multi-view."""
    torch.manual_seed(seed)
    stock = diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=40,
        use_linear_projection=True,
        norm_num_groups=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=12,
    )
    unet = MultiViewUNet(multi_view_config()) if multi_view else stock
    randomized(unet, seed=seed).save_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    vae.save_pretrained(folder / "vae")
    clip = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=32,
        projection_dim=16,
    )
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder")
    diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    return folder


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


def portrait(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def run(pipe, image=None, **options):
    defaults = {"num_inference_steps": 2, "generator": 0, "output_type": "pt", "progress_bar": False}
    return pipe(portrait() if image is None else image, **{**defaults, **options})


def count_rows(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


def stock_vae(seed=0, widths=(8, 16)):
    model = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=4,
    )
    return randomized(model, seed=seed)


def stock_unet(seed=0):
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=12,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    return randomized(model, seed=seed)


def stock_clip(seed=0):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8)
    return randomized(transformers.CLIPVisionModelWithProjection(config), seed=seed)
