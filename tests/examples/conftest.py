"""The training scripts of the built-in model, with a rung that is quick."""

import sys
from dataclasses import replace

import pytest
from helpers import ROOT

FOLDER = ROOT / "examples" / "mini"


@pytest.fixture(scope="module")
def scripts():
    """The modules of examples/mini, with a rung that is quick."""
    sys.path.insert(0, str(FOLDER))
    import data
    import generated
    import initial
    import rungs
    import train_head_detector
    import train_head_fitter
    import train_image_encoder
    import train_unet
    import train_upsampler
    import train_vae
    import what_blurs

    sys.path.remove(str(FOLDER))
    train_unet.fast_in_bfloat16 = lambda device: False  # Accelerate has one precision per process
    small = rungs.RUNGS["cpu"]
    rungs.RUNGS["test"] = replace(
        small,
        image_size=32,
        vae=replace(
            small.vae,
            block_out_channels=(8, 16),
            norm_num_groups=1,
            down_block_types=small.vae.down_block_types[:2],
            up_block_types=small.vae.up_block_types[:2],
        ),
        image_encoder=replace(small.image_encoder, image_size=32, patch_size=16, num_hidden_layers=1),
        unet=replace(small.unet, block_out_channels=(32, 32), attention_head_dim=(1, 1)),
        **{"vae_batch": 8, "unet_batch": 8, "upsampler_batch": 2},
        **{"upsampler_pool": 4, "upsampler_fresh": 1, "pool_heads": 2, "fresh_heads": 1, "measured_heads": 1},
    )
    for name, value in {"FIRST": 2, "LIMIT": 4}.items():
        setattr(generated, name, value)
    yield {"data": data, "generated": generated, "initial": initial, "rungs": rungs, "what_blurs": what_blurs} | {
        "head_detector": train_head_detector,
        "head_fitter": train_head_fitter,
        "image_encoder": train_image_encoder,
        "vae": train_vae,
        "unet": train_unet,
        "upsampler": train_upsampler,
    }
    del rungs.RUNGS["test"]
