"""Self-attention over the length of the sequence: time and peak memory of flash and of standard attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gafext.bench.cases import flash_attention
from gafext.bench.cases.base import Case, Contestant
from gafext.ops.flash_attention import reference_flash_attention

LENGTHS = [2**power for power in range(6, 15)]  # 64 to 16384
HEADS = {"cpu": 1, "cuda": 8}


def cases(**options: Any) -> Iterator[Case]:
    """Yield a case per length: gafext, the softmax over a whole matrix of scores, and PyTorch's SDPA.

    Args:
        options: device and dtype.
    """
    for index, length in enumerate(LENGTHS):
        shape = (1, HEADS[options["device"]], length, length, 64)
        case = flash_attention.case(*shape, f"{length} tokens", compiled=False, **options)
        ours, sdpa = (c for c in case.contestants if c.name in ("gafext", "sdpa"))
        on_gpu = options["device"] == "cuda"  # whose contestants all return the heads last
        attention = flash_attention.rows_last(reference_flash_attention) if on_gpu else reference_flash_attention
        standard = Contestant("standard", attention, optional=True)
        case = replace(case, contestants=[ours, standard, sdpa], memory=True)
        if index == 0:  # what libraries set up once belongs to no length
            for contestant in case.contestants:
                contestant.run(*case.inputs())
        yield case
