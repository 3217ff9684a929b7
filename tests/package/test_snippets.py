"""Every block of Python and Bash in README.md, CONTRIBUTING.md, docs/ and examples/ runs, under one rule:

- The names in it stand for small files: `stand_ins` makes them. `steps` become 2 at most.
- After `<!-- not run: REASON -->` Python is only compiled, and `gafext` only parses its options. Blocks with a name, as
  `<!-- generate -->`, have a test of their own in test_readme.py or tests/training.
- Of commands that install, train or measure, what they name has to exist: files, extras, options.
"""

import re
import shlex
from pathlib import Path

import diffusers
import pytest
from helpers import ROOT
from pages import PAGES, blocks, prose
from small_checkpoints import (
    portrait,
    save_checkpoint,
    save_upsampler,
    stock_clip,
    stock_pipeline,
    stock_unet,
    stock_vae,
)

from gafext.cli import main
from gafext.options import parser

_OPTIONAL = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", _OPTIONAL, re.MULTILINE))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The files that snippets name."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for index, name in enumerate(("portrait.jpg", "portrait.png", "ann.jpg", "ben.jpg", "people/cat.jpg")):
        (folder / name).parent.mkdir(exist_ok=True)
        portrait(index).save(folder / name)
    save_checkpoint(folder / "my-checkpoint")
    stock_pipeline("sd21", folder).save_pretrained(folder / "stable-diffusion")
    parent = folder / "stable-diffusion-2-1"
    stock_unet().save_pretrained(parent / "unet")
    stock_vae(seed=None).save_pretrained(parent / "vae")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(parent / "scheduler")
    stock_clip(seed=None).save_pretrained(folder / "vit-h-14")
    save_upsampler(folder / "sd-x2-latent-upscaler")
    return folder


@pytest.fixture
def inside(stand_ins, tmp_path, monkeypatch):
    """A new folder with the stand-ins, as the current one."""
    for path in stand_ins.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(code):
    """The commands of a block, as lists of words."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.match(r"\w+=", command[0]):
                command.pop(0)
            yield command


def of_gafext(command):
    """The arguments of `gafext`, also in `python -m gafext` and behind torchrun; None for other programs."""
    if Path(command[0]).name == "gafext":
        return command[1:]
    return command[command.index("gafext") + 1 :] if command[1:2] and "gafext" in command[1:-1] else None


def in_two_steps(arguments):
    """`gafext generate` with no more than two steps."""
    if arguments[0] != "generate":
        return arguments
    at = arguments.index("--steps") if "--steps" in arguments else len(arguments)
    return [*arguments[:at], *arguments[at + 2 :], "--steps", "2", "--quiet"]


def assert_names_exist(command):
    """Fail if a command that is not run names a file, an extra or an option that is not there."""
    program, words = Path(command[0]).name, command[1:]
    if program in ("python", "python3") and words[:2] == ["-m", "venv"]:
        return
    if program == "pip":
        assert words[0] == "install"
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for found in extras for extra in found.split(",")} <= EXTRAS
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()
    elif program == "pytest":
        assert all((ROOT / word).is_file() for word in words if "/" in word)
    elif program in ("source", "pre-commit", "mkdocs", "tensorboard"):
        return
    else:
        script = ROOT / (words.pop(0) if program in ("python", "python3") else command[0])
        assert script.is_file(), f"there is no program {script}"
        known = "".join(path.read_text() for path in script.parent.glob(f"*{script.suffix}"))
        options = {word for word in words if word.startswith("--")}
        assert not [option for option in options if not re.search(rf"{option}\b", known)]


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands(block, inside, capsys):
    for command in commands(block.code):
        arguments = of_gafext(command)
        if arguments is None:
            assert_names_exist(command)
        else:
            parser().parse_args(arguments)
            if not block.comment:
                assert main(in_two_steps(arguments)) == 0, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # the portraits are noise
@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(block, inside):
    code = re.sub(r"(num_inference_steps=)\d+", r"\g<1>2", block.code)
    compiled = compile("\n" * block.line + code, str(block.page), "exec")
    if not block.comment:
        exec(compiled, {})


def test_comments_are_known():
    comments = {block.comment for block in blocks("bash", "python") if not block.comment.startswith("not run: ")}
    assert comments <= {"", "generate", "test", "accelerate", "train"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences(page):
    """Their options exist, and their values are possible."""
    for text in re.findall(r"`(gafext [a-z]+[^`…]*)`", prose(page)):
        words = shlex.split(text.replace("\n", " "))[1:]
        needed = {"assemble": ["--out", "DIR", "--parent", "DIR"], "train": ["DATA"]}.get(words[0], [])
        parser().parse_args([*words, *needed])
