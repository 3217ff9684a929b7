"""Write a small untrained parent for `gafext assemble`, in Stable Diffusion's layout, beside the built-in autoencoder.

For trying `gafext train` on a CPU. Real parents are Stable Diffusion 2.1's folder and CLIP ViT-H/14's.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import gafext
from gafext import DDIMScheduler, MultiViewUNet
from gafext.config import SD_SCHEDULE, UNetConfig

ASSETS = Path(gafext.__file__).parent / "assets" / "model"


def write_parent(folder: Path, *, widths: tuple[int, ...] = (64, 96), seed: int = 0) -> None:
    """Write folder/sd (U-Net with random weights, the built-in VAE, a schedule) and folder/clip (its image encoder).

    Args:
        folder: folder to write.
        widths: channels of the U-Net's levels; the last one has attention.
        seed: of the random weights.
    """
    attended = [False] * (len(widths) - 1) + [True]
    config = UNetConfig(
        sample_size=16,  # pictures of 64 pixels
        in_channels=8,
        out_channels=8,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=tuple(width // 32 for width in widths),
        cross_attention_dim=96,
        use_linear_projection=True,
        norm_num_groups=4,
    )
    schedule = replace(
        SD_SCHEDULE,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,  # generation starts from pure noise: the white background has to be predicted
        set_alpha_to_one=True,
        steps_offset=0,
    )
    torch.manual_seed(seed)
    MultiViewUNet(config).save_pretrained(folder / "sd" / "unet")
    DDIMScheduler(schedule).save_pretrained(folder / "sd" / "scheduler")
    shutil.copytree(ASSETS / "vae", folder / "sd" / "vae", dirs_exist_ok=True)
    shutil.copytree(ASSETS / "image_encoder", folder / "clip", dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    write_parent(parser.parse_args().out)
