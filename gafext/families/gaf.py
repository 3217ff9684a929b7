"""GAF's checkpoints and stock U-Nets: diffusers' keys, plus attn_cv and attn_ip in the transformer blocks."""

from __future__ import annotations

from typing import Any

from gafext.config import UNetConfig
from gafext.config.unet import image_projection_fields
from gafext.families.base import Family, Shapes


class GAF(Family):
    """Diffusers' UNet2DConditionModel with additional layers, which are detected by the names of the tensors.

    Source: GAF (arXiv 2412.10209) section 3.
    """

    unet_class_names = frozenset({"MultiViewUNet", UNetConfig.class_name})

    def unet_config(self, values: dict[str, Any], shapes: Shapes, *, source: str) -> UNetConfig:
        values = dict(values)
        for part, field, form in (
            (".attn_cv.", "cross_view", "position"),
            (".attn_ip.", "image_attention", "block"),
            (".attn2.to_k_ip.", "image_attention", "decoupled"),
        ):
            if field not in values and any(part in key for key in shapes):
                values[field] = form
        if "image_embed_dim" not in values:
            values.update(image_projection_fields(shapes))
        return UNetConfig.from_dict(values, source=source)


FAMILY = GAF()
