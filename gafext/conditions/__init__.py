"""What a run is made of: its options, the U-Net's conditions, and what `prepare` hands to `denoise` and `finish`."""

from gafext.conditions.arguments import (
    DEFAULT_SAMPLE_SIZE,
    DEFAULT_VIEWS,
    RunOptions,
    check_choice,
    latent_size,
    resolve_cameras,
    rows_together,
)
from gafext.conditions.conditions import (
    LABEL_STEP,
    Conditions,
    ImageTokens,
    image_tokens,
    portrait_labels,
    prepare_conditions,
)
from gafext.conditions.run import Run

__all__ = [
    "DEFAULT_SAMPLE_SIZE",
    "DEFAULT_VIEWS",
    "LABEL_STEP",
    "Conditions",
    "ImageTokens",
    "Run",
    "RunOptions",
    "check_choice",
    "image_tokens",
    "latent_size",
    "portrait_labels",
    "prepare_conditions",
    "resolve_cameras",
    "rows_together",
]
