"""CLIPVisionEncoder against transformers, on small checkpoints that transformers itself saves."""

import pytest
import torch
import transformers
from helpers import CLIP_WEIGHTS as WEIGHTS
from helpers import (
    assert_backends_agree,
    assert_lists,
    edit_json,
    edit_weights,
    loaded_by,
    max_abs_diff,
    normal,
    randomized,
    worst_difference,
)
from PIL import Image
from safetensors.torch import load_file
from small_checkpoints import stock_clip
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gafext.config import CLIP_VIT_H_14, CLIPVisionConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.clip import CLIPVisionEncoder

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}


def pixels(config, *, batch=2, seed=0):
    return normal(batch, config.num_channels, config.image_size, config.image_size, seed=seed)


@torch.no_grad()
def difference(ours, theirs, pixel_values):
    expected = theirs(pixel_values, output_hidden_states=True)
    names = {"last_hidden_state": expected.last_hidden_state, "image_embeds": expected.image_embeds}
    return worst_difference(ours(pixel_values), {**names, "penultimate": expected.hidden_states[-2]})


@pytest.fixture
def folder(tmp_path):
    stock_clip(TINY).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "quick_gelu"},
        {"image_size": 30},  # what is beyond whole patches is left out
        {"patch_size": 32, "image_size": 96, "hidden_act": "quick_gelu"},
        {"hidden_size": 80, "num_attention_heads": 2, "image_size": 42},  # heads 40 wide
        {"hidden_size": 160, "num_attention_heads": 2, "projection_dim": 40},  # 80 wide, as in ViT-H
        {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1},
        {"hidden_size": 48, "num_attention_heads": 3, "image_size": 112, "layer_norm_eps": 1e-3},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_transformers(tmp_path, changes, seed):
    theirs = stock_clip(TINY, seed=seed, **changes)
    theirs.save_pretrained(tmp_path)
    ours = CLIPVisionEncoder.from_pretrained(tmp_path)
    assert not ours.training and ours.dtype == torch.float32
    assert difference(ours, theirs, pixels(ours.config, seed=seed)) < 1e-5


def test_every_backend_gives_the_same_states(folder):
    model = CLIPVisionEncoder.from_pretrained(folder)
    assert_backends_agree(model, lambda: model(pixels(model.config)).last_hidden_state, tolerance=1e-5)


def full_clip(*, vision=None, **changes):
    text = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=48,
        eos_token_id=49,
    )
    vision = transformers.CLIPVisionConfig(**{**TINY, **(vision or {})})
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **changes)
    return randomized(CLIPModel(config), seed=5).eval()


@torch.no_grad()
def test_a_full_clip_model(tmp_path):
    theirs = full_clip(projection_dim=20)
    theirs.save_pretrained(tmp_path)
    assert "text_projection.weight" in load_file(tmp_path / WEIGHTS)
    ours = CLIPVisionEncoder.from_pretrained(tmp_path)
    assert ours.config.projection_dim == 20 and ours.config.hidden_size == TINY["hidden_size"]
    pixel_values = pixels(ours.config)
    tower = theirs.vision_model(pixel_values)
    result = ours(pixel_values)
    assert max_abs_diff(result.last_hidden_state, tower.last_hidden_state) < 1e-5
    assert max_abs_diff(result.image_embeds, theirs.visual_projection(tower.pooler_output)) < 1e-5


def test_a_full_model_of_an_older_transformers(tmp_path):
    full_clip(projection_dim=20, vision={"hidden_act": "quick_gelu"}).save_pretrained(tmp_path)
    # OpenAI's ViT-L/14 repeats the vision part as vision_config_dict, which leaves defaults out, and every file
    # of that time holds the settings of text generation.
    part = {key: value for key, value in TINY.items() if key not in ("hidden_act", "projection_dim")}
    generation = {
        "do_sample": False,
        "max_length": 20,
        "num_beams": 1,
        "top_p": 1.0,
        "id2label": {"0": "LABEL_0"},
    }
    generation |= {"torchscript": False, "bos_token_id": None, "temperature": 1.0, "torch_dtype": "float32"}
    edit_json(
        tmp_path / "config.json", vision_config={**part, **generation, "hidden_act": "gelu"}, vision_config_dict=part
    )
    edit_weights(
        tmp_path / WEIGHTS,
        lambda tensors: tensors.update({"vision_model.embeddings.position_ids": torch.arange(5).view(1, -1)}),
    )
    config = CLIPVisionEncoder.from_pretrained(tmp_path).config
    assert config == CLIPVisionConfig(**{**TINY, "projection_dim": 20, "hidden_act": "quick_gelu"})
    assert transformers.CLIPConfig.from_pretrained(tmp_path).vision_config.hidden_act == "quick_gelu"
    edit_json(tmp_path / "config.json", vision_config_dict=None)
    assert CLIPVisionEncoder.from_pretrained(tmp_path).config.hidden_act == "gelu"


def test_published_sizes():
    with torch.device("meta"):
        model = CLIPVisionEncoder(CLIP_VIT_H_14)
    assert sum(parameter.numel() for parameter in model.parameters()) == 632_076_800
    assert len(model.state_dict()) == 520
    assert model.config.num_tokens == 257


