"""The batch size that is chosen from the free memory."""

import pytest
import torch

from gafext import MultiViewDiffusionPipeline
from gafext.portraits.batch import SHARE, automatic_batch_size, check_batch_size


@pytest.fixture
def pipe(checkpoint):
    return MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")


def chosen(pipe, monkeypatch, available, **options):
    """The choice on an accelerator with this much memory; the device is a stand-in, on which nothing is computed."""
    monkeypatch.setattr(MultiViewDiffusionPipeline, "device", torch.device("meta"))
    monkeypatch.setattr(MultiViewDiffusionPipeline, "available_bytes", lambda self: available)
    return automatic_batch_size(pipe, None, options)


def test_it_is_as_many_as_the_estimate_lets_in(pipe, monkeypatch):
    size = pipe.unet.config.sample_size

    def needed(portraits, passes=2):
        return pipe.estimate_bytes(portraits=portraits, views=4, passes=passes, size=size, doubled=True) / SHARE

    for count in (1, 2, 4, 8, 16):
        assert chosen(pipe, monkeypatch, 1.0001 * needed(count)) == count
        assert chosen(pipe, monkeypatch, 0.9999 * needed(count)) == max(1, count // 2)
    assert chosen(pipe, monkeypatch, 1e15) == 16 and chosen(pipe, monkeypatch, 0) == 1
    assert chosen(pipe, monkeypatch, 1.0001 * needed(8), num_views=8) == 4
    assert chosen(pipe, monkeypatch, 1.0001 * needed(8, passes=1), guidance_scale=1.0) == 8


def test_it_is_one_on_a_cpu_and_where_the_memory_is_not_known(pipe, monkeypatch):
    assert automatic_batch_size(pipe, None, {}) == 1
    assert chosen(pipe, monkeypatch, None) == 1


def test_other_batch_sizes_are_refused():
    check_batch_size("auto")
    check_batch_size(3)
    for wrong in (0, -1, True, 1.5, "many"):
        with pytest.raises(ValueError, match='--batch: expected "auto" or a whole number above 0, got'):
            check_batch_size(wrong, name="--batch")
