"""The README's commands and code, executed."""

import inspect
import os
import re
import subprocess
import sys
import warnings

import pytest
from helpers import ROOT
from small_checkpoints import stock_pipeline

import gafext.ops
from gafext.cli import main

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_quick_start_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict = {}
        for block in blocks("python")[:2]:  # the quick start, and the same call as three methods
            exec(compile(block, "README.md", "exec"), names)
    assert names["out"].images[0].size == names["pipe"](gafext.PORTRAIT, num_inference_steps=1).images[0].size
    names = {path.name for path in (tmp_path / "views").iterdir()}
    assert {*(f"view_00{i}.png" for i in range(4)), "contact_sheet.png", "transforms.json", "run.json"} <= names


def test_the_code_for_pipelines_of_diffusers_runs(tmp_path, monkeypatch):
    stock_pipeline("sd21", tmp_path).save_pretrained(tmp_path / "stable-diffusion")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    [block] = re.findall(r"<!-- accelerate -->\n```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block.replace("steps=25", "steps=1"), "README.md", "exec"), names)
    assert names["image"].size == (32, 32) and not names["found"].left_alone


def test_the_first_command_generates(tmp_path):
    """Its last part, that is; `.ci/run` executes the set-up before it, which is the test command's too."""
    commands = blocks("bash")[0].strip().split(" && ")
    assert commands[:2] == blocks("bash")[1].strip().split(" && ")[:2]
    program, *arguments = commands[-1].split()
    assert program == ".venv/bin/gafext"
    command = [sys.executable, "-m", "gafext", *arguments, "--steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "views" / "view_003.png").is_file() and (tmp_path / "views" / "run.json").is_file()


def test_documented_options_exist(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    documented = set(re.findall(r"gafext generate.*", README))
    options = {word for line in documented for word in line.split() if word.startswith("--")}
    assert {"--model", "--views", "--seed"} <= options
    assert not [option for option in options if option not in text]


def test_the_signatures_are_the_real_ones():
    documented = re.findall(r"^gafext\.ops\.(\w+)\((.*?)\)", README, re.MULTILINE)
    assert sorted(name for name, _ in documented) == sorted(gafext.ops.__all__)
    for name, parameters in documented:
        real = inspect.signature(getattr(gafext.ops, name))
        plain = real.replace(
            parameters=[p.replace(annotation=inspect.Parameter.empty) for p in real.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
        assert str(plain) == f"({parameters})"
