"""Pictures inside a terminal: the escape sequences of kitty and of iTerm2."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

import PIL.Image

_CHUNK = 4096  # characters of base64 in one of kitty's commands, at most
_ITERM2 = ("iTerm.app", "WezTerm")


def picture_writer(
    environment: Mapping[str, str], stream: TextIO | None = None
) -> Callable[[PIL.Image.Image], None] | None:
    """Return what shows a picture in a terminal; None if its environment names none that can, or it is no terminal.

    Args:
        environment: variables such as TERM, KITTY_WINDOW_ID, TERM_PROGRAM and LC_TERMINAL; the terminal is not asked.
        stream: the terminal; None: stderr, where the progress is.

    Source: sw.kovidgoyal.net/kitty/graphics-protocol; iterm2.com/documentation-images.html.
    """
    terminal = sys.stderr if stream is None else stream
    if not terminal.isatty() or "TMUX" in environment or environment.get("TERM", "").startswith("screen"):
        return None  # a multiplexer swallows the sequences
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        encode = _kitty
    elif environment.get("TERM_PROGRAM") in _ITERM2 or environment.get("LC_TERMINAL") == "iTerm2":
        encode = _iterm2
    else:
        return None

    def show(picture: PIL.Image.Image) -> None:
        file = io.BytesIO()
        picture.save(file, "PNG")
        terminal.write(f"\n{encode(file.getvalue())}\n")
        terminal.flush()

    return show


def _kitty(png: bytes) -> str:
    """Transmit and display (a=T) a PNG (f=100); m=1 announces another chunk, and q=2 asks for no reply."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    keys = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    last = len(chunks) - 1
    pairs = enumerate(zip(keys, chunks, strict=True))
    return "".join(f"\x1b_G{key}m={int(index < last)};{chunk}\x1b\\" for index, (key, chunk) in pairs)


def _iterm2(png: bytes) -> str:
    return f"\x1b]1337;File=inline=1;size={len(png)}:{base64.b64encode(png).decode()}\a"
