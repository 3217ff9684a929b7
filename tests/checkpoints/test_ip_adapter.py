"""IP-Adapter files, plain, Plus and full-face, against diffusers on the same files; and the projections they bring."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import assert_equal_weights, edit_json, max_abs_diff, randomized
from safetensors.torch import load_file, save_file
from small_checkpoints import stock_unet

from gafext.checkpoints.ip_adapter import load_ip_adapter
from gafext.config import UNetConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.blocks import MultiViewTransformerBlock
from gafext.models.image_projection import MLPProjection, PooledProjection, Resampler
from gafext.models.unet import MultiViewUNet

CONTEXT, CLIP = 40, 24
STOCK = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4),
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "use_linear_projection": True,
}
# Channels of the attentions in the file's order: two per transformer; down 1 + 1, up 2 + 2, then the middle.
CHANNELS = [32] * 2 + [64] * 2 + [64] * 4 + [32] * 4 + [64] * 2


def adapter_tensors(kind, *, seed=0):
    """Random weights in the published layout."""
    generator, tensors = torch.Generator().manual_seed(seed), {}

    def put(name, *shape):
        values = torch.randn(shape, generator=generator)
        norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = 1 + 0.2 * values if norm else values * (math.prod(shape[1:]) ** -0.5 if shape[1:] else 0.2)

    if kind == "plain":
        put("image_proj.proj.weight", 4 * CONTEXT, CLIP)
        put("image_proj.proj.bias", 4 * CONTEXT)
        put("image_proj.norm.weight", CONTEXT)
        put("image_proj.norm.bias", CONTEXT)
    elif kind == "full":
        for name, *shape in (("0", CLIP, CLIP), ("2", CONTEXT, CLIP), ("3", CONTEXT)):
            put(f"image_proj.proj.{name}.weight", *shape)
            put(f"image_proj.proj.{name}.bias", shape[0])
    else:
        width, inner = 48, 128
        put("image_proj.latents", 1, 16, width)
        for name, rows, columns in (("proj_in", width, CLIP), ("proj_out", CONTEXT, width)):
            put(f"image_proj.{name}.weight", rows, columns)
            put(f"image_proj.{name}.bias", rows)
        norms = [("norm_out", CONTEXT)]
        for layer in range(4):
            norms += [(f"layers.{layer}.{norm}", width) for norm in ("0.norm1", "0.norm2", "1.0")]
            put(f"image_proj.layers.{layer}.0.to_q.weight", inner, width)
            put(f"image_proj.layers.{layer}.0.to_kv.weight", 2 * inner, width)
            put(f"image_proj.layers.{layer}.0.to_out.weight", width, inner)
            put(f"image_proj.layers.{layer}.1.1.weight", 4 * width, width)
            put(f"image_proj.layers.{layer}.1.3.weight", width, 4 * width)
        for name, size in norms:
            put(f"image_proj.{name}.weight", size)
            put(f"image_proj.{name}.bias", size)
    for index, channels in enumerate(CHANNELS):
        put(f"ip_adapter.{2 * index + 1}.to_k_ip.weight", channels, CONTEXT)
        put(f"ip_adapter.{2 * index + 1}.to_v_ip.weight", channels, CONTEXT)
    return tensors


def clip_features(kind, portraits, *, seed=0):
    shape = (portraits, CLIP) if kind == "plain" else (portraits, 9, CLIP)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock U-Net of diffusers, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("stock")
    theirs = stock_unet(STOCK, seed=3, cross_attention_dim=CONTEXT)
    theirs.save_pretrained(folder)
    return theirs, folder


def with_adapter(unet, tensors, scale):
    """A copy of diffusers' U-Net with the adapter, loaded by diffusers."""
    unet = copy.deepcopy(unet)
    parts = {part: {} for part in ("image_proj", "ip_adapter")}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    return unet


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
@torch.no_grad()
def test_against_diffusers(kind, scale, stock, tmp_path):
    tensors, (theirs, folder) = adapter_tensors(kind, seed=5), stock
    save_file(tensors, tmp_path / "adapter.safetensors")
    theirs = with_adapter(theirs, tensors, scale)
    ours = MultiViewUNet.from_pretrained(folder)
    load_ip_adapter(ours, tmp_path / "adapter.safetensors", scale=scale)
    assert ours.image_projection.clip_output == ("image_embeds" if kind == "plain" else "penultimate")

    features, sample, text = clip_features(kind, 2), torch.randn(6, 4, 8, 8), torch.randn(6, 5, CONTEXT)
    tokens = ours.image_projection(features)
    condition = {"image_embeds": [features.repeat_interleave(3, dim=0).unsqueeze(1)]}
    for our_text, their_text in ((text, text), (None, torch.zeros_like(text))):
        expected = theirs(sample, 250, their_text, added_cond_kwargs=condition).sample
        result = ours(sample, 250, our_text, image_embeds=tokens, num_views=3)
        assert max_abs_diff(result, expected) < 2e-5
        without = ours(sample, 250, our_text, num_views=3)
        assert max_abs_diff(result, without) > 1e-2
    ready = ours.precompute(image_embeds=tokens, encoder_hidden_states=text)
    expected = theirs(sample, 250, text, added_cond_kwargs=condition).sample
    assert max_abs_diff(ours(sample, 250, conditioning=ready, num_views=3), expected) < 2e-5


