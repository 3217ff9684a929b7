import io

import numpy as np
import pytest
import torch
from PIL import Image

from gafext.errors import ImageError
from gafext.images import load_image, load_images, to_numpy, to_pil, to_square_tensor

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def quadrants():
    """16 wide and 12 high: red green over blue white."""
    pixels = np.zeros((12, 16, 3), np.uint8)
    pixels[:6, :8], pixels[:6, 8:], pixels[6:, :8], pixels[6:, 8:] = RED, GREEN, BLUE, WHITE
    return pixels


def corners(image):
    return [image.getpixel(at) for at in ((1, 1), (image.width - 2, 1), (1, image.height - 2))]


def near(pixel, expected, by=3):
    return all(abs(a - b) <= by for a, b in zip(pixel, expected, strict=True))


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(quadrants()).save(path)
    return path


def test_paths_and_pil_images(png):
    for given in (png, str(png), Image.open(png)):
        image = load_image(given)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), quadrants())


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, [RED, GREEN, BLUE]), (2, [GREEN, RED, WHITE]), (3, [WHITE, BLUE, GREEN]), (6, [BLUE, RED, WHITE])],
)
def test_exif_orientation_is_applied(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    Image.fromarray(quadrants()).resize((160, 120), Image.Resampling.NEAREST).save(path, exif=exif, quality=100)
    image = load_image(path)
    assert image.size == ((120, 160) if orientation == 6 else (160, 120))
    assert all(near(got, want) for got, want in zip(corners(image), expected, strict=True))


def _with_alpha(mode):
    alpha = np.full((12, 16), 255, np.uint8)
    alpha[:6, :8], alpha[:6, 8:] = 0, 128
    image = Image.fromarray(np.dstack([np.zeros((12, 16, 3), np.uint8), alpha]))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_alpha_is_composited_over_white(mode):
    image = load_image(_with_alpha(mode))
    clear, half, opaque = corners(image)
    assert clear == WHITE and near(half, (127, 127, 127)) and opaque == (0, 0, 0)


def test_transparent_colours_become_white(tmp_path):
    palette = Image.fromarray((quadrants()[..., 2] > 0).astype(np.uint8)).convert("P")
    palette.putpalette([0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert corners(load_image(tmp_path / "palette.gif")) == [WHITE, WHITE, BLUE]
    Image.fromarray(quadrants()).save(tmp_path / "key.png", transparency=GREEN)
    assert corners(load_image(tmp_path / "key.png")) == [RED, WHITE, BLUE]


def test_grey_modes():
    ramp = np.repeat(np.linspace(0, 255, 16).round().astype(np.uint8)[None], 12, axis=0)
    expected = np.repeat(ramp[..., None], 3, axis=2)
    deep = ramp.astype(np.uint16) * 257
    wide = deep.astype(np.int32)
    assert Image.fromarray(deep).mode == "I;16" and Image.fromarray(wide).mode == "I"
    for given in (ramp, deep, Image.fromarray(ramp), Image.fromarray(deep), Image.fromarray(wide)):
        assert np.array_equal(np.asarray(load_image(given)), expected)
    assert np.array_equal(np.asarray(load_image(Image.fromarray(ramp.astype(np.float32) / 255))), expected)


def test_16_bit_png_and_tiff(tmp_path):
    deep = np.full((12, 16), 128 * 257, np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert load_image(tmp_path / name).getpixel((0, 0)) == GREY
        Image.fromarray(deep + 200).save(tmp_path / name)  # nearer to 129 than to 128
        assert load_image(tmp_path / name).getpixel((0, 0)) == (129, 129, 129)
    (tmp_path / "big.pgm").write_bytes(b"P5 16 12 65535\n" + deep.astype(">u2").tobytes())
    assert load_image(tmp_path / "big.pgm").getpixel((0, 0)) == GREY


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode):
    image = load_image(Image.fromarray(quadrants()).convert(mode))
    assert all(near(got, want) for got, want in zip(corners(image), (RED, GREEN, BLUE), strict=True))


def test_one_bit():
    stripes = quadrants()[..., 0] > 0
    for given in (stripes, Image.fromarray(stripes), torch.from_numpy(stripes)):
        assert corners(load_image(given)) == [WHITE, (0, 0, 0), (0, 0, 0)]


@pytest.mark.filterwarnings("ignore:.*only the first of 2 frames")
def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0)) == RED


def test_arrays_and_tensors():
    pixels = quadrants()
    for given in (pixels, pixels.astype(np.uint16) * 257, pixels / 255, (pixels / 255).astype(np.float16)):
        assert np.array_equal(np.asarray(load_image(given)), pixels)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (channels_first, channels_first / 255, (channels_first / 255).bfloat16().requires_grad_()):
        assert np.array_equal(np.asarray(load_image(given)), pixels)
    assert np.array_equal(np.asarray(load_image(channels_first.to(torch.uint16) * 257)), pixels)
    assert corners(load_image(pixels[:, ::-1])) == [GREEN, RED, WHITE]
    assert load_image(np.full((9, 9, 1), 0.5)).getpixel((0, 0)) == GREY
    assert load_image(np.full((9, 9), 1.0004)).getpixel((0, 0)) == WHITE
    assert corners(load_image(np.asarray(_with_alpha("RGBA"))))[0] == WHITE
    assert corners(load_image(torch.from_numpy(np.asarray(_with_alpha("RGBA")) / 255).permute(2, 0, 1)))[0] == WHITE


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            np.zeros((3, 12, 16)),
            r"an array \[H,W,C\] of 1, 3 or 4 channels, or \[H,W\], got shape \[3, 12, 16\]",
        ),
        (torch.zeros(12, 16, 3), r"a tensor \[C,H,W\] .* got shape \[12, 16, 3\]"),
        (np.zeros((1, 12, 16, 3)), r"got shape \[1, 12, 16, 3\]"),
        (np.zeros((12, 16, 2)), r"got shape \[12, 16, 2\]"),
        (np.zeros(12), r"got shape \[12\]"),
        (np.zeros((0, 16, 3)), r"at least 1 x 1 pixels, got shape \[0, 16, 3\]"),
        (np.full((9, 9), np.nan), "NaN or infinity"),
        (np.linspace(-1, 1, 81).reshape(9, 9), r"got \[-1, 1\]; convert \[-1, 1\] by x / 2 \+ 0.5"),
        (np.full((9, 9), 200.0), r"got \[200, 200\]; pass uint8 for 0 to 255"),
        (np.zeros((9, 9), np.int64), "expected uint8, uint16, bool or floating point .* got int64"),
        (np.zeros((9, 9), complex), "got complex128"),
        (Image.fromarray(np.full((9, 9), -1, np.int32)), "got int32"),
        (None, "expected a path, PIL image, array or tensor, got NoneType"),
        (Image.new("RGB", (0, 0)), "at least 1 x 1 pixels, got 0 x 0"),
    ],
)
def test_unusable_images(given, text):
    with pytest.raises(ImageError, match=f"portrait: .*{text}"):
        load_image(given, name="portrait")


