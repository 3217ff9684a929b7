"""Python started in a clone without a build: the installed package is imported, or one line says how to install."""

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from helpers import ROOT


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "gafext", folder / "gafext", ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"))
    return folder


def test_specialisations_in_headers_are_inline():
    """Clang gives a constexpr one external linkage, and the sources that include it do not link."""
    headers = [path for path in (ROOT / "csrc").rglob("*.*h") if path.suffix in (".h", ".cuh")]
    assert len(headers) > 20
    assert not [path.name for path in headers if re.search(r"template <>\nconstexpr", path.read_text())]


def test_without_an_installed_package_one_line_names_the_commands(clone):
    done = run("-S", "-c", "import gafext", folder=clone)  # -S: no site-packages
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: {clone.resolve()} holds gafext's source")
    assert "`pip install .`" in message and "`pip install -e .`" in message


def test_the_installed_package_is_imported(clone):
    done = run("-c", "import gafext, gafext._C as c; print(gafext.__file__); print(c.__file__)", folder=clone)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert [file.name.partition(".")[0] for file in files] == ["__init__", "_C"]
    assert not [file for file in files if file.is_relative_to(clone.resolve())]


def test_the_installed_command_line_runs(clone):
    done = run("-m", "gafext", "info", folder=clone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("versions:") and "instruction_set" in done.stdout


def test_an_older_installed_version_is_imported(clone, tmp_path):
    """One whose modules differ from the clone's: nothing of the clone may be mixed into it."""
    package = tmp_path / "gafext"
    package.mkdir()
    (package / "__init__.py").write_text("from gafext import old\n__version__ = old.VERSION\n")
    (package / "old.py").write_text("VERSION = '0.0.1'\n")
    (package / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    code = "import gafext; print(gafext.__version__, gafext.__file__)"
    done = run("-S", "-c", code, folder=clone, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0.1", str(package / "__init__.py")]
