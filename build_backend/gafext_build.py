"""PEP 517 backend: scikit-build-core, which also finds the torch to build against.

torch cannot stand in pyproject.toml's build requirements: pip would then download a second one (3 GB with CUDA) into
the isolated build environment, whatever the target environment holds. So this backend asks for torch only where the
target environment has none; otherwise it hands the folder of the one that is there to CMake, as GAFEXT_TORCH_DIR.
"""

import importlib.util
import os
import re
import sysconfig
from pathlib import Path

from scikit_build_core import build as _skbuild
from scikit_build_core.build import *  # noqa: F403  (the hooks that need no torch)

_OLDEST = (2, 11)


def _torch_dir():
    """The folder of the torch to build against, or None.

    pip's isolation hides the target environment from sys.path, but sysconfig still says where it lies.
    """
    if given := os.environ.get("GAFEXT_TORCH_DIR"):
        if not _is_usable(Path(given)):
            raise RuntimeError(f"GAFEXT_TORCH_DIR: expected the folder of an installed torch >= 2.11, got {given}")
        return Path(given)
    folders = [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    spec = importlib.util.find_spec("torch")  # without isolation, or the one that was asked for below
    if spec is not None and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0]))
    return next(filter(_is_usable, folders), None)


def _is_usable(folder):
    """Whether the folder is that of an installed torch with the stable ABI that csrc uses."""
    version = folder / "version.py"
    if not (version.is_file() and (folder / "include/torch/csrc/stable/library.h").is_file()):
        return False
    found = re.search(r"""__version__ = ['"](\d+)\.(\d+)""", version.read_text())
    return found is not None and (int(found[1]), int(found[2])) >= _OLDEST


def _torch_requirement():
    return [] if _torch_dir() else ["torch>=2.11"]


def _hand_over_torch():
    folder = _torch_dir()
    if folder is not None:
        os.environ["GAFEXT_TORCH_DIR"] = str(folder)


def get_requires_for_build_wheel(config_settings=None):
    return [*_skbuild.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*_skbuild.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _hand_over_torch()
    return _skbuild.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _hand_over_torch()
    return _skbuild.build_editable(wheel_directory, config_settings, metadata_directory)