@torch.no_grad()
def test_scale_zero_is_no_adapter(stock, tmp_path):
    save_file(adapter_tensors("plain"), tmp_path / "adapter.safetensors")
    ours = MultiViewUNet.from_pretrained(stock[1])
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, CONTEXT)
    expected = ours(sample, 9, text), ours(sample, 9)
    load_ip_adapter(ours, tmp_path / "adapter.safetensors", scale=0.0)
    tokens = ours.image_projection(clip_features("plain", 1))
    assert torch.equal(ours(sample, 9, text, image_embeds=tokens, num_views=2), expected[0])
    assert max_abs_diff(ours(sample, 9, image_embeds=tokens, num_views=2), expected[1]) < 1e-5
    # A call may weigh the image otherwise than the checkpoint says.
    ready = ours.precompute(image_embeds=tokens, encoder_hidden_states=text, image_scale=0.5)
    assert max_abs_diff(ours(sample, 9, conditioning=ready, num_views=2), expected[0]) > 1e-2


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_saved_with_the_adapter_it_is_the_same(kind, stock, tmp_path):
    save_file(adapter_tensors(kind), tmp_path / "adapter.safetensors")
    unet = MultiViewUNet.from_pretrained(stock[1])
    load_ip_adapter(unet, tmp_path / "adapter.safetensors", scale=0.75)
    unet.save_pretrained(tmp_path / "unet")
    again = MultiViewUNet.from_pretrained(tmp_path / "unet")
    assert again.config == unet.config
    assert (again.config.image_attention, again.config.image_scale) == ("decoupled", 0.75)
    assert again.config.image_unconditional == ("zero_features" if kind == "plain" else "zero_image")
    assert_equal_weights(again, unet)


def test_what_was_added_shows_by_its_keys(stock, tmp_path):
    save_file(adapter_tensors("plus"), tmp_path / "adapter.safetensors")
    unet = MultiViewUNet.from_pretrained(stock[1])
    load_ip_adapter(unet, tmp_path / "adapter.safetensors")
    unet.save_pretrained(tmp_path / "unet")

    def forget(values):
        for name in [name for name in values if name.startswith(("image_", "resampler_"))]:
            del values[name]

    edit_json(tmp_path / "unet" / "config.json", forget)
    config = MultiViewUNet.from_pretrained(tmp_path / "unet").config
    assert replace(config, image_unconditional="zero_image") == unet.config


class TrainersProcessor(torch.nn.Module):
    """What the trainer puts in the place of an attention's processor."""

    def __init__(self, channels):
        super().__init__()
        self.to_k_ip, self.to_v_ip = (torch.nn.Linear(CONTEXT, channels, bias=False) for _ in range(2))


