"""index.html of an output folder, in headless Chromium."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from gafext.assets import VIEWER
from gafext.cameras import Cameras, arc, on_sphere, orbit
from gafext.output import write_viewer, write_views

SIZE = 256  # the page shows views of this size pixel by pixel


def picture(seed, size=SIZE):
    """A smooth picture that looks like no other: neither turned, nor mirrored, nor of another seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def shown(page, selector):
    """What the page shows in an element, [H,W,3]."""
    page.wait_for_function("[...document.images].every((image) => image.hidden || image.complete)")
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"), np.int16)


def assert_shows(page, selector, image):
    assert np.abs(shown(page, selector) - np.asarray(image, np.int16)).max() <= 1


def caption(page):
    return page.inner_text("#caption")


def view(page):
    return int(caption(page).split()[1].rstrip(":"))


def drag(page, selector, dx, dy=0):
    box = page.locator(selector).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=5)
    page.mouse.up()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four views, portrait and normal maps; the portrait has another shape and is larger."""
    cameras, target = orbit(4, elevation=10), tmp_path_factory.mktemp("viewer") / "views #1?"
    pictures = {"portrait": picture(20).resize((640, 512)), "normal_maps": [picture(10 + view) for view in range(4)]}
    return write_views(target, [picture(view) for view in range(4)], cameras, {"seed": 7}, **pictures)


@pytest.fixture
def opened(page, folder):
    page.goto((folder / "index.html").as_uri())
    return page


def test_views_turn_with_the_mouse_and_the_other_pictures_follow(opened):
    assert_shows(opened, "#view", picture(0))
    assert_shows(opened, "#normals img", picture(10))
    assert caption(opened) == "view 0: azimuth 0°, elevation 10°"
    drag(opened, "#view", -SIZE // 4)  # to the left: the camera moves to the right
    assert caption(opened) == "view 1: azimuth 90°, elevation 10°"
    assert_shows(opened, "#view", picture(1))
    assert_shows(opened, "#normals img", picture(11))
    drag(opened, "#view", SIZE // 2)  # over the end of the circle
    assert caption(opened) == "view 3: azimuth -90°, elevation 10°"
    assert_shows(opened, "#view", picture(3))


def test_arrow_keys_and_slider_turn_too(opened):
    opened.keyboard.press("ArrowRight")
    assert view(opened) == 1
    opened.locator("#turn").focus()
    for expected in (0, 3, 2):
        opened.keyboard.press("ArrowLeft")
        assert view(opened) == expected == int(opened.input_value("#turn"))
    opened.locator("#turn").fill("1")
    assert view(opened) == 1
    assert opened.get_attribute("#turn", "aria-valuetext") == caption(opened) == opened.get_attribute("#view", "alt")
    assert_shows(opened, "#view", picture(1))


def test_a_finger_turns_too(browser, folder):
    context = browser.new_context(has_touch=True, viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto((folder / "index.html").as_uri())
    touch = context.new_cdp_session(page)
    for kind, x in (("touchStart", 200), ("touchMove", 190), ("touchMove", 100), ("touchEnd", None)):
        points = [] if x is None else [{"x": x, "y": 200}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_function("document.getElementById('caption').textContent.startsWith('view 2')")
    context.close()


def test_the_portrait_is_as_large_as_the_views_at_most(opened, folder):
    with Image.open(folder / "portrait.png") as portrait:
        assert portrait.size == (SIZE, round(SIZE * 512 / 640))
        assert_shows(opened, "#portrait img", portrait)


def test_views_that_do_not_go_all_around_stop_at_the_ends_and_follow_their_azimuths(page, tmp_path):
    cameras = arc(3, 90)
    shuffled = cameras.with_poses(cameras.w2c[[1, 2, 0]])  # azimuths 0, 45, -45
    folder = write_views(tmp_path / "views", [picture(view) for view in range(3)], shuffled, {})
    page.goto((folder / "index.html").as_uri())
    assert view(page) == 0
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append(view(page))
    assert seen == [1, 1, 0, 2, 2]
    assert not page.is_visible("#normals") and not page.is_visible("#portrait") and not page.is_visible("#splat")


NASTY = "</script><script>throw Error('run')</script><!-- <b>&amp;\u2028 \udcff"


def test_parameters_are_a_table_and_their_text_does_no_harm(page, tmp_path):
    run = {"seed": 7, "portrait": NASTY, NASTY: 1, "command": {"steps": 2, "out": None}, "sizes": [1, 2]}
    folder = write_views(tmp_path / "views", [picture(0)], orbit(1), run)
    page.goto((folder / "index.html").as_uri())
    table = page.evaluate(
        "[...document.querySelectorAll('#run tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    rows = [["seed", "7"], ["portrait", NASTY], [NASTY, "1"], ["command.steps", "2"], ["command.out", "null"]]
    assert table == [*rows, ["sizes", "[1,2]"]]
    assert page.locator("script").count() == 2 and page.locator("#run b").count() == 0


def test_a_later_page_reads_the_folder(page, folder, tmp_path):
    """With the cameras of the folder's files, and whatever else is there by then."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = (copy / "index.html").read_text()
    assert write_viewer(copy) == copy / "index.html"
    after = (copy / "index.html").read_text()
    assert data(after)["views"][0].keys() == data(before)["views"][0].keys()
    for old, new in zip(data(before)["views"], data(after)["views"], strict=True):
        assert [old[key] for key in ("index", "picture", "azimuth")] == [
            new[key] for key in ("index", "picture", "azimuth")
        ]
        assert np.allclose(old["axes"], new["axes"], atol=1e-6) and np.allclose(old["focal"], new["focal"])
    (copy / "run.json").write_text('{"seed": 8}')
    write_viewer(copy)
    page.goto((copy / "index.html").as_uri())
    assert page.inner_text("#run").split() == ["seed", "8"]


