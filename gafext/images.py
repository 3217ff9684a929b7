"""Image input and output: any accepted form to an upright RGB image, images to tensors and back."""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from gafext.errors import ImageError

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor
Colour = tuple[int, int, int]

MIN_SIDE = 1  # pixels
WHITE: Colour = (255, 255, 255)
GREY: Colour = (128, 128, 128)  # of normal maps: a normal of 0
MAX_BACKGROUND_SPREAD = 32  # an eighth of the range: above an even backdrop with a shadow, below a room or a street
_FLOAT_SLACK = 1e-3  # resampling in floating point may overshoot [0, 1] by this much


def read_image(image: ImageLike, *, name: str = "image") -> Image.Image:
    """Read an upright image with its transparency: a file's first frame, by its EXIF orientation, in sRGB.

    Args:
        image: a path; a PIL image of any mode; an array [H,W,C] or [H,W]; or a tensor [C,H,W] or
            [H,W], with 1, 3 or 4 channels (grey, RGB, RGBA) as uint8, uint16, bool, or float in [0,1].
        name: name of an image without a path, for messages.

    Returns:
        PIL image of 8 bits per channel, of any size: mode RGBA if a pixel is transparent, else RGB.

    Raises:
        ImageError: the image cannot be read, or its shape, dtype or range is not accepted.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read_file(Path(image))
    if isinstance(image, (np.ndarray, Tensor)):
        image = _from_array(image, name)
    if not isinstance(image, Image.Image):
        raise ImageError(f"{name}: expected a path, PIL image, array or tensor, got {type(image).__name__}")
    return _upright(image, name)


def load_image(
    image: ImageLike, *, name: str = "image", background: Colour = WHITE, matte: bool = False
) -> Image.Image:
    """Load an upright RGB image: that of `read_image`, with transparency composited over a background.

    The full-size image is composited, so that no resampling mixes in the colours of transparent pixels.

    Args:
        image: anything that `read_image` accepts.
        name: name of an image without a path, for messages.
        background: colour behind transparent pixels, 0 to 255.
        matte: remove the background of an image without transparency; see `remove_background`.

    Returns:
        PIL image, mode RGB, of any size.

    Raises:
        ImageError: the image cannot be read, its shape, dtype or range is not accepted, or rembg is not installed.
    """
    return flatten(read_image(image, name=name), background=background, matte=matte)


def flatten(image: Image.Image, *, background: Colour = WHITE, matte: bool = False) -> Image.Image:
    """Composite an image that `read_image` returned over a background, as `load_image` does."""
    if matte and image.mode == "RGB":
        image = remove_background(image)
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def remove_background(image: Image.Image) -> Image.Image:
    """Remove the background of an RGB image with rembg, which downloads its network at the first call.

    Returns:
        The image in mode RGBA, transparent where the background was.

    Raises:
        ImageError: rembg is not installed.
    """
    try:
        rembg = importlib.import_module("rembg")
    except ImportError:
        raise ImageError("matte: expected rembg, which is not installed: pip install gafext[matte]") from None
    return rembg.remove(image).convert("RGBA")


def background_spread(image: Image.Image) -> float:
    """Measure how far a portrait's background is from one colour.

    The background is taken to be the border of the central square, a sixteenth of its side wide: the top, and the
    upper half of the left and the right, where no shoulders are.

    Args:
        image: RGB image of any size.

    Returns:
        Mean over the border's pixels of the largest difference of a channel from its median, 0 to 255; see
        `MAX_BACKGROUND_SPREAD`.
    """
    pixels = np.asarray(_centre_square(image).resize((32, 32), Image.Resampling.BOX), dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[2:16, [0, 1, -2, -1]].reshape(-1, 3)])
    return float(np.abs(border - np.median(border, axis=0)).max(axis=1).mean())


def load_images(
    images: Sequence[ImageLike] | np.ndarray | Tensor | Image.Image,
    *,
    count: int,
    name: str,
    background: Colour = WHITE,
) -> list[Image.Image]:
    """Load one upright RGB image per camera.

    Args:
        images: a list of anything that `load_image` accepts, an array [V,H,W,C] or a tensor [V,C,H,W]; for one
            camera also a single image.
        count: number of cameras, V.
        name: name of the argument, for errors.
        background: colour behind transparent pixels, 0 to 255.

    Returns:
        V PIL images, mode RGB, of any size.

    Raises:
        ImageError: an image is not accepted; the message says which.
        ValueError: the number of images is not `count`.
    """
    items = image_list(images)
    if len(items) != count:
        raise ValueError(f"{name}: expected {count}, one per camera, got {len(items)}")
    return [load_image(item, name=f"{name}[{index}]", background=background) for index, item in enumerate(items)]


def image_list(images: Any) -> list[Any]:
    """List what `load_images` accepts, without loading it: a single image is a list of one."""
    stacked = isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4
    return list(images) if stacked or isinstance(images, (list, tuple)) else [images]


def to_square_tensor(images: Sequence[Image.Image], size: int) -> Tensor:
    """Crop the centre square of RGB images and resize it by Lanczos resampling.

    Args:
        images: V RGB images of any sizes.
        size: side in pixels.

    Returns:
        [V,3,size,size] float32 in [0,1].
    """
    fitted = [_centre_square(image).resize((size, size), Image.Resampling.LANCZOS) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))  # [V,size,size,3]
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def crop_square(image: Image.Image, *, x: float, y: float, side: float) -> Image.Image:
    """Cut a square out of an RGB image; beyond the image's border, its outermost pixels are repeated.

    Args:
        image: RGB image of any size.
        x, y: centre of the square, in pixels from the top left corner.
        side: of the square, in pixels.
    """
    length = max(MIN_SIDE, round(side))
    left, top = round(x - length / 2), round(y - length / 2)
    rows = np.arange(top, top + length).clip(0, image.height - 1)
    columns = np.arange(left, left + length).clip(0, image.width - 1)
    return Image.fromarray(np.asarray(image)[rows[:, None], columns])


def to_numpy(images: Tensor) -> np.ndarray:
    """Convert images [V,3,H,W] in [0,1] to diffusers' output_type="np": array [V,H,W,3] float32, clamped."""
    return images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images [V,3,H,W] in [0,1] to diffusers' output_type="pil": clamped, rounded to 8 bits."""
    return [Image.fromarray(image) for image in (to_numpy(images) * 255).round().astype(np.uint8)]


