"""Pictures in a terminal, read back from what a fake terminal was sent."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gafext.watch.terminal import picture_writer

KITTY, ITERM2 = {"TERM": "xterm-kitty"}, {"TERM_PROGRAM": "iTerm.app", "TERM": "xterm-256color"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8))  # 33 kB of base64


def shown(picture, environment):
    terminal = Terminal()
    show = picture_writer(environment, terminal)
    show(picture)
    return terminal.getvalue()


def assert_same(base64_text, picture):
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(base64_text))), picture)


@pytest.mark.parametrize("environment", [KITTY, {"KITTY_WINDOW_ID": "1"}])
def test_kitty_is_sent_chunks(picture, environment):
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", shown(picture, environment))
    assert len(commands) > 2 and max(len(chunk) for _, chunk in commands) == 4096
    assert [keys for keys, _ in commands] == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(commands) - 2), "m=0"]
    assert_same("".join(chunk for _, chunk in commands), picture)


def test_a_small_picture_is_one_chunk():
    commands = re.findall(r"\x1b_G([^;]*);", shown(Image.new("RGB", (2, 2)), KITTY))
    assert commands == ["a=T,f=100,q=2,m=0"]


@pytest.mark.parametrize("environment", [ITERM2, {"LC_TERMINAL": "iTerm2"}, {"TERM_PROGRAM": "WezTerm"}])
def test_iterm2_is_sent_a_file(picture, environment):
    size, data = re.fullmatch(
        r"\n\x1b\]1337;File=inline=1;size=(\d+):([^\a]*)\a\n", shown(picture, environment)
    ).groups()
    assert int(size) == len(base64.b64decode(data))
    assert_same(data, picture)


@pytest.mark.parametrize(
    "environment",
    [{}, {"TERM": "xterm-256color"}, {**KITTY, "TMUX": "socket,1,0"}, {**ITERM2, "TERM": "screen-256color"}],
)
def test_other_terminals_are_sent_nothing(environment):
    assert picture_writer(environment, Terminal()) is None


def test_a_file_is_sent_nothing():
    assert picture_writer(KITTY, io.StringIO()) is None
