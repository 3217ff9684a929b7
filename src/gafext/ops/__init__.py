"""The three operations: `flash_attention`, `cross_view_attention`, `geglu`."""

import torch  # noqa: F401  (first: the module below binds to its libraries and to its OpenMP)

from gafext import _C  # noqa: F401  (registers torch.ops.gafext)
from gafext.ops.cross_view_attention import cross_view_attention
from gafext.ops.flash_attention import flash_attention
from gafext.ops.geglu import geglu

__all__ = ["cross_view_attention", "flash_attention", "geglu"]
