"""The pipeline that needs no download: a small model that `examples/mini` trained, and a portrait for it."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent

MODEL = _ASSETS / "model"
"""A checkpoint folder like any other; its README.md is the model card."""

PORTRAIT = _ASSETS / "portrait.png"
"""A procedural head, identity 1,000,034 of `gafext.heads`, that the built-in model was not trained on."""

NOTICE = (
    "The built-in model is small and was trained on drawn heads alone: of a photograph it makes a cartoon. "
    "For pictures of people, pass a checkpoint."
)


class CartoonWarning(UserWarning):
    """The built-in model knows no people."""
