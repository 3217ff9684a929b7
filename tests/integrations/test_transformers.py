"""Models of transformers with gafext's attention, against themselves without."""

import pickle
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from helpers import max_abs_diff, normal
from small_checkpoints import stock_clip, stock_text
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import gafext
from gafext.integrations.transformers import attention_forward

SMALL_TEXT_CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TEXT_CONFIG |= {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98, "max_position_embeddings": 12}
SMALL_VISION_CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VISION_CONFIG |= {"image_size": 64, "patch_size": 16}


def clip():
    return stock_clip({}, kind=CLIPModel, text_config=SMALL_TEXT_CONFIG, vision_config=SMALL_VISION_CONFIG)


def test_clip():
    model = clip()
    ids = torch.tensor([[97, 1, 2, 98], [97, 3, 98, 98]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    inputs = {"input_ids": ids, "pixel_values": normal(2, 3, 64, 64)}
    with torch.no_grad():
        stock, masked = model(**inputs), model(**inputs, attention_mask=mask)
        gafext.accelerate(model)
        assert model.text_model.config._attn_implementation == "gafext"
        for ours, theirs in ((model(**inputs), stock), (model(**inputs, attention_mask=mask), masked)):
            assert max_abs_diff(ours.text_embeds, theirs.text_embeds) <= 1e-5
            assert max_abs_diff(ours.image_embeds, theirs.image_embeds) <= 1e-5
        gafext.restore(model)
        assert model.config._attn_implementation == model.text_model.config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).image_embeds, stock.image_embeds)
    model.set_attn_implementation("eager")
    assert "eager" in gafext.accelerate(model).left_alone[""]


def implementations(model):
    configs = model.config, model.config.text_config, model.config.vision_config
    return tuple(config._attn_implementation for config in configs)


class OuterConfig(PreTrainedConfig):
    sub_configs: ClassVar[dict] = {"clip_config": CLIPConfig}

    def __init__(self, clip_config=None, **options):
        self.clip_config = clip_config
        super().__init__(**options)


class Outer(PreTrainedModel):
    config_class = OuterConfig
    _supports_sdpa = True

    def __init__(self, clip):
        super().__init__(OuterConfig(clip.config))
        self.clip = clip


@pytest.mark.parametrize("nested", [False, True])
def test_each_part_keeps_an_implementation_of_its_own(nested):
    inner = clip()
    outer = Outer(inner) if nested else inner
    outer.set_attn_implementation("sdpa")
    inner.set_attn_implementation({"text_config": "eager"})
    assert implementations(inner) == ("sdpa", "eager", "sdpa")
    left_alone = gafext.accelerate(outer).left_alone
    assert implementations(inner) == ("gafext", "eager", "gafext")
    assert [(path.removeprefix("clip."), "eager" in reason) for path, reason in left_alone.items()] == [
        ("text_model", True)
    ]
    gafext.restore(outer)
    assert implementations(inner) == ("sdpa", "eager", "sdpa")


READ = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model, ids, expected = pickle.load(file)
with torch.no_grad():
    assert torch.equal(model(ids).last_hidden_state, expected)
"""


def test_another_process_reads_an_accelerated_model(tmp_path):
    model, ids = stock_text(), torch.tensor([[97, 1, 2, 98]])
    gafext.accelerate(model)
    (tmp_path / "pickled").write_bytes(pickle.dumps((model, ids, model(ids).last_hidden_state.detach())))
    subprocess.run([sys.executable, "-c", READ, str(tmp_path / "pickled")], check=True)


def test_models_that_cannot_be_set_are_named(monkeypatch):
    monkeypatch.setattr(CLIPModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert "cannot be set" in gafext.accelerate(clip()).left_alone[""]


@pytest.mark.parametrize("case", ["bias", "scale", "dropout", "narrow values", "grouped"])
def test_options(case):
    options = {"bias": {"position_bias": normal(1, 4, 6, 6)}, "scale": {"scaling": 0.7}, "dropout": {"dropout": 0.5}}
    key_heads, value_dim = 2 if case == "grouped" else 4, 8 if case == "narrow values" else 16
    inputs = normal(2, 4, 6, 16), normal(2, key_heads, 6, 16, seed=1), normal(2, key_heads, 6, value_dim, seed=2)
    module, results = nn.Module(), []
    module.num_key_value_groups = 4 // key_heads
    for forward in (attention_forward, sdpa_attention_forward):
        torch.manual_seed(0)
        results.append(forward(module, *inputs, None, **options.get(case, {}))[0])
    assert max_abs_diff(*results) <= 1e-6
