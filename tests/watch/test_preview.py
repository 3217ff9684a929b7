"""Previews of a run: the colours, and the picture that grows."""

import pytest
import torch
import torch.nn.functional as F
from helpers import normal
from PIL import Image
from small_checkpoints import portrait

from gafext import PORTRAIT, MultiViewDiffusionPipeline
from gafext.cli import main
from gafext.images import load_image, to_square_tensor
from gafext.watch.preview import LatentToRGB, Preview


def test_a_linear_autoencoder_is_inverted():
    latents = normal(1, 4, 16, 16)
    colours = (0.5 + 0.1 * torch.einsum("rc,bchw->brhw", normal(3, 4, seed=1), latents)).clamp(0, 1)
    inverted = LatentToRGB(F.interpolate(colours, scale_factor=4, mode="nearest"), latents)
    assert (inverted(latents) - colours).abs().mean() < 0.01


@pytest.mark.filterwarnings("ignore:.*drawn")
def test_the_colours_of_the_built_in_model_are_about_those_of_its_autoencoder():
    pipe = MultiViewDiffusionPipeline.from_pretrained(device="cpu")
    picture = to_square_tensor([load_image(PORTRAIT)], 128)
    to_rgb = LatentToRGB(picture, pipe.encode(picture))
    latents = pipe.encode(picture.flip(-1))
    expected = F.interpolate(pipe.decode(latents), size=latents.shape[2:], mode="area").clamp(0, 1)
    assert -10 * (to_rgb(latents) - expected).square().mean().log10() > 15


def test_the_picture_grows_by_a_row(tmp_path):
    path = tmp_path / "deep" / "preview.png"
    preview = Preview(path, LatentToRGB(torch.rand(1, 3, 32, 32), normal(1, 4, 8, 8)), every=2)
    heights = []
    for step in range(5):
        latents = normal(3, 4, 8, 8, seed=step)
        assert preview(None, step, 1.0, {"pred_original_sample": latents}) is None
        heights.append(Image.open(path).size if path.is_file() else None)
    assert heights == [None, (192, 64), (192, 64), (192, 128), (192, 128)]
    assert [file.name for file in path.parent.iterdir()] == ["preview.png"]
    with pytest.raises(ValueError, match="preview: expected a whole number of steps above 0, got 0"):
        Preview(path, preview.to_rgb, every=0)


def test_each_new_row_is_shown(tmp_path):
    rows = []
    to_rgb = LatentToRGB(torch.rand(1, 3, 32, 32), normal(1, 4, 8, 8))
    preview = Preview(tmp_path / "preview.png", to_rgb, every=2, show=rows.append)
    for step in range(5):
        preview(None, step, 1.0, {"pred_original_sample": normal(3, 4, 8, 8, seed=step)})
    assert [row.size for row in rows] == [(192, 64)] * 2
    whole = Image.open(tmp_path / "preview.png")
    assert [row.tobytes() for row in rows] == [whole.crop((0, y, 192, y + 64)).tobytes() for y in (0, 64)]


def test_generate_writes_previews_beside_the_folder_and_the_same_views(checkpoint, tmp_path, capsys):
    portrait(0).save(tmp_path / "portrait.png")
    words = ["generate", str(tmp_path / "portrait.png"), "--model", str(checkpoint), "--steps", "4", "--views", "2"]
    words += ["--device", "cpu", "--quiet", "--out"]
    assert main([*words, str(tmp_path / "plain")]) == 0 and len(list(tmp_path.glob("*.preview.png"))) == 0
    assert main([*words, str(tmp_path / "watched"), "--preview", "2"]) == 0
    assert Image.open(tmp_path / "watched.preview.png").size == (128, 128)
    assert len({(tmp_path / name / "view_001.png").read_bytes() for name in ("plain", "watched")}) == 1
    assert main([*words, str(tmp_path / "none"), "--preview", "0"]) == 1
    assert "--preview: expected a whole number of steps above 0, got 0" in capsys.readouterr().err


def test_a_preview_serves_one_run_after_another(tmp_path):
    preview = Preview(tmp_path / "views.png", lambda latents: latents[:, :3].clamp(0, 1), every=2)
    for views in (3, 2):
        for step in range(4):
            preview(None, step, 0.0, {"pred_original_sample": torch.rand(views, 4, 8, 8)})
        with Image.open(tmp_path / "views.png") as written:
            assert written.width == views * written.height // 2  # two rows
    with pytest.raises(ValueError, match="preview: expected the name of a picture, such as views.png, got views"):
        Preview(tmp_path / "views", lambda latents: latents, every=1)
