"""Cases of GEGLU's gate at the shapes of GEGLU, against chunk and gelu."""

from __future__ import annotations

from typing import Any

import torch

from gafext.bench.cases import geglu
from gafext.bench.cases.base import Case, Contestant, compiled_form
from gafext.ops import geglu_gate
from gafext.ops.geglu import reference_geglu_gate

shapes = geglu.shapes


def case(rows: int, channels: int, where: str, *, compiled: bool, **options: Any) -> Case:
    inner = 4 * channels
    contestants = [Contestant("gafext", geglu_gate), Contestant("eager", reference_geglu_gate)]
    if compiled:
        contestants.append(compiled_form("eager", reference_geglu_gate))
    return Case(
        op="geglu_gate",
        shape=f"{rows},{2 * inner}->{inner}",
        where=where,
        bound="memory",
        flops=rows * inner,
        inputs=lambda: (torch.randn(rows, 2 * inner, **options),),
        contestants=contestants,
    )
