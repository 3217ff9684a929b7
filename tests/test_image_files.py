"""Pictures as phones and design tools write them, and portraits with a background."""

import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from gafext.assets import PORTRAIT
from gafext.errors import ImageError
from gafext.images import MAX_BACKGROUND_SPREAD, background_spread, load_image, read_image, to_square_tensor

RED, WHITE, GREY, SKIN = (255, 0, 0), (255, 255, 255), (127, 127, 127), (200, 150, 120)


def near(pixel, expected, by=3):
    return all(abs(a - b) <= by for a, b in zip(pixel, expected, strict=True))


def display_p3_profile():
    """An ICC profile of version 2: P3's primaries adapted to D50, gamma 2.2."""

    def s15(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    description = b"Display P3 of a test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(description)) + description + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1.0, 0.8249),
        **{
            name: b"XYZ \0\0\0\0" + s15(*column)
            for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3_TO_XYZ.T, strict=True)
        },
        **{name: b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(2.2 * 256)) for name in (b"rTRC", b"gTRC", b"bTRC")},
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value
    size = start + len(data)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + s15(0.9642, 1.0, 0.8249) + bytes(128 - 80) + table + data


P3_TO_XYZ = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB_TO_XYZ = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def p3_to_srgb(colour):
    linear = np.linalg.solve(SRGB_TO_XYZ, P3_TO_XYZ @ (np.array(colour) / 255) ** 2.2)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055)
    return tuple((encoded * 255).round().astype(int))


def test_a_display_p3_portrait_keeps_its_colours(tmp_path):
    expected = p3_to_srgb(SKIN)
    assert not near(expected, SKIN, 5)
    image = Image.new("RGB", (16, 12), SKIN)
    for name in ("p3.png", "p3.jpg", "p3.tif"):
        image.save(tmp_path / name, icc_profile=display_p3_profile())
        assert near(load_image(tmp_path / name).getpixel((8, 6)), expected, 4), name  # a JPEG rounds
    assert near(load_image(Image.open(tmp_path / "p3.png")).getpixel((8, 6)), expected, 2)
    half = Image.new("RGBA", (16, 12), (*SKIN, 128))
    half.save(tmp_path / "half.png", icc_profile=display_p3_profile())
    ours = read_image(tmp_path / "half.png").getpixel((8, 6))
    assert near(ours[:3], expected, 2) and ours[3] == 128


def test_a_profile_that_says_srgb_changes_no_bit(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "srgb.png", icc_profile=profile)
    assert np.array_equal(np.asarray(load_image(tmp_path / "srgb.png")), pixels)


def test_a_bad_profile_is_ignored_with_a_warning(tmp_path):
    for profile in (b"no profile", display_p3_profile()[:200]):
        Image.new("RGB", (16, 12), SKIN).save(tmp_path / "bad.png", icc_profile=profile)
        with pytest.warns(UserWarning, match=r"bad.png: its colour profile cannot be used and is ignored") as caught:
            image = load_image(read_image(tmp_path / "bad.png"))
        assert len(caught) == 1
        assert image.getpixel((8, 6)) == SKIN


HEIC = b"\0\0\0\x18ftypheic" + bytes(64)


def test_heic_is_read_by_pillow_heif_if_that_is_installed(tmp_path, monkeypatch):
    """With a stand-in for pillow-heif, whose images carry their profile too."""
    photo = tmp_path / "photo.HEIC"
    photo.write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if not installed
    with pytest.raises(ImageError, match=r"photo.HEIC: .*HEIF .*pip install pillow-heif"):
        load_image(photo)

    def open_heif(path):
        if path != photo:
            raise ValueError("Invalid input: no 'ipco' box")
        image = Image.new("RGB", (16, 12), SKIN)
        image.info["icc_profile"] = display_p3_profile()
        return SimpleNamespace(to_pillow=lambda: image)

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(open_heif=open_heif))
    assert near(load_image(photo).getpixel((8, 6)), p3_to_srgb(SKIN), 2)
    (tmp_path / "cut.heic").write_bytes(HEIC)
    with pytest.raises(ImageError, match="cut.heic: .*cannot be decoded .*ipco"):
        load_image(tmp_path / "cut.heic")


def png_16_bit(channels):
    """A PNG of 16 bits per channel, which Pillow cannot write for more than one channel."""
    height, width, count = channels.shape
    kind = {3: 2, 4: 6}[count]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bits_per_channel(tmp_path):
    deep = np.zeros((6, 8, 4), np.uint16)
    deep[:] = np.array([*SKIN, 255], np.uint16) * 257
    (tmp_path / "rgb.png").write_bytes(png_16_bit(deep[..., :3]))
    assert load_image(tmp_path / "rgb.png").getpixel((4, 3)) == SKIN
    deep[..., 3] = 0
    (tmp_path / "rgba.png").write_bytes(png_16_bit(deep))
    assert load_image(tmp_path / "rgba.png").getpixel((4, 3)) == WHITE


