"""Which torch the build takes, without building."""

import importlib.util
import sys
from types import ModuleType

import pytest
from helpers import ROOT


@pytest.fixture
def backend(monkeypatch):
    skbuild = ModuleType("scikit_build_core")  # not installed here: pip has it in an environment of its own
    skbuild.build = ModuleType("scikit_build_core.build")
    monkeypatch.setitem(sys.modules, "scikit_build_core", skbuild)
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", skbuild.build)
    spec = importlib.util.spec_from_file_location("gafext_build", ROOT / "build_backend" / "gafext_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(folder, version):
    header = folder / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "torch"


@pytest.mark.parametrize(("version", "taken"), [("2.11.0+cpu", True), ("3.0.1", True), ("2.9.0", False)])
def test_the_torch_of_the_target_has_to_be_new_enough(backend, tmp_path, monkeypatch, version, taken):
    monkeypatch.delenv("GAFEXT_TORCH_DIR", raising=False)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda key: str(tmp_path))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    folder = fake_torch(tmp_path, version)
    assert backend._torch_dir() == (folder if taken else None)
    assert backend._torch_requirement() == ([] if taken else ["torch>=2.11"])


def test_a_wrong_folder_is_not_ignored(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("GAFEXT_TORCH_DIR", str(fake_torch(tmp_path / "given", "2.12.0")))
    assert backend._torch_dir() == tmp_path / "given" / "torch"
    for wrong in (tmp_path / "none", fake_torch(tmp_path / "old", "2.10.1")):
        monkeypatch.setenv("GAFEXT_TORCH_DIR", str(wrong))
        with pytest.raises(RuntimeError, match="GAFEXT_TORCH_DIR: expected the folder of an installed torch"):
            backend._torch_dir()
