"""The page of `gafext demo`: as a user meets it, in headless Chromium, and its parts without a browser."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from types import SimpleNamespace
from urllib.request import Request, urlopen

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from gafext import PORTRAIT
from gafext.cli import main
from gafext.integrations import demo

RUN = {"num_views": 2, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
MAX_UPLOAD = 0.1  # megabytes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a demo of the built-in model, started as a user does, and the folder of its temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "gafext", "demo", "--device", "cpu", "--port", port, "--max-upload", MAX_UPLOAD]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield re.findall(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0], temporary
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")]  # torch's cache


@pytest.fixture
def opened(server, page):
    page.set_default_timeout(20_000)
    page.goto(server[0])
    return page


def upload(page, path):
    page.locator("input[type=file]").set_input_files(path)


def fill(page, **values):
    for label, value in values.items():
        page.get_by_label(f"number input for {label}").fill(str(value))
        page.keyboard.press("Tab")


def press(page, name):
    page.get_by_role("button", name=name).click()


def says(page, text):
    page.get_by_test_id("toast-body").get_by_text(text).wait_for()


def test_the_downloaded_folder_is_that_of_generate(opened, tmp_path):
    upload(opened, PORTRAIT)
    fill(opened, Views=2, Steps=2, Guidance=3)
    opened.get_by_label("Seed", exact=True).fill("5")
    press(opened, "Generate")
    opened.locator("button:enabled", has_text="Download .zip").wait_for()
    assert "Step 2 of 2" in opened.inner_text("body") and opened.locator(".grid-wrap img").count() == 2
    with opened.expect_download() as download:
        press(opened, "Download .zip")
    options = ["--views", "2", "--steps", "2", "--guidance", "3", "--seed", "5", "--device", "cpu", "--quiet"]
    assert main(["generate", str(PORTRAIT), *options, "--out", str(tmp_path / "views")]) == 0
    expected = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with zipfile.ZipFile(download.value.path()) as archive:
        got = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    assert got.keys() == expected.keys()
    got.pop("views/run.json")  # that of generate also has the command
    assert {name for name in got if got[name] != expected[name]} <= {"views/index.html"}  # which shows run.json


def test_files_that_are_no_portrait_are_refused_with_the_reason(opened, server, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    upload(opened, tmp_path / "notes.txt")
    says(opened, "notes.txt: expected an image file, but it cannot be read")
    opened.reload()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < MAX_UPLOAD * 2**20
    upload(opened, tmp_path / "huge.png")
    says(opened, "huge.png: expected at most 178956970 pixels")
    opened.reload()
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    upload(opened, tmp_path / "large.png")
    says(opened, "exceed the maximum allowed size")
    assert str(server[1]) not in opened.inner_text("body") and "Traceback" not in opened.inner_text("body")


def test_the_server_refuses_large_files_itself(server):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
    statuses = []
    for size in (1_000, 200_000):
        request = Request(f"{server[0]}gradio_api/upload", body % bytes(size))
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        try:
            statuses.append(urlopen(request).status)
        except OSError as error:
            statuses.append(error.code)  # pyright: ignore[reportAttributeAccessIssue]
    assert statuses == [200, 413]


def test_a_stopped_run_makes_room_for_the_next(opened, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "noise.png")
    upload(opened, tmp_path / "noise.png")
    fill(opened, Views=2, Steps=200)
    press(opened, "Generate")
    says(opened, "image: the background is not plain")  # the pipeline's warning
    opened.get_by_text(re.compile(r"Step \d\d+ of 200")).wait_for()
    press(opened, "Stop")
    fill(opened, Steps=1)
    press(opened, "Generate")
    opened.get_by_text("Step 1 of 1").wait_for()
    opened.locator("button:enabled", has_text="Download .zip").wait_for()


def test_frames_are_the_steps_and_then_the_views(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = demo.frames(pipe, PORTRAIT, **RUN)
    first, second = next(run), next(run)
    assert [first[:2], second[:2]] == [(1, 2), (2, 2)]
    assert [image.size for image in first.images] == [image.size for image in second.images]
    assert np.any(np.asarray(first.images[0]) != np.asarray(second.images[0]))
    last = next(run)
    expected = pipe(PORTRAIT, **{name: RUN[name] for name in RUN if name != "seed"}, generator=5).images
    with zipfile.ZipFile(last.archive) as archive:
        for index, image in enumerate(expected):
            saved = Image.open(io.BytesIO(archive.read(f"views/view_00{index}.png")))
            assert np.array_equal(saved, image) and np.array_equal(Image.open(last.images[index]), image)
    assert list(tmp_path.iterdir()) != [] and next(run, None) is None and list(tmp_path.iterdir()) == []


def test_a_long_run_decodes_few_previews(pipe):
    run = demo.frames(pipe, PORTRAIT, **{**RUN, "num_inference_steps": 40})
    assert sum(next(run).images is not None for _ in range(40)) == 10


@pytest.fixture
def generate(pipe):
    """The function behind the button."""
    return next(each.fn for each in demo.page({"small": pipe}).fns.values() if each.name == "generate")


def test_a_run_waits_for_the_step_of_a_cancelled_one(generate):
    first, second = (generate(None, "small", 2, 2, 3.0, 5, False) for _ in range(2))
    assert [len(next(each)) for each in (first, second)] == [4, 4]  # what the page shows while a run waits
    next(first)
    waiting = threading.Thread(target=lambda: next(second))
    waiting.start()
    waiting.join(timeout=1)
    assert waiting.is_alive()
    first.close()  # as Gradio does when the step is over
    waiting.join(timeout=20)
    assert not waiting.is_alive()


def test_a_random_seed_is_shown_and_another_each_time(generate):
    seeds = [next(generate(None, "small", 2, 2, 3.0, 5, random))[3] for random in (False, True, True)]
    assert seeds[0] == 5 and len(set(seeds)) == 3


def test_errors_of_the_pipeline_are_shown_as_its_own_message(generate):
    import gradio

    run = generate(None, "small", 2, 2, 30.0, 5, False)
    next(run)
    with pytest.raises(gradio.Error) as caught:
        next(run)
    assert caught.value.message.startswith("guidance_scale: expected") and not caught.value.print_exception


def test_the_page_reports_to_nobody(pipe):
    assert not demo.page({"small": pipe}).analytics_enabled


def fails(capsys, *arguments) -> str:
    assert main(["demo", *map(str, arguments)]) == 1
    text = capsys.readouterr().err
    assert text.startswith("gafext: error: ") and text.count("\n") == 1
    return text


def test_a_users_mistakes_are_one_line(capsys, monkeypatch, tmp_path):
    assert "--port: expected 1 to 65535, got 0" in fails(capsys, "--port", 0)
    assert "--max-upload: expected" in fails(capsys, "--max-upload", 0)
    assert "--max-upload: expected" in fails(capsys, "--max-upload", "nan")
    assert str(tmp_path / "no") in fails(capsys, "--model", tmp_path / "no")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "gafext[demo]"' in fails(capsys)


def test_models_are_offered_with_their_families_and_a_taken_port_is_an_error(checkpoint, monkeypatch, capsys):
    offered = []
    page = demo.page
    monkeypatch.setattr(demo, "page", lambda pipelines: offered.extend(pipelines) or page(pipelines))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = fails(capsys, "--model", checkpoint, "--device", "cpu", "--port", port)
    assert f"127.0.0.1:{port}: cannot be listened on" in text
    assert offered == [f"gaf: {checkpoint}"]


def test_a_warning_is_shown_to_whom_it_concerns_alone():
    """An upload is read while another page's portrait is: warnings are recorded for the whole process."""
    shown, entered = {"first": [], "second": []}, threading.Event()

    def read(name, begin):
        gradio = SimpleNamespace(Warning=shown[name].append, Error=RuntimeError)
        begin()
        with demo._messages(gradio, None):
            entered.set()
            time.sleep(0.2)  # the other one enters, unless it has to wait
            warnings.warn(f"of the {name}", stacklevel=1)
            time.sleep(0.1 if name == "first" else 0.4)

    pages = [threading.Thread(target=read, args=arguments) for arguments in (("first", bool), ("second", entered.wait))]
    for page in pages:
        page.start()
    for page in pages:
        page.join()
    assert shown == {"first": ["of the first"], "second": ["of the second"]}