def trainers_state(unet, projection, tensors):
    """The state dict of the trainer's module: the U-Net, the projection, and a list of the U-Net's own processors."""
    trained, channels = torch.nn.Module(), iter(CHANNELS)
    trained.unet = copy.deepcopy(unet)
    trained.unet.set_attn_processor(
        {
            name: torch.nn.Module() if ".attn1." in name else TrainersProcessor(next(channels))
            for name in trained.unet.attn_processors
        }
    )
    trained.image_proj_model = projection
    trained.adapter_modules = torch.nn.ModuleList(trained.unet.attn_processors.values())
    trained.adapter_modules.load_state_dict(
        {k.removeprefix("ip_adapter."): v for k, v in tensors.items() if "_ip." in k}
    )
    trained.image_proj_model.load_state_dict(
        {k.removeprefix("image_proj."): v for k, v in tensors.items() if k.startswith("image_proj.")}
    )
    return trained.state_dict()


@pytest.mark.parametrize("form", ["accelerate's safetensors", "of several processes", "every tensor twice", "small"])
@pytest.mark.parametrize("kind", ["plain", "full"])
def test_the_trainers_checkpoint_equals_the_published_file(kind, form, stock, tmp_path):
    tensors = adapter_tensors(kind)
    save_file(tensors, tmp_path / "adapter.safetensors")
    projection = PooledProjection(CLIP, CONTEXT, tokens=4) if kind == "plain" else MLPProjection(CLIP, CONTEXT)
    state, path = trainers_state(stock[0], projection, tensors), tmp_path / "model.safetensors"
    if form == "accelerate's safetensors":
        pytest.importorskip("accelerate").utils.save(state, path, safe_serialization=True)
        assert not any(key.startswith("adapter_modules.") for key in load_file(path))  # shared with the U-Net
    else:
        prefix, parts = ("module." if form == "of several processes" else ""), ("adapter_", "image_", "unet.")
        parts = parts[:2] if form == "small" else parts
        save_file({prefix + key: value.clone() for key, value in state.items() if key.startswith(parts)}, path)
    ours, expected = (MultiViewUNet.from_pretrained(stock[1]) for _ in range(2))
    load_ip_adapter(ours, path)
    load_ip_adapter(expected, tmp_path / "adapter.safetensors")
    assert ours.config == expected.config
    assert_equal_weights(ours, expected)


@pytest.mark.parametrize(
    "change,word",
    [
        ({"image_attention": "both"}, "image_attention='both'"),
        ({"cross_view": "dence"}, "cross_view='dence'"),
        ({"image_unconditional": "noise"}, "image_unconditional='noise'"),
        ({"image_scale": 0.5}, "image_scale=0.5"),
        ({"image_attention": "decoupled", "image_scale": math.inf}, "image_scale=inf"),
        ({"image_embed_dim": 24}, "image_projection='linear' is set, but image_attention is not"),
        ({"image_attention": "decoupled", "image_projection": "pooled", "image_embed_dim": 24}, "image_tokens=None"),
        ({"image_attention": True, "image_embed_dim": 24, "resampler_depth": 4}, "resampler_depth=4: expected nothing"),
        ({"layers_per_block": 65}, "layers_per_block=65: expected 1 to 64"),
    ],
)
def test_a_configuration_that_contradicts(change, word):
    with pytest.raises(ValueError, match=word):
        UNetConfig(**change)


@torch.no_grad()
def test_another_adapter_takes_its_place(stock, tmp_path):
    kinds = ("plain", "full", "plus")
    for seed, kind in enumerate(kinds):
        save_file(adapter_tensors(kind, seed=seed), tmp_path / f"{kind}.safetensors")
    twice, once = (MultiViewUNet.from_pretrained(stock[1]) for _ in range(2))
    for unet, names in ((twice, kinds), (once, ("plus",))):
        for name in names:
            load_ip_adapter(unet, tmp_path / f"{name}.safetensors")
    assert twice.config == once.config
    assert_equal_weights(twice, once)


@pytest.mark.parametrize("given", [True, False], ids=["text", "no text"])
@torch.no_grad()
def test_rows_before_the_last_portraits_see_no_image(given):
    block = randomized(MultiViewTransformerBlock(64, 2, context_channels=24, image_attention="decoupled"), seed=5)
    x, image, text = torch.randn(4, 9, 64), torch.randn(1, 11, 24), torch.randn(4, 3, 24) if given else None
    both = block(torch.cat([x, x]), torch.cat([text, text]) if given else None, image_embeds=image, num_views=4)
    without, with_image = block(x, text, num_views=4), block(x, text, image_embeds=image, num_views=4)
    assert max_abs_diff(without, with_image) > 1e-2
    assert max_abs_diff(both, torch.cat([without, with_image])) < 1e-5


