"""What all tests share: one thread, one seed, and a small pipeline."""

import os
import sys

import pytest

# Networks this small run fastest on one thread, above all on a busy machine. Set before torch is imported, and
# inherited by the processes that tests start; tests of threads ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    if processor := os.environ.get("GAFEXT_EMULATED_CPU"):
        from emulated_arm import PROCESSORS, OnArm
        from emulated_cpu import Emulated, emulate_all

        config.emulated_operations = emulate_all(processor, OnArm if processor in PROCESSORS else Emulated)


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def pretend_cpu(monkeypatch):
    """A function that lets operations choose as on another CPU; which kernels run stays the same."""
    import gafext.ops  # noqa: F401

    def pretend(
        instruction_set,
        *,
        multiplies_bfloat16=True,
        multiplies_float16=False,
        bfloat16_pairs=False,
        zen=0,
        int8_products="plain C++",
    ):
        common, linear = (sys.modules[f"gafext.ops.{name}"] for name in ("_common", "linear"))
        monkeypatch.setattr(common, "INSTRUCTION_SET", instruction_set)
        monkeypatch.setattr(common, "MULTIPLIES_BFLOAT16", multiplies_bfloat16)
        monkeypatch.setattr(common, "MULTIPLIES_FLOAT16", multiplies_float16)
        monkeypatch.setattr(common, "BFLOAT16_PAIRS", bfloat16_pairs)
        monkeypatch.setattr(common, "ZEN", zen)
        monkeypatch.setattr(common, "INT8_PRODUCTS", int8_products)
        monkeypatch.setattr(linear, "_HAS_AMX", instruction_set == "amx")

    return pretend


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a small multi-view checkpoint; not to be written to."""
    from small_checkpoints import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def pipe(checkpoint):
    from gafext import MultiViewDiffusionPipeline

    return MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; its driver keeps an event loop in this thread, hence not for the whole session."""
    from browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def page(browser):
    """A page without network; an error on its console fails the test."""
    from browser import open_page

    with open_page(browser) as opened:
        yield opened
