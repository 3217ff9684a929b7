"""unCLIP's class labels against diffusers' normalizer and noise schedule."""

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from helpers import edit_json, max_abs_diff, randomized

from gafext.errors import CheckpointError
from gafext.models.image_normalizer import ImageNormalizer
from gafext.schedulers import DDIMScheduler


@pytest.fixture
def folder(tmp_path):
    randomized(StableUnCLIPImageNormalizer(10), seed=1).save_pretrained(tmp_path)
    # As if embeddings were noised a lot already at level 0, so that the noise counts.
    diffusers.DDPMScheduler(beta_start=0.3, beta_end=0.4).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_labels_are_diffusers(folder):
    embeds, noise = torch.randn(3, 10), torch.randn(3, 10)
    theirs = StableUnCLIPImageNormalizer.from_pretrained(folder)
    schedule = diffusers.DDPMScheduler.from_pretrained(folder)
    noised = theirs.unscale(schedule.add_noise(theirs.scale(embeds), noise, torch.zeros(3, dtype=torch.long)))
    ours = ImageNormalizer.from_pretrained(folder)(embeds, noise, DDIMScheduler.from_pretrained(folder).alphas_cumprod)
    assert max_abs_diff(ours[:, :10], noised) < 1e-5
    assert ours[:, 10:].tolist() == [[1.0] * 5 + [0.0] * 5] * 3
    assert (ours[:, :10] - embeds).abs().max() > 0.1


def test_a_width_that_cannot_be_is_named(folder):
    edit_json(folder / "config.json", embedding_dim=0)
    with pytest.raises(CheckpointError, match="embedding_dim=0: expected 1 to 65536"):
        ImageNormalizer.from_pretrained(folder)
