"""gafext: one portrait in, several consistent views of the same head out."""

import os as _os
import sys as _sys
from importlib import machinery as _machinery
from importlib import util as _util
from pathlib import Path as _Path


def _import_installed() -> None:
    """Import the installed package in place of this folder, a clone whose extension is not built."""
    clone = _Path(__file__).resolve().parents[1]
    others = [path for path in _sys.path if _Path(path or _os.curdir).resolve() != clone]
    spec = _machinery.PathFinder.find_spec(__name__, others)
    if spec is None or spec.loader is None or not any(_Path(str(spec.origin)).parent.glob("_C.*.so")):
        raise ImportError(
            f"{clone} holds gafext's source, and its extension is not built: install it with `pip install .`, or with "
            "`pip install -e .` to work on it (CONTRIBUTING.md)"
        )
    _sys.modules[__name__] = module = _util.module_from_spec(spec)
    spec.loader.exec_module(module)


try:
    if _util.find_spec("gafext._C") is None:  # Python was started in a clone, and finds this folder first
        _import_installed()
    else:
        from gafext import cameras, ops
        from gafext.assets import PORTRAIT
        from gafext.integrations import accelerate, restore
        from gafext.models.clip import CLIPVisionEncoder
        from gafext.models.unet import MultiViewUNet
        from gafext.models.vae import AutoencoderKL
        from gafext.pipeline import MultiViewDiffusionPipeline, MultiViewOutput
        from gafext.schedulers import DDIMScheduler
        from gafext.upsampler import LatentUpsampler
        from gafext.versions import version

        __version__ = version()
except Exception:
    if _sys.argv[1:2] != ["doctor"]:  # `gafext doctor` imports them again, and says what is wrong and what to do
        raise

__all__ = [
    "PORTRAIT",
    "AutoencoderKL",
    "CLIPVisionEncoder",
    "DDIMScheduler",
    "LatentUpsampler",
    "MultiViewDiffusionPipeline",
    "MultiViewOutput",
    "MultiViewUNet",
    "accelerate",
    "cameras",
    "ops",
    "restore",
]
