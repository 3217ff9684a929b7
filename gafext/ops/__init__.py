"""The operations that gafext brings along: flash attention, cross-view attention, GEGLU, GroupNorm, 3×3 convolution,
linear layers.

Each is a function here and, under the same name, an operation of `torch.ops.gafext`. The functions check their
arguments and hand what the kernels cannot serve to PyTorch's own operations; `torch.ops.gafext` raises instead.
"""

import torch  # noqa: F401  first: the module below binds to its libraries and to its OpenMP runtime

from gafext import _C  # noqa: F401  registers torch.ops.gafext
from gafext.ops.conv3x3 import conv3x3
from gafext.ops.cross_view_attention import cross_view_attention
from gafext.ops.flash_attention import flash_attention
from gafext.ops.geglu import geglu, geglu_gate
from gafext.ops.group_norm_silu import group_norm_silu
from gafext.ops.linear import linear

__all__ = ["conv3x3", "cross_view_attention", "flash_attention", "geglu", "geglu_gate", "group_norm_silu", "linear"]
