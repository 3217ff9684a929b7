"""Whether the CUDA kernels were verified on a card: from records alone."""

import json
from pathlib import Path

import gafext
from gafext.doctor.cards import VERIFIED_CARDS, verification, verified_cards

RECORD = {"card": "NVIDIA H100", "capability": "9.0", "date": "2026-12-01", "versions": {}, "failed": ["hopper"]}
RECORD["passed"] = ["tests", "memcheck"]


def test_the_table_is_part_of_the_package_and_holds_records():
    assert VERIFIED_CARDS.is_relative_to(Path(gafext.__file__).parent)
    assert isinstance(json.loads(VERIFIED_CARDS.read_text()), list)
    assert all({"card", "capability", "date", "versions", "passed", "failed"} <= set(card) for card in verified_cards())


def test_a_card_without_a_record_is_not_verified():
    assert "never verified" in verification("NVIDIA H100", "9.0", []) and "emulator" in verification("a", "9.0", [])
    words = verification("Tesla V100", "7.0", [RECORD])
    assert "never verified on a card of compute capability 7.0" in words and "only on NVIDIA H100" in words


def test_a_record_says_what_passed_and_what_failed():
    words = verification("NVIDIA H100", "9.0", [{**RECORD, "date": "2026-11-01"}, RECORD])
    assert words == "verified on this card (2026-12-01): tests, memcheck; failed: hopper"
    assert verification("NVIDIA H200", "9.0", [RECORD]).startswith("verified on another card of compute capability 9.0")


def test_a_record_whose_tests_failed_is_none(tmp_path, monkeypatch):
    records = [RECORD, {**RECORD, "card": "other", "passed": ["memcheck"], "failed": ["tests"]}]
    table = tmp_path / "cards.json"
    table.write_text(json.dumps(records))
    monkeypatch.setattr("gafext.doctor.cards.VERIFIED_CARDS", table)
    assert verified_cards() == [RECORD]
