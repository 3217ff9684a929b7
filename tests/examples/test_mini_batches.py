"""What a batch of the built-in model's training holds: heads, cameras, portraits, noise levels, and who sees what."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gafext import AutoencoderKL, MultiViewUNet, heads
from gafext.cameras import Cameras, orbit
from gafext.training.denoiser import Blindfold


def test_cameras_are_those_of_the_command(scripts):
    random = torch.Generator().manual_seed(0)
    views = scripts["data"].view_cameras(500, 8, random)
    cameras = Cameras(views.flatten(0, 1), 30)
    places = cameras.c2w[:, :3, 3].unflatten(0, (500, 8))
    assert places.norm(dim=-1).min() > 3.6 and places.norm(dim=-1).max() < 4.5
    for w2c, place in zip(views[:50].flatten(0, 1), places[:50].flatten(0, 1), strict=True):
        radius = place.norm().item()
        elevation, azimuth = math.asin(place[1] / radius), math.atan2(place[0], place[2])
        alike = orbit(1, math.degrees(elevation), radius, azimuth_start=math.degrees(azimuth))
        assert torch.allclose(w2c.float(), alike.w2c[0], atol=1e-5)
    usual = (views - orbit(8).w2c).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert 0.03 < usual.float().mean() < 0.2  # the command's own orbit, among others
    assert (places[:, :, 2] < -3).any(dim=1).float().mean() > 0.5  # most see the back of the head
    portraits = Cameras(scripts["data"].portrait_cameras(200, random)[:, 0], 30).c2w[:, :3, 3]
    assert (portraits[:, 2] > 3.3).all()


def test_only_training_identities_are_drawn(scripts, monkeypatch):
    drawn = []
    monkeypatch.setattr(heads, "make_heads", lambda numbers, device: drawn.append(numbers))
    for step in range(20):
        scripts["data"].draw_heads(50, scripts["data"].generator(0, step), "cpu")
    drawn = torch.cat(drawn).tolist()
    assert set(drawn) <= set(heads.TRAIN_IDENTITIES) and len(set(drawn)) > 990


def test_some_portraits_look_like_photographs(scripts):
    random = scripts["data"].generator(0, 0)
    taken = heads.render(
        scripts["data"].draw_heads(40, random, "cpu"), scripts["data"].portrait_cameras(40, random), 32
    )
    plain, alpha = taken.rgb[:, 0], taken.alpha[:, 0]
    made = scripts["data"].photographic(plain, alpha, random)
    assert made.shape == plain.shape and made.min() >= 0 and made.max() <= 1
    changed = (made - plain).abs().flatten(1).amax(1) > 0.02
    assert 10 <= changed.sum() <= 30 and torch.equal(made[~changed], plain[~changed])
    corners = made[changed][:, :, :3, :3].flatten(1).mean(1)
    assert (corners < 0.9).sum() >= 5  # a background that is not white
    colours = ((plain - made) * (alpha > 0.9)).sum(dim=(2, 3)) / (alpha > 0.9).sum(dim=(2, 3))
    assert 0.02 < colours[changed].abs().mean() < 0.3  # but still that person


def test_the_face_counts_more(scripts):
    face = torch.zeros(1, 1, 64, 64)
    face[:, :, 16:24, 16:24] = 1
    weights, most = scripts["data"].face_weights(face, 8), scripts["data"].FACE_WEIGHT
    assert weights.shape == (1, 1, 8, 8) and weights[0, 0, 2, 2] == 1 + most
    assert weights[0, 0, 5, 5] == 1 and weights[0, 0, 3, 2] == 1 + most / 8  # the margin, a pixel wide


def test_the_pool_grows_and_then_drops_the_oldest(scripts):
    def pool(*numbers):
        x = torch.tensor(numbers, dtype=torch.float32)
        return scripts["unet"].Pool(x.view(-1, 1), x, x, x, x, x)

    grown = pool(1, 2).enlarged(4)
    assert grown.count == 2
    for number in (3, 4, 5):
        grown.add(pool(number))
    assert grown.count == 4 and grown.normals.tolist() == [5, 2, 3, 4] and grown.latents.shape == (4, 1)


def test_some_views_have_another_shape_in_their_own_colours(scripts):
    unet, drawn, others = scripts["unet"], heads.make_heads([1, 2, 3]), heads.make_heads([7, 8])
    chosen = torch.tensor([True, False, True])
    made = unet.reshaped(drawn, chosen, others)
    expected = heads.cat([others, drawn]).centre[[0, 3, 1]]
    assert torch.equal(made.centre, expected) and not torch.equal(made.centre, drawn.centre)
    assert torch.equal(made.colour, drawn.colour) and torch.equal(made.light, drawn.light)
    w2c = orbit(1).w2c[None].expand(3, 1, 4, 4)
    views, shapes = heads.render(made, w2c, 32), heads.render(others, w2c[:2], 32)
    assert torch.equal(views.normals[[0, 2]], shapes.normals) and not torch.equal(views.rgb[[0, 2]], shapes.rgb)
    assert torch.equal(views.rgb[1], heads.render(drawn, w2c, 32).rgb[1])
    assert unet.reshaped(drawn, torch.zeros(3, dtype=torch.bool), None) is drawn


def test_some_normal_maps_are_of_the_head_that_is_fitted(scripts, monkeypatch):
    unet, portraits = scripts["unet"], torch.rand(50, 3, 8, 8)
    seen = []

    class Fitter:
        def fit(self, portrait):
            seen.append(portrait)
            return heads.make_heads([7])

    monkeypatch.setattr(unet, "NEUTRAL", 0.2)
    monkeypatch.setattr(unet, "FITTED", 0.5)
    source = unet.Source(None, Fitter(), 32, 8)
    chosen, others = unet.approximate(portraits, source, torch.Generator().manual_seed(0))
    fitted = (others.centre == heads.make_heads([7]).centre).flatten(1).all(1)
    neutral = (others.centre == heads.neutral_head().centre).flatten(1).all(1)
    assert chosen.sum() == len(others) and 25 < chosen.sum() < 45 and torch.equal(fitted, ~neutral)
    assert fitted.sum() == len(seen) and 5 <= neutral.sum() <= 16
    wanted = (portraits[chosen][fitted.nonzero()[0, 0]] * 255).round().byte()
    assert torch.equal(torch.from_numpy(np.array(seen[0])).permute(2, 0, 1), wanted)
    monkeypatch.setattr(unet, "NEUTRAL", 0.0)
    monkeypatch.setattr(unet, "FITTED", 0.0)
    assert unet.approximate(portraits, source, torch.Generator())[1] is None


def test_a_view_without_the_portrait_hears_of_it_from_the_others(scripts):
    rung = scripts["rungs"].RUNGS["test"]
    torch.manual_seed(0)
    unet = MultiViewUNet(rung.unet)
    blindfold = Blindfold(unet)
    sample, pose, tokens = torch.randn(2, 16, 16, 16), torch.randn(2, 12), torch.randn(2, 5, 96)
    blindfold.sees = torch.tensor([0.0, 1.0]).view(2, 1, 1)

    @torch.no_grad()
    def change(views):
        """Of both views, when the portrait of all changes."""
        given = {"pose": pose, "num_views": views}
        one, other = (unet(sample, 500, image_embeds=t[: 2 // views], **given) for t in (tokens, 1 - tokens))
        return (one - other).flatten(1).abs().amax(1)

    blind, seeing = change(views=1)
    assert blind == 0 < seeing
    assert (change(views=2) > 0).all()
    unet.eval()
    assert (change(views=1) > 0).all()  # only training blinds views


def test_some_views_see_the_portrait_and_some_do_not(scripts, monkeypatch):
    choose = scripts["unet"].choose_seeing
    monkeypatch.setattr(scripts["unet"], "NO_IMAGE", 0.1)
    monkeypatch.setattr(scripts["unet"], "SOME_IMAGES", 0.5)
    seeing = choose(2000, 4, torch.Generator().manual_seed(0)).sum(1)
    shares = [(seeing == count).float().mean().item() for count in range(5)]
    some = [0.5 * ways / 16 for ways in (1, 4, 6, 4, 1)]
    assert shares == pytest.approx([some[0] + 0.1, *some[1:4], some[4] + 0.4], abs=0.03)
    alone = choose(2000, 1, torch.Generator().manual_seed(0))
    assert (alone == 0).float().mean().item() == pytest.approx(0.1, abs=0.03)  # no other view could tell it


def test_some_heads_are_noise_alone_and_some_have_a_level_per_view(scripts, monkeypatch):
    monkeypatch.setattr(scripts["unet"], "NOISIEST", 0.25)
    monkeypatch.setattr(scripts["unet"], "APART", 0.3)
    times = scripts["unet"].choose_timesteps(4000, 4, 1000, torch.Generator().manual_seed(0))
    same = (times == times[:, :1]).all(1)
    noise = (times == 999).all(1)
    assert noise.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (same & ~noise).float().mean().item() == pytest.approx(0.75 * 0.7, abs=0.03)
    others = times[~noise].float()
    assert others.min() < 20 and others.max() > 980 and others.mean().item() == pytest.approx(500, abs=15)


@pytest.fixture
def source(scripts):
    rung = scripts["rungs"].RUNGS["test"]
    torch.manual_seed(0)
    return scripts["unet"].Source(
        AutoencoderKL(replace(rung.vae, shift_factor=0.0, scaling_factor=1.0)),
        None,
        rung.image_size,
        rung.image_encoder.image_size,
    )


def test_a_batch_is_of_one_portrait_per_head_of_several(scripts, source, tmp_path):
    unet, rung = scripts["unet"], scripts["rungs"].RUNGS["test"]
    heads_drawn = unet.DrawnHeads(source, rung, timesteps=1000, seed=3, out=tmp_path)
    pool = heads_drawn.pool
    assert pool.portraits.shape[:2] == pool.alphas.shape[:2] == (2, unet.PORTRAITS)
    assert len({portrait.sum().item() for portrait in pool.portraits[0]}) == unet.PORTRAITS  # from several cameras
    for step in range(0, 10):
        batch = heads_drawn.draw(step)
        views = unet.VIEWS[step]
        assert batch.latents.shape[:2] == batch.timesteps.shape == (rung.unet_batch // views, views)
        assert batch.portraits.shape == (len(batch.latents), 3, 32, 32)
        again = heads_drawn.draw(step)
        assert torch.equal(batch.timesteps, again.timesteps) and torch.equal(batch.noise, again.noise)
    drawn = torch.cat([heads_drawn.draw(step).portraits for step in (0, 2, 4)])
    plain = scripts["data"].normalized(pool.portraits).flatten(0, 1)
    known = [any(torch.equal(portrait, one) for one in plain) for portrait in drawn]
    assert 0.2 < sum(known) / len(known) < 0.8  # the others look like photographs
