"""A family of checkpoints is one file: found by its presence, and kept in what is saved."""

import json
import shutil

import pytest
import torch
from helpers import edit_json, edit_weights

import gafext
from gafext import families
from gafext.config import UNetConfig

MIRROR = """
from dataclasses import replace
from gafext.config import UNetConfig
from gafext.families.base import Family

class Mirror(Family):
    unet_class_names = frozenset({"MirrorUNet"})
    guidance_scale = 3.0

    def unet_config(self, values, shapes, *, source):
        return replace(UNetConfig.from_dict(values, source=source), family="mirror")

    def key_rule(self, config):
        return lambda key: key.removeprefix("mirror.")

    def poses(self, config, cameras):
        return cameras.c2w[:, :3].flatten(1)

FAMILY = Mirror()
"""


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A family in a file of its own, which is all that gafext gets of it."""
    (tmp_path / "mirror.py").write_text(MIRROR)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    families.families.cache_clear()
    yield
    families.families.cache_clear()


def test_a_family_is_one_file(mirror, checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    edit_json(folder / "unet/config.json", _class_name="MirrorUNet")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    edit_weights(weights, lambda tensors: [tensors.update({f"mirror.{k}": tensors.pop(k)}) for k in list(tensors)])

    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu")
    assert pipe.guidance_scale == 3.0 and pipe.unet.config.family == "mirror"
    cameras = gafext.cameras.orbit(3)
    run = pipe.prepare(gafext.PORTRAIT, cameras, num_inference_steps=1, guidance_scale=1.0, generator=0)
    expected = pipe.unet.class_embedding(cameras.c2w[:, :3].flatten(1))
    torch.testing.assert_close(run.conditions.conditioning.pose_embeds, expected)

    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/unet/config.json").read_text())["family"] == "mirror"
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert families.family_of(again.unet.config) is families.family_of(pipe.unet.config)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"family: expected one of \[.*'gaf', 'imagedream'.*\], got 'mirror'"):
        families.family_of(UNetConfig(family="mirror"))


def test_what_gafext_saved_before_families_had_names():
    assert families.family_of(UNetConfig(cross_view="dense")) is families.families()["imagedream"]
    assert families.family_of(UNetConfig(cross_view="position")) is families.families()["gaf"]
