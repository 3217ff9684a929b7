"""Hook of MkDocs: what pages link to outside of docs/ becomes part of the site, so that links work there and on GitHub.

A linked file PATH of the repository is served as repository/PATH. A linked page (.md) is rendered, and its own links
are followed too.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PREFIX = "repository/"
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[#)])")  # relative targets alone: a scheme has a colon


def site_path(path: Path) -> str:
    """Where the site has a file of the repository."""
    return (
        path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else PREFIX + path.relative_to(ROOT).as_posix()
    )


def source_path(uri: str) -> Path:
    return ROOT / uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else DOCS / uri


def linked(page: Path) -> list[Path]:
    """The files that a page links to."""
    targets = (Path(os.path.normpath(page.parent / link)) for link in LINK.findall(page.read_text()))
    return [target for target in targets if target.is_file() and target.is_relative_to(ROOT)]


def on_files(files, config):
    """Add what is linked, and what that links to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    while waiting:
        for target in linked(waiting.pop()):
            uri = site_path(target)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
                if target.suffix == ".md":
                    waiting.append(target)
    return files


def on_page_markdown(markdown, page, **_):
    """Point links at where the site has their targets."""
    here = source_path(page.file.src_uri).parent

    def rewritten(match: re.Match) -> str:
        target = Path(os.path.normpath(here / match[1]))
        if not target.is_file() or not target.is_relative_to(ROOT):
            return match[1]
        return os.path.relpath(site_path(target), os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)
