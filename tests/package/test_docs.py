"""The pages of docs/: their code runs, and their pictures are what their commands draw."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from gafext.cameras import PRESETS
from gafext.models.int8 import is_quantized, unsupported_reasons
from gafext.options import parser
from gafext.output import FORMATS

PAGE = (ROOT / "docs" / "cameras.md").read_text()


def run_code(page):
    """Run the one block of Python of a page, and return its names."""
    text = (ROOT / "docs" / page).read_text()
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    return names


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_code("cameras.md")
    u, v, w = names["u"], names["v"], names["w"]
    assert 0 < u / w < 256 and 0 < v / w < 512  # from the subject's left, the nose points to the picture's left
    assert (names["same"].w2c - names["cameras"].w2c).abs().max() < 1e-6 and not names["own"].has_fov


@pytest.mark.skipif(bool(unsupported_reasons(torch.device("cpu"))), reason="needs AVX2")
def test_a_checkpoint_in_8_bits(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my-checkpoint").symlink_to(checkpoint)
    assert is_quantized(run_code("precision.md")["pipe"].unet)


def test_every_name_is_in_the_tables(capsys):
    cells = set(re.findall(r"`([^`]+)`", "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))))
    assert set(PRESETS) | set(FORMATS) <= cells
    with pytest.raises(SystemExit):
        parser().parse_args(["generate", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", PAGE)) <= known


def test_the_drawing_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra dev")
    [name] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)
    assert (ROOT / "docs" / name).is_file()
    monkeypatch.setattr(sys, "argv", ["draw_cameras.py", str(tmp_path / name)])
    runpy.run_path(str(ROOT / "docs" / "draw_cameras.py"), run_name="__main__")
    texts = [re.findall(r"<!-- (.+?) -->", path.read_text()) for path in (tmp_path / name, ROOT / "docs" / name)]
    assert "view 2" in texts[0] and texts[0] == texts[1]
