"""Operations of gafext: attention, attention across views, GEGLU, GroupNorm and SiLU, 3×3 convolution, linear layers.

Each is a function here and an operation of the same name in `torch.ops.gafext`. The functions validate their arguments
and fall back to PyTorch's operations for inputs that the kernels do not support; `torch.ops.gafext` raises instead.
"""

import torch  # noqa: F401  must come first: the module below links to its libraries and its OpenMP runtime

from gafext import _C  # noqa: F401  registers torch.ops.gafext
from gafext.ops.conv3x3 import conv3x3
from gafext.ops.conv3x3_int8 import conv3x3_int8
from gafext.ops.cross_view_attention import cross_view_attention
from gafext.ops.flash_attention import flash_attention
from gafext.ops.geglu import geglu, geglu_gate
from gafext.ops.geglu_int8 import geglu_int8
from gafext.ops.group_norm_silu import group_norm_silu
from gafext.ops.linear import linear
from gafext.ops.linear_int8 import linear_int8

__all__ = [
    "conv3x3",
    "conv3x3_int8",
    "cross_view_attention",
    "flash_attention",
    "geglu",
    "geglu_gate",
    "geglu_int8",
    "group_norm_silu",
    "linear",
    "linear_int8",
]
