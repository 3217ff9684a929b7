"""README.md, CONTRIBUTING.md, the pages of docs/ and examples/, as the tests read them."""

import re
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")]
)
_FENCE = re.compile(r"(?:^<!-- ([^\n]+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the comment on the line before it."""

    page: Path
    line: int
    comment: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    """The fenced blocks in these languages, in the order of the pages."""
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1] or "", match[2], match[3])
        for page in pages
        for text in [page.read_text()]
        for match in _FENCE.finditer(text)
        if match[2] in languages
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def slug(heading: str) -> str:
    """The anchor of a heading, on GitHub and in the site."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
