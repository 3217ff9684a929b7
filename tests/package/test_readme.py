"""The README: one screen, whose two commands do all of the set-up."""

import os
import subprocess
import sys

from helpers import ROOT
from pages import blocks
from small_checkpoints import stock_pipeline

README = ROOT / "README.md"


def block(comment):
    [found] = [block for block in blocks("bash", "python", pages=[README]) if block.comment == comment]
    return found.code


def test_it_is_one_screen():
    assert len(README.read_text().splitlines()) <= 100


def test_the_code_for_pipelines_of_diffusers_changes_them(tmp_path, monkeypatch):
    stock_pipeline("sd21", tmp_path).save_pretrained(tmp_path / "stable-diffusion")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block("accelerate").replace("steps=25", "steps=1"), "README.md", "exec"), names)
    assert names["image"].size == (32, 32) and not names["found"].left_alone


def test_the_first_command_generates(tmp_path):
    """Its last part, that is; `.ci/run` executes the set-up before it, which is the test command's too."""
    commands = block("generate").strip().split(" && ")
    assert commands[:2] == block("test").strip().split(" && ")[:2]
    program, *arguments = commands[-1].split()
    assert program == ".venv/bin/gafext"
    command = [sys.executable, "-m", "gafext", *arguments, "--steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "views" / "view_003.png").is_file() and (tmp_path / "views" / "run.json").is_file()
