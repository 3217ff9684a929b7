"""The measures of generated views, and the lines of `gafext eval`."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import ablated_pipeline

from gafext import heads
from gafext.cameras import orbit
from gafext.cli import main
from gafext.evaluation import Evaluation, Scores, portrait_camera, subjects, table
from gafext.evaluation.measures import consistency, face_psnr, patch_distance, psnr, sharpness, ssim
from gafext.pipeline import MultiViewDiffusionPipeline


@pytest.fixture
def evaluation(pipe):
    return Evaluation(pipe, 1, orbit(2), num_inference_steps=2, upsample="none", guidance_scale=2.0)


def test_psnr_of_known_differences():
    left = torch.full((2, 3, 4, 4), 0.5)
    right = left + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(left, right).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert psnr(left, left).tolist() == [pytest.approx(100)] * 2
    assert psnr(left + 5, torch.ones_like(left)).tolist() == [pytest.approx(100)] * 2  # what is over 1 is shown as 1


def test_ssim_of_known_pictures():
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 32, 32)
    assert ssim(picture, picture).item() == pytest.approx(1, abs=1e-5)
    a, b = torch.full_like(picture, 0.2), torch.full_like(picture, 0.6)
    assert ssim(a, b).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-4)
    assert ssim(picture, 1 - picture).item() < 0
    slightly, more = (picture + amount * torch.randn_like(picture) for amount in (0.05, 0.3))
    assert 1 > ssim(slightly, picture).item() > ssim(more, picture).item() > 0


def test_the_face_alone_is_compared():
    truth, face = torch.full((2, 3, 64, 64), 0.5), torch.zeros(2, 1, 64, 64)
    face[0, :, 20:30, 20:30] = 1
    wrong = truth.clone()
    wrong[:, :, 40:] += 0.4  # not on the face
    wrong[:, :, 19:31, 19:31] += 0.1  # on it, with its margin
    found = face_psnr(wrong, truth, face)
    assert found[0].item() == pytest.approx(20, abs=1e-3) and found[1].isnan()
    wrong[:, :, 19, 19:31] = 0.5  # a twelfth of it is right
    assert face_psnr(wrong, truth, face)[0].item() == pytest.approx(20 - 10 * math.log10(11 / 12), abs=1e-3)


def test_sharpness_is_the_share_of_the_gradients_inside_the_silhouette():
    torch.manual_seed(0)
    truth, alpha = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    alpha[:, :, 8:24, 8:24] = 1
    assert sharpness(truth, truth, alpha) == pytest.approx(1)
    assert sharpness(truth / 2 + 0.25, truth, alpha) == pytest.approx(0.25, abs=1e-4)
    blurred = torch.nn.functional.avg_pool2d(truth, 3, 1, padding=1)
    assert sharpness(blurred, truth, alpha) < 0.3
    white = torch.where(alpha > 0, truth, 1.0)  # the background and the edge to it do not count
    assert sharpness(white, truth, alpha) == pytest.approx(1)
    flat = torch.full_like(truth, 0.5)  # counts little, whatever is made of it
    assert sharpness(torch.cat([truth, flat + 0.1 * truth]), torch.cat([truth, flat]), alpha) < 1.02


def test_patches_tell_blur_from_a_shift():
    who = heads.make_heads(range(4))
    truth = heads.render(who, orbit(1).w2c, 64).rgb[:, 0]
    assert patch_distance(truth, truth) == 0
    assert patch_distance(truth.double(), truth.half()) < 1 and psnr(truth.half(), truth.half())[0] == 100
    blurred = torch.nn.functional.avg_pool2d(truth, 5, 1, padding=2, count_include_pad=False)
    others = heads.render(heads.make_heads(range(4, 8)), orbit(1).w2c, 64).rgb[:, 0]
    shifted = truth.roll(2, -1)
    assert 0 < patch_distance(shifted, truth) < 0.7 * patch_distance(blurred, truth)
    assert psnr(shifted, truth).mean() < psnr(blurred, truth).mean()  # for which PSNR has no eyes
    assert patch_distance(others, truth) > 0
    assert patch_distance(blurred, truth) == patch_distance(blurred, truth)


def test_consistency_compares_the_same_surface_point():
    cameras = orbit(8, elevation=10)
    truth = heads.render(heads.make_heads([1_000_003]), cameras.w2c, 64)
    pictures, depth = truth.rgb[0], truth.depth[0]
    own = consistency(pictures, depth, cameras)
    assert own > 27
    assert consistency(pictures.roll(1, 0), depth, cameras) < own - 8
    tinted = pictures.clone()
    tinted[3] = (tinted[3] - 0.3).clamp(min=0)
    assert consistency(tinted, depth, cameras) < own - 6
    assert consistency(torch.full_like(pictures, 0.5), depth, cameras) > 60
    assert math.isnan(consistency(pictures[:1], depth[:1], orbit(1)))


def test_subjects_are_held_out_and_always_the_same():
    first, second = subjects(2, 32)
    assert first.identity in heads.TEST_IDENTITIES and first.identity != second.identity
    assert torch.equal(subjects(1, 32, first=1)[0].portrait, second.portrait)
    assert portrait_camera(first.identity).c2w[0, 2, 3] > 3.5  # from the front
    with pytest.raises(ValueError, match="heads: expected 1 to"):
        subjects(0, 32)


def test_an_evaluation_may_pass_over_heads(pipe):
    identities = [subject.identity for subject in Evaluation(pipe, 2, orbit(1), first=5).subjects]
    assert identities == list(heads.TEST_IDENTITIES[5:7])


def test_scores_of_the_truth_are_the_best(evaluation):
    truth, codec, copy, mean, nearest = evaluation.baselines()
    assert truth.psnr > 90 and truth.ssim > 0.999 and truth.face > 90
    assert truth.sharpness == pytest.approx(1) and truth.patches == 0
    for other in (codec, copy, mean, nearest):
        assert other.psnr < truth.psnr and other.ssim < truth.ssim and other.face < truth.face and other.patches > 0
    assert copy.name == "copy of the portrait" and mean.name == "mean picture"
    assert nearest.name == "nearest training head" and nearest.psnr > copy.psnr


def test_the_nearest_training_head_of_a_training_head_is_itself(evaluation):
    (subject,) = evaluation.subjects
    who = heads.make_heads([heads.TRAIN_IDENTITIES[17]])
    portrait = heads.render(who, portrait_camera(subject.identity).w2c, 32).rgb[0, 0]
    views = heads.render(who, evaluation.cameras.w2c, 32)
    evaluation.subjects = [replace(subject, portrait=portrait, views=heads.Renders(*(images[0] for images in views)))]
    assert evaluation.baselines()[-1].psnr > 90


def test_no_image_tokens_means_that_the_portrait_does_not_matter(pipe, evaluation):
    other = Evaluation(pipe, 1, orbit(2), num_inference_steps=2, upsample="none", guidance_scale=2.0)
    other.subjects = subjects(1, 32, orbit(2), first=5)
    normals = evaluation.subjects[0].views.normals
    blind = ablated_pipeline(evaluation, "no image tokens")
    for call, same in ((blind, True), (pipe, False)):
        a, b = (each.generate(pipe=call, normals=lambda s: normals)[0] for each in (evaluation, other))
        assert torch.equal(a, b) == same


def test_without_cross_view_attention_the_views_are_apart(pipe, evaluation):
    apart = ablated_pipeline(evaluation, "attn_cv off")
    assert apart.unet.transformer_blocks()[0].attn_cv is None
    assert pipe.unet.transformer_blocks()[0].attn_cv is not None  # the pipeline's own keeps it
    normals = evaluation.subjects[0].views.normals
    changed = torch.stack([normals[0], torch.rand_like(normals[1])])
    for call, same in ((apart, True), (pipe, False)):
        a, b = (evaluation.generate(pipe=call, normals=lambda s, maps=maps: maps)[0] for maps in (normals, changed))
        assert torch.allclose(a[0], b[0], atol=1e-6) == same
        assert not torch.allclose(a[1], b[1], atol=1e-4)


def test_every_line_of_the_ablations(evaluation, monkeypatch):
    calls = []
    evaluation.pipe.guidance_scale = 3.25

    def generate(**changes):
        calls.append(changes)
        return [subject.views.rgb for subject in evaluation.subjects]

    monkeypatch.setattr(evaluation, "generate", generate)
    names = [line.name for line in evaluation.ablations()]
    assert names[:4] == ["no image tokens", "attn_cv off", "zero normals", "wrong cameras"]
    assert {"5 steps", "50 steps", "guidance 1", "guidance 10", "ddim, 10 steps", "dpm++, 25 steps"} <= set(names)
    assert len(calls) == len(names) == len(set(names))
    assert (calls[2]["normals"](evaluation.subjects[0]) == 0.5).all()
    assert torch.equal(calls[3]["cameras"].w2c[1], evaluation.cameras.w2c[0])
    assert calls[4] == {"num_inference_steps": 5}
    pipes = [call["pipe"] for call in calls if "pipe" in call]
    assert len(pipes) == 6 and {each.guidance_scale for each in pipes} == {3.25}


def test_table_has_a_row_per_line():
    lines = [Scores("one", 20.0, 0.5, 19.0, 1.0, 0.0, math.nan), Scores("another", 9.25, 0.125, 8.5, 0.625, 41.7, 30.0)]
    assert table(lines).splitlines()[2].split() == ["another", "9.25", "0.125", "8.50", "0.62", "42", "30.00"]


def test_the_command(checkpoint, tmp_path, capsys):
    numbers, figure = tmp_path / "eval.json", tmp_path / "eval.png"
    arguments = ["--model", checkpoint, "--heads", 1, "--views", 2, "--steps", 1, "--device", "cpu", "--quiet"]
    arguments += ["--upsample", "none", "--json", numbers, "--figure", figure]
    assert main(["eval", *map(str, arguments)]) == 0
    report = json.loads(numbers.read_text())
    assert [line["name"] for line in report["lines"]][-2:] == ["generated", "generated, no normal maps given"]
    assert report["settings"]["steps"] == 1
    assert "codec round trip" in capsys.readouterr().out
    assert figure.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--json", "nowhere/eval.json"), "nowhere/eval.json: expected a file in a folder that can be written"),
        (("--figure", "nowhere/eval.png"), "nowhere/eval.png: expected a file"),
        (("--figure", "eval.psd"), "--figure eval.psd: expected the suffix of a picture"),  # Pillow only reads it
        (("--figure", "eval.pictures"), "--figure eval.pictures: expected the suffix of a picture"),
    ],
)
def test_the_command_checks_first_where_it_is_to_write(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MultiViewDiffusionPipeline, "from_pretrained", None)
    assert main(["eval", *options]) == 1
    assert words in capsys.readouterr().err
