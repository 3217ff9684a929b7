import pytest
from helpers import ROOT


@pytest.fixture(autouse=True)
def scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that is run
