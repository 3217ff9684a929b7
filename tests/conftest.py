"""What all tests share: one thread, and a small pipeline."""

import os

import pytest

# Networks this small run fastest on one thread, above all on a busy machine. Set before torch is imported, and
# inherited by the processes that tests start; tests of threads ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a small multi-view checkpoint; not to be written to."""
    from checkpoints import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def pipe(checkpoint):
    from gafext import MultiViewDiffusionPipeline

    return MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
