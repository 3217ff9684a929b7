"""Graphics cards on which the CUDA kernels passed their tests.

`benchmarks/gpu_checklist.sh` runs the tests on a card, and adds a record to verified_cards.json beside this file:
`card`, `capability`, `date`, `versions`, and the steps that `passed` and that `failed`. Who ran it commits the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERIFIED_CARDS = Path(__file__).with_name("verified_cards.json")


def verified_cards() -> list[dict[str, Any]]:
    """Read the records of the cards on which the kernels' tests passed."""
    return [record for record in json.loads(VERIFIED_CARDS.read_text()) if "tests" in record["passed"]]


def verification(card: str, capability: str, records: Sequence[dict[str, Any]]) -> str:
    """Say in a sentence whether the CUDA kernels passed their tests on such a card.

    Args:
        card: its name, as PyTorch gives it.
        capability: compute capability, such as "9.0".
        records: those of `verified_cards`.
    """
    alike = [record for record in records if record["capability"] == capability]
    same = [record for record in alike if record["card"] == card]
    if not alike:
        cards = ", ".join(sorted({record["card"] for record in records}))
        ran = f"only on {cards}" if cards else "on no card yet, but on an emulator alone"
        return f"the CUDA kernels were never verified on a card of compute capability {capability}: they ran {ran}"
    record = max(same or alike, key=lambda record: record["date"])
    where = "this card" if same else f"another card of compute capability {capability}, {record['card']}"
    failed = f"; failed: {', '.join(record['failed'])}" if record["failed"] else ""
    return f"verified on {where} ({record['date']}): {', '.join(record['passed'])}{failed}"