def test_what_it_saves_transformers_loads(folder, tmp_path):
    ours = CLIPVisionEncoder.from_pretrained(folder)
    theirs = loaded_by(CLIPVisionModelWithProjection, ours, tmp_path / "saved")
    assert difference(ours, theirs, pixels(ours.config)) < 1e-5


@torch.no_grad()
def test_half_weights_take_float32_images(folder):
    model = CLIPVisionEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    result = model(pixels(model.config))
    assert {value.dtype for value in result} == {torch.bfloat16}


def test_gradients_reach_the_weights(folder):
    model = CLIPVisionEncoder.from_pretrained(folder)
    model(pixels(model.config)).image_embeds.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 28, 42), (1, 3, 56, 56), (1, 4, 28, 28), (3, 28, 28)])
def test_pixel_values_of_a_wrong_shape(folder, shape):
    with pytest.raises(ValueError, match=r"pixel_values: expected \(B,3,28,28\), got \("):
        CLIPVisionEncoder.from_pretrained(folder)(torch.zeros(shape))


def picture(width, height, mode="RGB", seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 4), dtype=torch.uint8, generator=generator)
    image = Image.frombytes("RGBA", (width, height), values.numpy().tobytes())
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize(
    "size", [(224, 224), (300, 224), (225, 301), (97, 53), (53, 97), (1, 1), (640, 481), (10, 333)]
)
def test_preprocess_equals_transformers(size, mode):
    with torch.device("meta"):
        model = CLIPVisionEncoder(CLIPVisionConfig(num_hidden_layers=1))
    portrait = picture(*size, mode)
    expected = CLIPImageProcessorPil()(portrait, return_tensors="pt").pixel_values
    assert torch.equal(model.preprocess(portrait), expected)


def test_preprocess_sees_the_transparent_colour_of_a_palette():
    with torch.device("meta"):
        model = CLIPVisionEncoder(CLIPVisionConfig(num_hidden_layers=1))
    portrait = picture(60, 70, "P")
    opaque = model.preprocess(portrait)
    portrait.info["transparency"] = portrait.getpixel((30, 30))
    expected = CLIPImageProcessorPil()(portrait, return_tensors="pt").pixel_values
    assert torch.equal(model.preprocess(portrait), expected)
    assert not torch.equal(opaque, expected)


def test_preprocess_follows_the_image_size(folder):
    model, portrait = CLIPVisionEncoder.from_pretrained(folder), picture(50, 61)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    result = model.preprocess(portrait)
    assert torch.equal(result, processor(portrait, return_tensors="pt").pixel_values)
    assert result.is_contiguous() and result.dtype == torch.float32
    model(result)


def test_every_key_that_does_not_fit_is_listed(folder):
    def spoil(tensors):
        del tensors["visual_projection.weight"], tensors["vision_model.pre_layrnorm.bias"]
        tensors["vision_model.pre_layernorm.bias"] = torch.zeros(32)
        tensors["vision_model.encoder.layers.1.mlp.fc1.bias"] = torch.zeros(63)

    edit_weights(folder / WEIGHTS, spoil)
    assert_lists(
        lambda: CLIPVisionEncoder.from_pretrained(folder),
        *("missing keys (2)", "visual_projection.weight", "vision_model.pre_layrnorm.bias"),
        *("unknown keys (1)", "vision_model.pre_layernorm.bias"),
        *("wrong shapes (1)", "vision_model.encoder.layers.1.mlp.fc1.bias: expected [64], got [63]"),
    )


def test_missing_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"model\.safetensors: no such file"):
        CLIPVisionEncoder.from_pretrained(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .*can run code"):
        CLIPVisionEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"missing keys .*encoder\.layers\.3\.mlp\.fc2\.weight"),
        ({"num_hidden_layers": 2}, r"unknown keys .*encoder\.layers\.2\.mlp\.fc2\.weight"),
        ({"image_size": 56}, r"position_embedding\.weight: expected \[17, 32\], got \[5, 32\]"),
        ({"num_attention_heads": 3}, "hidden_size=32 does not divide into num_attention_heads=3"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"model_type": "siglip_vision_model"}, "model_type='siglip_vision_model'"),
        ({"use_head": True}, "use_head=True is not known"),
        ({"model_type": "clip", "vision_config": [1]}, "vision_config: expected an object"),
        ({"projection_dim": None}, "unknown keys .*visual_projection"),
    ],
)
def test_a_config_that_contradicts_the_weights_or_is_not_supported(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        CLIPVisionEncoder.from_pretrained(folder)


@torch.no_grad()
def test_a_tower_without_projection(tmp_path):
    """As ImageDream ships it: `image_embeds` is None, and it is saved without one again."""
    theirs = stock_clip(TINY, kind=transformers.CLIPVisionModel, seed=3)
    theirs.save_pretrained(tmp_path / "theirs")
    pixels = torch.randn(2, 3, TINY["image_size"], TINY["image_size"])
    expected = theirs(pixels).last_hidden_state
    ours = CLIPVisionEncoder.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for model in (ours, CLIPVisionEncoder.from_pretrained(tmp_path / "ours")):
        assert model(pixels).image_embeds is None
        assert max_abs_diff(model(pixels).last_hidden_state, expected) < 1e-5
