"""Built-in assets: a small model trained by `examples/mini`, and a portrait."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent

MODEL = _ASSETS / "model"
"""Checkpoint folder of the built-in model; its README.md is the model card."""

PORTRAIT = _ASSETS / "portrait.png"
"""Image of a procedural head, identity 1,000,034 of `gafext.heads`, which is not in the training data."""

VIEWER = _ASSETS / "viewer"
"""Template of the output folder's index.html, and the renderer of Gaussians that it loads."""

NOTICE = (
    "The built-in model is small and was trained on drawn heads alone: of a photograph it makes a cartoon. "
    "For pictures of people, pass a checkpoint."
)


class CartoonWarning(UserWarning):
    """Warning that the built-in model was trained on drawn heads only."""
