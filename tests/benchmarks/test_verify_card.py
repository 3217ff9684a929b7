"""Records of verified cards, which gafext doctor reads."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import gafext
from gafext.doctor import cards


@pytest.fixture
def verify(tmp_path, monkeypatch):
    """Runs benchmarks/verify_card.py on a card that PyTorch says it has; gives the record and the table."""
    card = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    table, record = tmp_path / "table.json", tmp_path / "card.json"
    table.write_text('[{"card": "NVIDIA H100"}, {"card": "other", "capability": "8.0", "passed": ["tests"]}]')

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["verify_card.py", *arguments, "--json", str(record), "--table", str(table)])
        runpy.run_path(str(ROOT / "benchmarks/verify_card.py"), run_name="__main__")
        return json.loads(record.read_text()), json.loads(table.read_text())

    return run


def test_a_verified_card_replaces_its_older_record(verify, tmp_path, monkeypatch):
    record, table = verify("--passed", "build", "tests", "--failed", "hopper")
    assert record["card"] == "NVIDIA H100" and record["capability"] == "9.0" and record["failed"] == ["hopper"]
    assert [entry["card"] for entry in table] == ["other", "NVIDIA H100"] and table[1] == record
    monkeypatch.setattr(cards, "VERIFIED_CARDS", tmp_path / "table.json")
    words = cards.verification("NVIDIA H100", "9.0", cards.verified_cards())
    assert words.startswith("verified on this card") and words.endswith("build, tests; failed: hopper")


def test_a_card_whose_tests_failed_leaves_the_table_alone(verify):
    record, table = verify("--passed", "build", "--failed", "tests")
    assert record["failed"] == ["tests"] and table[0] == {"card": "NVIDIA H100"}


def test_its_table_is_the_packages():
    names = runpy.run_path(str(ROOT / "benchmarks/verify_card.py"))
    installed = cards.VERIFIED_CARDS.relative_to(Path(gafext.__file__).parent)
    assert names["TABLE"].resolve() == ROOT / "gafext" / installed