def data(page):
    return json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])


def test_cameras_with_lenses_of_their_own(tmp_path):
    lenses = [[[300, 0, 120], [0, 310, 140], [0, 0, 1]], [[200, 0, 128], [0, 200, 128], [0, 0, 1]]]
    cameras = Cameras(orbit(2).w2c, intrinsics=lenses, size=SIZE)
    folder = write_views(tmp_path / "views", [picture(0), picture(1)], cameras, {})
    first, second = data((folder / "index.html").read_text())["views"]
    assert np.allclose(first["focal"], [300 / SIZE, 310 / SIZE]) and np.allclose(second["focal"], 200 / SIZE)
    assert np.allclose(first["centre"], [120 / SIZE, 140 / SIZE]) and second["centre"] == [0.5, 0.5]


def test_what_is_no_folder_of_views_or_no_gaussians_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="expected 4 views, one per camera, got 0"):
        write_viewer(tmp_path, cameras=orbit(4))
    copy = shutil.copytree(folder, tmp_path / "copy")
    page = (copy / "index.html").read_bytes()
    for wrong in (copy / "points3d.ply", copy / "view_000.png"):
        with pytest.raises(ValueError, match=rf"{wrong.name}: expected Gaussians of 3DGS as a binary .ply file"):
            write_viewer(copy, splat=wrong)
    assert (copy / "index.html").read_bytes() == page and not (copy / "viewer").exists()


def test_the_page_is_small_and_names_no_address(folder):
    template = (VIEWER / "index.html").read_text()
    assert template.count("\n") < 200 and "http" not in template
    assert (VIEWER / "gsplat.min.js").stat().st_size < 1_500_000
    licence = (VIEWER / "gsplat.min.js").read_text()[:2000]
    assert "MIT License" in licence and "Copyright (c) 2023 Dylan Ebert" in licence


def test_cameras_above_the_head_have_angles(tmp_path):
    import torch

    cameras = on_sphere(torch.tensor([0.0, 180.0]), torch.tensor([89.0, -89.0]), 4, 30)
    folder = write_views(tmp_path / "views", [picture(0), picture(1)], cameras, {})
    views = data((folder / "index.html").read_text())["views"]
    assert [(view["azimuth"], view["elevation"]) for view in views] == [(0, 89), (180, -89)]
