"""The contact sheet: all views on one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from gafext.cameras import Cameras
from gafext.output.turn import angles

_TILE, _GAP, _LABEL, _FONT = 256, 8, 20, 14  # pixels


def contact_sheet(images: Sequence[Image.Image], cameras: Cameras | None = None) -> Image.Image:
    """Arrange images row by row on one nearly square sheet, each at most 256 pixels wide.

    Args:
        images: V square images of one size.
        cameras: V cameras; number, azimuth and elevation in degrees are written below each view. None: no labels.
    """
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    tile = min(_TILE, images[0].width)
    labels = [] if cameras is None else _labels(cameras, tile)
    across, down = tile + _GAP, tile + _GAP + (_LABEL if labels else 0)
    sheet = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        corner = (column * across + _GAP, row * down + _GAP)
        sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), corner)
        if labels:
            sheet.paste(labels[index], (corner[0], corner[1] + tile))
    return sheet


def _labels(cameras: Cameras, width: int) -> list[Image.Image]:
    """Draw one line of text per camera, in short form if `width` is too small for the long one."""
    font, labels = ImageFont.load_default(_FONT), []
    for view, degrees in enumerate(angles(cameras)):
        azimuth, elevation = map(round, degrees)
        text = f"view {view}: azimuth {azimuth}°, elevation {elevation}°"
        if font.getlength(text) > width:
            text = f"{view}: {azimuth}°, {elevation}°"
        label = Image.new("RGB", (width, _LABEL), "white")
        ImageDraw.Draw(label).text((width / 2, _LABEL / 2), text, fill="black", font=font, anchor="mm")
        labels.append(label)
    return labels
