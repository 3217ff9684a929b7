"""gafext's operations in the networks of other libraries, diffusers and transformers."""

from gafext.integrations.accelerate import Acceleration, accelerate, restore

__all__ = ["Acceleration", "accelerate", "restore"]