def test_unreadable_files(tmp_path, png, monkeypatch):
    (tmp_path / "notes.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:900])
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[:-30])
    for name, text in (
        ("gone.png", "expected an image file, got no such file"),
        (".", "expected an image file, got a folder"),
        ("notes.png", "cannot be read .*cannot identify"),
        ("empty.jpg", "cannot be read"),
        ("cut.jpg", "cannot be decoded .*truncated"),
        ("cut.png", "cannot be decoded"),
    ):
        with pytest.raises(ImageError, match=text) as caught:
            load_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ImageError, match=r"face.png: .*cannot be read .*decompression bomb"):
        load_image(png)


def test_load_images_takes_lists_and_stacks(png):
    pixels = quadrants()
    stack = np.stack([pixels, pixels[::-1]])
    lists = ([png, Image.fromarray(pixels[::-1])], (pixels, pixels[::-1]))
    for given in (*lists, stack, torch.from_numpy(stack).permute(0, 3, 1, 2)):
        images = load_images(given, count=2, name="normal_maps")
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(images, stack, strict=True))
    assert len(load_images(png, count=1, name="normal_maps")) == 1


def test_load_images_says_which_and_how_many():
    good = quadrants()
    with pytest.raises(ValueError, match=r"^normal_maps: expected 4, one per camera, got 3$"):
        load_images([good] * 3, count=4, name="normal_maps")
    with pytest.raises(ValueError, match="renders: expected 4, one per camera, got 1"):
        load_images(good, count=4, name="renders")
    with pytest.raises(ImageError, match=r"renders\[1\]: expected .* got shape \[12\]"):
        load_images([good, np.zeros(12)], count=2, name="renders")


def test_to_square_tensor_crops_the_centre():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = RED  # exactly the central square
    tensor = to_square_tensor([Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))], 10)
    assert tensor.shape == (2, 3, 10, 10) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.equal(tensor, torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 10, 10))


def test_to_square_tensor_keeps_orientation_and_exact_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.allclose(to_square_tensor([Image.fromarray(pixels)], 16)[0], expected, atol=1e-6)


def test_to_square_tensor_is_antialiased():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    inside = to_square_tensor([load_image(board)], 16)[..., 2:-2, 2:-2]
    assert (inside - 0.5).abs().max() < 0.01


def test_to_pil_and_to_numpy_are_those_of_diffusers():
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    images = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    pictures = images * 0.5 + 0.5  # theirs are in [-1,1]
    assert np.array_equal(to_numpy(pictures), processor.postprocess(images, output_type="np"))
    assert to_numpy(pictures).dtype == np.float32
    for ours, theirs in zip(to_pil(pictures), processor.postprocess(images, output_type="pil"), strict=True):
        assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_to_pil_rounds_and_inverts_to_square_tensor():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tensor = to_square_tensor([load_image(pixels)], 16)
    assert np.array_equal(np.asarray(to_pil(tensor)[0])[..., 1], pixels)
    assert to_numpy(tensor.bfloat16()).dtype == np.float32


def test_small_pictures_and_rare_modes(tmp_path):
    assert load_image(Image.new("RGB", (3, 1), "red")).getpixel((2, 0)) == (255, 0, 0)
    big_endian = np.full((8, 8), 65535, dtype=">u2")
    assert load_image(big_endian).getpixel((0, 0)) == (255, 255, 255)
    premultiplied = Image.new("LA", (8, 8), (100, 255)).convert("La")
    assert load_image(premultiplied).getpixel((4, 4)) == (100, 100, 100)