def test_it_trains_after_an_adapter(stock, tmp_path):
    save_file(adapter_tensors("plus"), tmp_path / "adapter.safetensors")
    unet = MultiViewUNet.from_pretrained(stock[1])
    load_ip_adapter(unet, tmp_path / "adapter.safetensors")
    tokens = unet.image_projection(clip_features("plus", 1))
    unet(torch.randn(2, 4, 8, 8), 9, torch.randn(2, 5, CONTEXT), image_embeds=tokens, num_views=2).sum().backward()
    assert not [name for name, parameter in unet.named_parameters() if parameter.grad is None]


def test_every_misfit_is_listed_and_nothing_changes(stock, tmp_path):
    tensors = adapter_tensors("plus")
    del tensors["ip_adapter.3.to_k_ip.weight"], tensors["image_proj.norm_out.bias"]
    tensors["ip_adapter.99.to_k_ip.weight"] = torch.zeros(1)
    tensors["ip_adapter.1.to_v_ip.weight"] = torch.zeros(32, 7)
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    unet = MultiViewUNet.from_pretrained(stock[1])
    config, names = unet.config, set(unet.state_dict())
    with pytest.raises(CheckpointError) as error:
        load_ip_adapter(unet, path)
    for part in (
        str(path),
        "down_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k_ip.weight",
        "image_projection.norm_out.bias",
        "ip_adapter.99.to_k_ip.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v_ip.weight: expected [32, 40], got [32, 7]",
    ):
        assert part in str(error.value)
    assert unet.config is config and set(unet.state_dict()) == names


def test_files_that_are_none(stock, tmp_path):
    unet = MultiViewUNet.from_pretrained(stock[1])
    pickled = tmp_path / "ip-adapter_sd15.bin"
    pickled.write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="Convert once: python -c .*ip-adapter_sd15.safetensors"):
        load_ip_adapter(unet, pickled)
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        load_ip_adapter(unet, tmp_path / "absent.safetensors")
    for name, tensors, word in (
        ("other", {"lora.up.weight": torch.zeros(1)}, "expected image_proj.proj and image_proj.norm"),
        ("nan", {**adapter_tensors("plain"), "image_proj.norm.bias": torch.full((CONTEXT,), math.nan)}, "NaN"),
        ("half", {"image_proj.latents": torch.zeros(1, 16, 48)}, "image_embed_dim=None"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=word) as error:
            load_ip_adapter(unet, tmp_path / f"{name}.safetensors")
        assert f"{name}.safetensors" in str(error.value)
    assert unet.image_projection is None
    with pytest.raises(ValueError, match="scale: expected a finite number, got nan"):
        load_ip_adapter(unet, tmp_path / "other.safetensors", scale=math.nan)


@pytest.mark.parametrize("form", ["published", "trainer's"])
def test_the_conversion_command_that_is_shown_works(form, stock, tmp_path, monkeypatch):
    tensors, nested = adapter_tensors("plain"), {"image_proj": {}, "ip_adapter": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        nested[part][rest] = value
    torch.save(nested if form == "published" else tensors, tmp_path / "adapter.bin")
    unet = MultiViewUNet.from_pretrained(stock[1])
    with pytest.raises(CheckpointError) as error:
        load_ip_adapter(unet, tmp_path / "adapter.bin")
    monkeypatch.chdir(tmp_path)
    exec(str(error.value).partition('python -c "')[2].rpartition('"')[0], {})
    converted = load_file(tmp_path / "adapter.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "projection,shape,expected",
    [
        (PooledProjection(24, 40, tokens=4), (2, 9, 24), "\\[B,24\\], got \\[2, 9, 24\\]"),
        (Resampler(24, 40, tokens=3, width=16, depth=1, heads=1), (2, 24), "\\[B,T,24\\], got \\[2, 24\\]"),
        (Resampler(24, 40, tokens=3, width=16, depth=1, heads=1), (2, 9, 7), "\\[B,T,24\\], got \\[2, 9, 7\\]"),
    ],
)
def test_features_of_another_shape_are_named(projection, shape, expected):
    with pytest.raises(ValueError, match=f"clip_hidden_states: expected {expected}"):
        projection(torch.zeros(shape))
