"""The pages of docs/: links lead somewhere, numbers are those of the JSON, pictures are what their commands draw."""

import ast
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from pages import PAGES, blocks, prose, slug

import gafext.ops
from gafext.cameras import PRESETS
from gafext.models.int8 import is_quantized, unsupported_reasons
from gafext.options import parser
from gafext.output import FORMATS

DOCS = ROOT / "docs"
KERNELS = ("flash-attention.svg", "hopper.svg", "cross-view.svg", "winograd.svg")
PAGE = (DOCS / "cameras.md").read_text()


def run_code(page):
    """Run the first block of Python of a page, and return its names."""
    names: dict = {}
    exec(compile(blocks("python", pages=[DOCS / page])[0].code, page, "exec"), names)
    return names


def test_the_cameras_of_the_page_see_the_nose(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    "script, argument, drawn",
    [("draw_cameras.py", "cameras.svg", ["cameras.svg"]), ("draw_kernels.py", ".", [f"inside/{n}" for n in KERNELS])],
)
def test_drawings_are_drawn(script, argument, drawn, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra dev")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / argument)])
    runpy.run_path(str(DOCS / script), run_name="__main__")
    for name in drawn:
        ours, new = (re.findall(r"<!-- (.+?) -->", p.read_text()) for p in (DOCS / name, tmp_path / Path(name).name))
        assert len(new) > 10 and new == ours


def test_the_signatures_are_the_real_ones():
    documented = re.findall(r"^gafext\.ops\.(\w+)\((.*?)\)", (DOCS / "operations.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in documented) == sorted(gafext.ops.__all__)
    for name, parameters in documented:
        real = inspect.signature(getattr(gafext.ops, name))
        plain = real.replace(
            parameters=[p.replace(annotation=inspect.Parameter.empty) for p in real.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
        assert str(plain) == f"({parameters})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, headings), link


@pytest.fixture(scope="module")
def fill():
    return runpy.run_path(str(DOCS / "fill.py"))


def test_the_numbers_are_those_of_the_json(fill, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fill.py", "--check"])
    assert fill["main"]() == 0, capsys.readouterr()


def test_another_number_is_noticed(fill):
    known, page = fill["values"](), (DOCS / "memory.md").read_text()
    assert fill["filled"](page, known) == page
    changed = page.replace("0.83 GiB", "0.84 GiB")
    assert changed != page and fill["filled"](changed, known) == page
    with pytest.raises(KeyError, match="no_such_value"):
        fill["filled"]("<!--=no_such_value-->1<!--/-->", known)


def test_no_line_of_a_paragraph_begins_with_a_marker(fill):
    """GitHub would show that line as HTML."""
    for page in fill["PAGES"]:
        for match in fill["MARKER"].finditer(page.read_text()):
            assert "\n" in match[2] or match.string[match.start() - 1] != "\n", (page, match[1])


def test_no_sentence_is_said_twice():
    said: dict = {}
    for page in PAGES:
        text = re.sub(r"^(\||#|```).*$|<!--.*?-->", "", prose(page), flags=re.MULTILINE)
        for sentence in re.split(r"(?<=[.:])\s", " ".join(text.split())):
            if len(sentence) > 60:
                assert sentence not in said, (sentence, said[sentence], page)
                said[sentence] = page


def message_templates():
    """Every string of gafext's source, with … for what is filled in."""
    for path in (ROOT / "gafext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_questions_are_headed_by_messages_of_the_source():
    headings = re.findall(r"^## (.*)$", (DOCS / "questions.md").read_text(), re.MULTILINE)
    assert len(headings) > 10 and headings.pop() == "Other questions"
    templates = list(message_templates())
    assert not [heading for heading in headings if not any(heading in template for template in templates)]