def test_the_colours_of_transparent_pixels_do_not_bleed():
    """Half of each image is transparent, of a hidden green; resizing by a fraction mixes neighbours."""
    pixels = np.zeros((30, 30, 4), np.uint8)
    pixels[:, :17] = (*SKIN, 255)
    pixels[:, 17:] = (0, 255, 0, 0)
    for background in (WHITE, SKIN):
        resized = to_square_tensor([load_image(pixels, background=background)], 11) * 255
        low, high = (np.minimum, np.maximum)
        bounds = low(SKIN, background), high(SKIN, background)
        inside = resized[0, :, :, 1:-1]
        for channel in range(3):
            reach = 0.13 * (bounds[1][channel] - bounds[0][channel]) + 1  # Lanczos overshoots at an edge
            assert inside[channel].min() >= bounds[0][channel] - reach
            assert inside[channel].max() <= bounds[1][channel] + reach


def test_transparency_is_composited_on_the_given_background():
    image = Image.new("RGBA", (16, 12), (0, 255, 0, 0))
    assert load_image(image, background=GREY).getpixel((2, 2)) == GREY
    assert load_image(image).getpixel((2, 2)) == WHITE
    assert read_image(image).mode == "RGBA" and read_image(image).getpixel((0, 0))[3] == 0


def test_an_animation_warns_and_a_phones_pair_of_photos_does_not(tmp_path, recwarn):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "pair.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert near(load_image(tmp_path / "pair.jpg").getpixel((8, 8)), RED)
    assert not recwarn.list
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match=f"{name}: only the first of 2 frames is used"):
            assert near(load_image(tmp_path / name).getpixel((8, 8)), RED)


def test_a_huge_image_names_the_limit(tmp_path, monkeypatch):
    Image.new("RGB", (16, 12)).save(tmp_path / "face.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ImageError, match=r"face.png: expected at most 100 pixels, .*192 pixels.*; scale it down"):
        load_image(tmp_path / "face.png")


def head(background):
    """A dark-haired head and shoulders on a background [64,64,3]."""
    pixels = np.array(background, dtype=np.uint8)
    rows, columns = np.mgrid[:64, :64]
    pixels[(rows - 30) ** 2 + (columns - 32) ** 2 < 18**2] = (60, 40, 30)
    pixels[50:, 6:58] = (20, 30, 90)
    return Image.fromarray(pixels)


def backdrop(low, high):
    """A studio's backdrop, lit from one side."""
    return np.repeat(np.linspace(low, high, 64)[None, :, None], 64, axis=0).repeat(3, axis=2)


def room():
    """Vertical stripes of furniture."""
    return np.random.default_rng(0).integers(0, 256, (1, 8, 3)).repeat(8, axis=1).repeat(64, axis=0)


def test_the_spread_tells_a_plain_background_from_a_busy_one():
    assert background_spread(head(np.full((64, 64, 3), 255))) == 0
    assert background_spread(head(backdrop(140, 220))) < MAX_BACKGROUND_SPREAD
    noise = np.random.default_rng(1).normal(128, 12, (64, 64, 3)).clip(0, 255)
    assert background_spread(head(noise)) < MAX_BACKGROUND_SPREAD
    assert background_spread(load_image(PORTRAIT)) < MAX_BACKGROUND_SPREAD
    assert background_spread(head(room())) > 1.5 * MAX_BACKGROUND_SPREAD


def cut_out(image):
    """What rembg does, here for `head`: the background becomes transparent."""
    image = image.convert("RGBA")
    alpha = (np.asarray(image)[..., 0] < 61) & (np.asarray(image)[..., 1] < 61)
    image.putalpha(Image.fromarray(alpha))
    return image


def test_matte_removes_the_background(monkeypatch):
    portrait = head(room())
    monkeypatch.setitem(sys.modules, "rembg", None)  # as if not installed
    with pytest.raises(ImageError, match=r"matte: .*rembg.*pip install gafext\[matte\]"):
        load_image(portrait, matte=True)
    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=cut_out))
    image = load_image(portrait, matte=True, background=GREY)
    assert image.getpixel((2, 2)) == GREY and image.getpixel((32, 30)) == (60, 40, 30)
    assert load_image(portrait).getpixel((2, 2)) == portrait.getpixel((2, 2))
    transparent = cut_out(portrait)  # a cut-out needs no rembg
    monkeypatch.setitem(sys.modules, "rembg", None)
    assert load_image(transparent, matte=True, background=GREY).getpixel((2, 2)) == GREY


def test_integers_that_are_not_sixteen_bits_are_refused():
    for pixels in (np.full((8, 8, 3), 200, np.int32), torch.full((3, 8, 8), 200, dtype=torch.int32)):
        with pytest.raises(ImageError, match="expected uint8, uint16, bool or floating point"):
            read_image(pixels)
    grey = Image.fromarray(np.full((8, 8), 257 * 200, np.int32))  # mode I, as Pillow decodes 16-bit grey
    assert read_image(grey).getpixel((0, 0)) == (200, 200, 200)


def test_an_opaque_alpha_channel_is_no_transparency(monkeypatch):
    picture = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    assert read_image(picture).mode == "RGB"
    matted = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=lambda image: matted))
    assert load_image(picture, matte=True).getpixel((0, 0)) == (255, 255, 255)
    picture.putpixel((0, 0), (0, 0, 0, 254))
    assert read_image(picture).mode == "RGBA"


def test_a_png_with_too_much_text_is_named(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "text.png", pnginfo=info)
    with pytest.raises(ImageError, match="text.png: expected an image file, but it cannot be read"):
        read_image(tmp_path / "text.png")
