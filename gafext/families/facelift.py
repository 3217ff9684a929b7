"""FaceLift's checkpoints: six fixed views of a head, on Stable Diffusion 2.1 unCLIP."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from gafext.cameras import Cameras, facelift
from gafext.config import UNetConfig
from gafext.families.base import Family, Shapes

VIEWS = ("front", "front_right", "right", "back", "left", "front_left")


@dataclass(frozen=True)
class MV2DUNetConfig(UNetConfig):
    """Configuration of a UNetMV2DConditionModel whose views attend to the front view and to themselves.

    Source: github.com/weijielyu/FaceLift: mvdiffusion/models/unet_mv2d_condition.py, configs/mvdiffusion.yaml.
    """

    class_name: ClassVar[str] = "UNetMV2DConditionModel"
    only: ClassVar[dict[str, tuple]] = {
        **UNetConfig.only,
        "mid_block_type": ("UNetMidBlockMV2DCrossAttn",),
        "num_views": (len(VIEWS),),
        "multiview_attention": (True,),
        "sparse_mv_attention": (True,),
        "cd_attention_last": (False,),
        "cd_attention_mid": (False,),
        "selfattn_block": ("custom",),
        "addition_downsample": (False,),
    }
    without_effect: ClassVar[frozenset[str]] = UNetConfig.without_effect | {"addition_channels"}


class FaceLift(Family):
    """Views that attend to the front view, and see the portrait as input channels and as class labels.

    It was trained on heads before a plain background, the face about 0.38 of the picture wide and a little below the
    centre; the public script crops portraits so.

    Source: FaceLift (arXiv 2412.17812); github.com/weijielyu/FaceLift: inference.py,
    mvdiffusion/pipelines/pipeline_mvdiffusion_unclip.py.
    """

    unet_class_names = frozenset({MV2DUNetConfig.class_name})
    guidance_scale = 3.0
    eta = 1.0
    doubles_latents = False
    reference_channels = True
    portrait_labels = True
    fixed_cameras = True
    prompts = tuple(f"a rendering image of 3D models, {view} view, color map." for view in VIEWS)
    prompt_file = "prompt_embeds.safetensors"
    prompt_advice = (
        "Convert the file that FaceLift's code has in mvdiffusion/data/fixed_prompt_embeds_6view: "
        "python -c \"import torch, safetensors.torch as s; s.save_file({'prompt_embeds': "
        "torch.load('clr_embeds.pt', map_location='cpu', weights_only=True)}, 'prompt_embeds.safetensors')\""
    )

    def unet_config(self, values: dict[str, Any], shapes: Shapes, *, source: str) -> UNetConfig:
        values = dict(values)
        for key in ("down_block_types", "up_block_types"):
            if isinstance(values.get(key), list):
                values[key] = [str(name).replace("BlockMV2D", "Block2D") for name in values[key]]
        config = asdict(MV2DUNetConfig.from_dict(values, source=source))
        return UNetConfig(**{**config, "cross_view": "front", "family": "facelift"})

    def default_cameras(self) -> Cameras:
        return facelift()


FAMILY = FaceLift()