def _read_file(path: Path) -> Image.Image:
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ImageError(f"{path}: expected an image file, got {got}")
    try:
        with _open(path) as file:
            return _upright(file, str(path))
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # up to this number Pillow only warns
        raise ImageError(f"{path}: expected at most {limit} pixels, cannot be read ({error}); scale it down") from None
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError) as error:  # ValueError: a PNG with more text than Pillow takes
        raise ImageError(f"{path}: expected an image file, but it cannot be read ({error})") from None


def _open(path: Path) -> Image.Image:
    """Open a file with Pillow, or with pillow-heif if it is a HEIF container, such as a HEIC photo of a phone."""
    try:
        return Image.open(path)
    except Image.UnidentifiedImageError:
        with path.open("rb") as file:
            if file.read(8)[4:] != b"ftyp":
                raise
    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        raise ImageError(
            f"{path}: expected an image that Pillow reads, got HEIF (HEIC), which needs: pip install pillow-heif"
        ) from None
    try:
        return pillow_heif.open_heif(path).to_pillow()  # upright: it applies the orientation itself
    except Exception as error:  # of libheif: ValueError, EOFError, RuntimeError, ...
        raise ImageError(f"{path}: expected an image, but it cannot be decoded ({error})") from None


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _upright(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) < MIN_SIDE:
        raise ImageError(
            f"{name}: expected at least {MIN_SIDE} x {MIN_SIDE} pixels, got {image.width} x {image.height}"
        )
    try:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's photo with a depth map or a twin
            warnings.warn(f"{name}: only the first of {getattr(image, 'n_frames', 2)} frames is used", stacklevel=2)
        image.load()
        image = ImageOps.exif_transpose(image)  # a copy
        profile = image.info.pop("icc_profile", None)  # so that it is applied once
        if image.mode == "La":  # premultiplied: Pillow converts it to nothing but LA
            image = image.convert("LA")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):  # convert() would clip these at 255
            image = _from_array(_sixteen_bits(np.asarray(image)), name)
        if image.has_transparency_data:
            image = image.convert("RGBA")
        elif image.mode not in ("L", "CMYK"):  # the modes besides RGB that have colour profiles of their own
            image = image.convert("RGB")
        if profile:
            image = _to_srgb(image, profile, name)
        opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
        return image if image.mode == "RGBA" and not opaque else image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name}: expected an image, but it cannot be decoded ({error})") from None


def _to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """Convert an image of mode L, RGB, RGBA or CMYK from the colour space of its ICC profile to sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):  # a conversion would change some values by 1
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
        assert converted is not None  # None: converted in place, which was not asked for
        return converted
    except (ImageCms.PyCMSError, OSError, ImportError) as error:  # ImportError: Pillow without LittleCMS
        warnings.warn(f"{name}: its colour profile cannot be used and is ignored ({error})", stacklevel=2)
        return image


def _from_array(image: np.ndarray | Tensor, name: str) -> Image.Image:
    """Convert an array or tensor to a grey, RGB or RGBA image of 8 bits per channel."""
    shape, channels_first = list(image.shape), isinstance(image, Tensor)
    channels = shape[0 if channels_first else -1] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in (1, 3, 4):
        kind = "a tensor [C,H,W]" if channels_first else "an array [H,W,C]"
        raise ImageError(f"{name}: expected {kind} of 1, 3 or 4 channels, or [H,W], got shape {shape}")
    if 0 in shape:
        raise ImageError(f"{name}: expected at least {MIN_SIDE} x {MIN_SIDE} pixels, got shape {shape}")
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        image = np.moveaxis(image, 0, -1) if len(shape) == 3 else image
    pixels = np.ascontiguousarray(_eight_bits(image, name))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)


def _sixteen_bits(pixels: np.ndarray) -> np.ndarray:
    """Return int32 as uint16 where its numbers are: Pillow decodes 16-bit grey to int32 in some file formats."""
    fits = pixels.dtype == np.int32 and 0 <= pixels.min() <= pixels.max() <= 65535
    return pixels.astype(np.uint16) if fits else pixels


def _eight_bits(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels * np.uint8(255)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        return (pixels / 257).round().astype(np.uint8)
    if pixels.dtype.kind != "f":
        raise ImageError(f"{name}: expected uint8, uint16, bool or floating point in [0, 1], got {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ImageError(f"{name}: expected numbers in [0, 1], got NaN or infinity")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_FLOAT_SLACK or high > 1 + _FLOAT_SLACK:
        hint = "pass uint8 for 0 to 255" if high > 2 else "convert [-1, 1] by x / 2 + 0.5"
        raise ImageError(f"{name}: expected floating point in [0, 1], got [{low:.4g}, {high:.4g}]; {hint}")
    return (pixels.clip(0, 1).astype(np.float32) * 255).round().astype(np.uint8)
