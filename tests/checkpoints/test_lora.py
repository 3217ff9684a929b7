"""LoRA files of every form, merged, against the formula and against diffusers."""

import json
import random
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
import torch.nn.functional as F
from damage import damaged_safetensors
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from helpers import max_abs_diff
from safetensors.torch import load_file, save_file
from small_checkpoints import NARROW, stock_unet

from gafext.checkpoints.lora import merge_lora
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.unet import MultiViewUNet

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.attn2.to_out.0",
    f"{BLOCK}.ff.net.0.proj",
    f"{BLOCK}.ff.net.2",
)
CONV = (
    *("down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.resnets.0.conv_shortcut"),
    *("down_blocks.0.attentions.0.proj_in", "mid_block.attentions.0.proj_out", "up_blocks.0.upsamplers.0.conv"),
)
OTHER = ("mid_block.resnets.0.time_emb_proj", "time_embedding.linear_1", "conv_in", "conv_out")
MODULES = (*LINEAR, *CONV, *OTHER)
LDM = {  # latent diffusion's names of the same modules in a U-Net of this size
    **{name: name.replace(BLOCK, "input_blocks.1.1.transformer_blocks.0") for name in LINEAR},
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "up_blocks.0.resnets.0.conv_shortcut": "output_blocks.0.0.skip_connection",
    "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
    "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "mid_block.resnets.0.time_emb_proj": "middle_block.0.emb_layers.1",
    "time_embedding.linear_1": "time_embed.0",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
RANK, ALPHA = 3, 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    stock_unet(**NARROW, use_linear_projection=False).save_pretrained(folder)
    return folder


def factors(folder, modules=MODULES, rank=RANK, seed=1):
    """Down and up of each module, as trainers shape them: a convolution's down has its kernel."""
    unet, generator = diffusers.UNet2DConditionModel.from_pretrained(folder), torch.Generator().manual_seed(seed)
    result = {}
    for name in modules:
        weight = unet.get_submodule(name).weight
        ones = (1,) * (weight.ndim - 2)
        down = torch.randn((rank, *weight.shape[1:]), generator=generator) * 0.2
        result[name] = (down, torch.randn((len(weight), rank, *ones), generator=generator) * 0.2)
    return result


def updates(pairs, scaling):
    return {
        name: scaling * (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        for name, (down, up) in pairs.items()
    }


def written(path, pairs, form, **more):
    """A LoRA file of one of the forms that people have."""
    names = {
        "peft": "unet.{}.lora_{AB}.weight",
        "peft alone": "base_model.model.{}.lora_{AB}.weight",
        "peft adapter": "unet.{}.lora_{AB}.default_0.weight",
        "diffusers": "unet.{}.lora.{word}.weight",
        "no prefix": "{}.lora.{word}.weight",
        "linear layer": "unet.{}.lora_linear_layer.{word}.weight",
        "kohya": "lora_unet_{flat}.lora_{word}.weight",
    }
    tensors = dict(more)
    for name, (down, up) in pairs.items():
        for word, letter, value in (("down", "A", down), ("up", "B", up)):
            if form == "processor":
                owner, _, part = name.removesuffix(".0").rpartition(".")
                key = f"unet.{owner}.processor.{part}_lora.{word}.weight"
            else:
                key = names[form].format(name, AB=letter, word=word, flat=name.replace(".", "_"))
            tensors[key] = value.contiguous()
    save_file(tensors, path)
    return path


def renamed(pairs):
    """The pairs under latent diffusion's names."""
    return {LDM[name]: pair for name, pair in pairs.items()}


def kohya_alphas(pairs, alpha=ALPHA):
    return {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(alpha) for name in pairs}


def merged(folder, path):
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, path)
    return unet


def conversion(tensors, scaling):
    """The updates that diffusers reads from a kohya file."""
    tensors = convert_unet_state_dict_to_peft(_convert_non_diffusers_lora_to_diffusers(tensors)[0])
    pairs = {
        key.removeprefix("unet.").replace(".processor.", ".").removesuffix(".lora_A.weight"): (
            down,
            tensors[key.replace("lora_A", "lora_B")],
        )
        for key, down in tensors.items()
        if ".lora_A." in key
    }
    return updates(pairs, scaling)


def assert_merged(folder, unet, expected):
    """The U-Net has the folder's weights plus the expected updates, and no others."""
    before = MultiViewUNet.from_pretrained(folder).state_dict()
    for key, value in unet.state_dict().items():
        update = expected.get(key.removesuffix(".weight"), 0) if key.endswith(".weight") else 0
        assert max_abs_diff(value, before[key] + update) < 1e-5, key
    assert all(f"{name}.weight" in before for name in expected)


@pytest.mark.parametrize(
    "form", ["peft", "peft alone", "peft adapter", "diffusers", "no prefix", "linear layer", "kohya"]
)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_every_form(folder, tmp_path, form, scale):
    pairs = factors(folder)
    unet = MultiViewUNet.from_pretrained(folder)
    assert merge_lora(unet, written(tmp_path / "lora.safetensors", pairs, form), scale=scale) == []
    assert_merged(folder, unet, updates(pairs, scale))
    assert not any(module.training for module in unet.modules())
    assert all(isinstance(value, torch.nn.Parameter) and value.requires_grad for value in unet.parameters())


def test_old_attention_processors(folder, tmp_path):
    pairs = factors(folder, [name for name in LINEAR if ".to_" in name])
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, written(tmp_path / "lora.safetensors", pairs, "processor"))
    assert_merged(folder, unet, updates(pairs, 1.0))


@pytest.mark.parametrize("alpha", [ALPHA, 4, 0.0])
def test_kohya_equals_diffusers_conversion(folder, tmp_path, alpha):
    pairs = factors(folder)
    path = written(tmp_path / "lora.safetensors", pairs, "kohya", **kohya_alphas(pairs, alpha))
    expected = conversion(load_file(path), 0.5 * alpha / RANK)
    assert expected.keys() == pairs.keys()
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, path, scale=0.5)
    assert_merged(folder, unet, expected)


@pytest.mark.parametrize("form", ["kohya", "peft alone", "no prefix"])
def test_latent_diffusions_names(folder, tmp_path, form):
    pairs = factors(folder)
    alphas = kohya_alphas(renamed(pairs)) if form == "kohya" else {}
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, written(tmp_path / "lora.safetensors", renamed(pairs), form, **alphas))
    assert_merged(folder, unet, updates(pairs, ALPHA / RANK if alphas else 1.0))


def test_latent_diffusions_names_equal_diffusers_conversion(folder, tmp_path):
    # diffusers takes the upsampler of a block without attention, which SDXL does not have, for an attention.
    pairs = factors(folder, [name for name in MODULES if name != "up_blocks.0.upsamplers.0.conv"])
    path = written(tmp_path / "lora.safetensors", renamed(pairs), "kohya", **kohya_alphas(renamed(pairs)))
    config = diffusers.UNet2DConditionModel.load_config(folder)
    tensors = _maybe_map_sgm_blocks_to_diffusers(load_file(path), SimpleNamespace(**config))
    assert_merged(folder, merged(folder, path), conversion(tensors, ALPHA / RANK))


@pytest.mark.parametrize(("name", "stride"), [("down_blocks.0.resnets.0.conv1", 1), (CONV[1], 2)])
@torch.no_grad()
def test_a_middle_factor_is_the_convolution_between_the_others(folder, tmp_path, name, stride):
    generator = torch.Generator().manual_seed(3)
    before = MultiViewUNet.from_pretrained(folder).get_submodule(name)
    outputs, inputs = before.weight.shape[:2]
    shapes = {"down": (RANK, inputs, 1, 1), "mid": (RANK, RANK, 3, 3), "up": (outputs, RANK, 1, 1)}
    parts = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    flat = f"lora_unet_{name.replace('.', '_')}"
    path = tmp_path / "lora.safetensors"
    save_file({f"{flat}.lora_{part}.weight": value for part, value in parts.items()} | kohya_alphas([name]), path)
    x = torch.randn(2, inputs, 8, 8, generator=generator)
    added = F.conv2d(F.conv2d(F.conv2d(x, parts["down"]), parts["mid"], stride=stride, padding=1), parts["up"])
    result = merged(folder, path).get_submodule(name)(x)
    assert max_abs_diff(result, before(x) + ALPHA / RANK * added) < 1e-4

    wrong = load_file(path) | {f"{flat}.lora_mid.weight": torch.ones(RANK, RANK, 1, 3)}
    save_file(wrong, path)
    with pytest.raises(CheckpointError, match=rf"lora_mid\.weight: expected \[3, 3, 3, 3\] for {name}, got \[3, 3, 1"):
        merged(folder, path)


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("DoRA", ["lora_down.weight", "lora_up.weight", "dora_scale"]),
        ("DoRA", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]),
        ("LoHa", ["alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]),
        ("LoKr", ["alpha", "lokr_w1", "lokr_w2_a", "lokr_w2_b"]),
        ("OFT", ["alpha", "oft_blocks"]),
    ],
)
def test_other_adapters_are_named(folder, tmp_path, form, parts):
    name = f"lora_unet_{LINEAR[0].replace('.', '_')}"
    save_file({f"{name}.{part}": torch.ones(16, 16) for part in parts}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"no LoRA that fits this U-Net: {form} \({name}\.\w+\), which"
    ) as caught:
        merged(folder, tmp_path / "x.safetensors")
    assert "Merge it into the U-Net with the program that trained it" in str(caught.value)


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_equals_diffusers_with_peft(folder, tmp_path, form):
    pytest.importorskip("peft")
    pairs = factors(folder, (*LINEAR, *CONV))
    alphas = kohya_alphas(pairs) if form == "kohya" else {}
    path = written(tmp_path / "lora.safetensors", pairs, form, **alphas)
    pipe = diffusers.StableDiffusionPipeline(
        *[None] * 3, diffusers.UNet2DConditionModel.from_pretrained(folder), *[None] * 3, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(path))
    pipe.unet.fuse_lora(lora_scale=0.8)
    pipe.unet.unload_lora()
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, path, scale=0.8)
    theirs = pipe.unet.state_dict()
    before = MultiViewUNet.from_pretrained(folder).state_dict()
    for key, value in unet.state_dict().items():
        assert max_abs_diff(value, theirs[key]) < 1e-5, key
    assert sum(max_abs_diff(value, before[key]) > 1e-3 for key, value in theirs.items()) == len(pairs)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"r": RANK, "lora_alpha": 6}, 2.0),
        ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 12, "ttn1.to_q": 99}}, 4.0),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {"to_k": 12}}, 2.0),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {r"down_blocks\..*to_q": 12, "to_q": 99}}, 4.0),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {r"^down_blocks\.\d+\.attentions.*q": 12}}, 4.0),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {"down_blocks": 12}}, 2.0),  # not the end of the name
        ({"r": RANK, "lora_alpha": 6, "init_lora_weights": "Gaussian"}, 2.0),
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("place", ["metadata", "metadata of a U-Net alone", "adapter_config.json"])
def test_alpha_of_pefts_settings(folder, tmp_path, settings, scaling, place):
    pairs = factors(folder, LINEAR[:1])
    path = written(tmp_path / "adapter_model.safetensors", pairs, "peft")
    if place == "metadata":
        settings = {f"unet.{key}": value for key, value in settings.items()} | {"text_encoder.lora_alpha": 77}
        save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    elif place == "metadata of a U-Net alone":
        save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    else:
        (tmp_path / place).write_text(json.dumps(settings))
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, path)
    assert_merged(folder, unet, updates(pairs, scaling))


@pytest.mark.parametrize(
    "settings",
    [
        '{"unet.lora_alpha": "x"}',
        "[1]",
        "{",
        '{"unet.use_dora": true}',
        '{"unet.alpha_pattern": [1]}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.alpha_pattern": {"(": 1}}',
        '{"use_dora": true}',
    ],
)
def test_settings_that_are_none(folder, tmp_path, settings):
    path = written(tmp_path / "lora.safetensors", factors(folder, LINEAR), "peft")
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": settings})
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: expected the settings of a LoRA"):
        merge_lora(MultiViewUNet.from_pretrained(folder), path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_file_of_diffusers_unet_saved_alone(folder, tmp_path, use_rslora):
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["to_q", "to_out.0"], use_rslora=use_rslora)
    theirs.add_adapter(config)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    theirs.save_lora_adapter(tmp_path)
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, tmp_path / "pytorch_lora_weights.safetensors")
    theirs.fuse_lora()
    expected = {key.replace(".base_layer", ""): value for key, value in theirs.state_dict().items()}
    for key, value in unet.state_dict().items():
        assert max_abs_diff(value, expected[key]) < 1e-5, key


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_updates_of_other_weights_are_refused(folder, tmp_path, kind):
    """These beginnings take what the update begins with out of the weights below, which the file does not hold."""
    path = written(tmp_path / "adapter_model.safetensors", factors(folder, LINEAR), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "init_lora_weights": kind}))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: init_lora_weights='{kind}': .* plain"):
        merge_lora(MultiViewUNet.from_pretrained(folder), path)


def test_each_module_has_its_own_rank_and_alpha(folder, tmp_path):
    narrow, wide = factors(folder, LINEAR[:1], rank=1), factors(folder, LINEAR[1:2], rank=8)
    alphas = kohya_alphas(narrow, 4) | kohya_alphas(wide, 2.0)
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, written(tmp_path / "lora.safetensors", narrow | wide, "kohya", **alphas))
    assert_merged(folder, unet, updates(narrow, 4.0) | updates(wide, 0.25))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_summed_in_float32(folder, tmp_path, dtype):
    pairs = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in factors(folder).items()}
    unet, before = (MultiViewUNet.from_pretrained(folder, dtype=dtype) for _ in range(2))
    merge_lora(unet, written(tmp_path / "lora.safetensors", pairs, "peft"), scale=0.3)
    wide = {name: (down.float(), up.float()) for name, (down, up) in pairs.items()}
    for name, update in updates(wide, 0.3).items():
        weight = unet.get_parameter(f"{name}.weight")
        assert weight.dtype == dtype
        expected = before.get_parameter(f"{name}.weight").float() + update
        assert torch.equal(weight, expected.to(dtype)) or max_abs_diff(weight, expected) < 2 * torch.finfo(dtype).eps


def test_scale_0_changes_nothing_and_minus_1_takes_back(folder, tmp_path):
    path = written(tmp_path / "lora.safetensors", factors(folder), "peft")
    unet = MultiViewUNet.from_pretrained(folder)
    merge_lora(unet, path, scale=0.0)
    before = MultiViewUNet.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    merge_lora(unet, path)
    merge_lora(unet, path, scale=-1.0)
    assert_merged(folder, unet, {})


def test_the_text_encoder_is_left_aside_with_a_note(folder, tmp_path):
    pairs = factors(folder, LINEAR)
    text = {
        f"{name}.weight": torch.ones(2, 2)
        for name in ("lora_te_a.lora_down", "text_encoder.b.lora_A", "lora_te1_c.lora_up")
    }
    unet = MultiViewUNet.from_pretrained(folder)
    notes = merge_lora(unet, written(tmp_path / "lora.safetensors", pairs, "kohya", **text))
    assert len(notes) == 1 and "lora.safetensors: 3 tensors for a text encoder are ignored" in notes[0]
    assert_merged(folder, unet, updates(pairs, 1.0))


@pytest.mark.parametrize(
    ("title", "keys"),
    [
        ("unknown keys", ["unet.nowhere.lora_A.weight"]),
        ("unknown keys", [f"unet.{LINEAR[1]}.lora_magnitude_vector.weight"]),
        ("unknown keys", [f"lora_unet_{LINEAR[1].replace('.', '_')}.hada_w1_a"]),
        ("unknown keys", [f"{LINEAR[2]}.lora.up.weight"]),  # a second one of a module
        ("unknown keys", ["unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.conv_norm_out.lora_A.weight"]),
        ("keys without their partner", [f"unet.{CONV[0]}.lora_A.weight"]),
        ("keys without their partner", [f"unet.{CONV[0]}.lora_B.weight", f"unet.{CONV[0]}.alpha"]),
    ],
)
def test_keys_that_do_not_fit_are_listed_and_nothing_is_merged(folder, tmp_path, title, keys):
    more = {key: torch.ones(2, 16, 3, 3) for key in keys}
    path = written(tmp_path / "lora.safetensors", factors(folder, LINEAR), "peft", **more)
    unet = MultiViewUNet.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"{title} \({len(keys)}\)") as caught:
        merge_lora(unet, path)
    second = [f"unet.{LINEAR[2]}.lora_B.weight"]  # of two of one module the later is called unknown
    assert all(key in str(caught.value) for key in (second if keys[0].startswith(LINEAR[2]) else keys))
    assert_merged(folder, unet, {})


def test_shapes_that_do_not_fit_are_listed(folder, tmp_path):
    pairs, unet, path = factors(folder, LINEAR), MultiViewUNet.from_pretrained(folder), tmp_path / "lora.safetensors"
    key = f"unet.{LINEAR[0]}.lora_{{}}.weight"
    for which, shape, expected in (("A", (3, 15), "[r, 16]"), ("B", (16, 4), "[16, 3]"), ("A", (0, 16), "[r, 16]")):
        wrong = load_file(written(path, pairs, "peft")) | {key.format(which): torch.ones(shape)}
        save_file(wrong, path)
        with pytest.raises(CheckpointError) as caught:
            merge_lora(unet, path)
        assert f"{key.format(which)}: expected {expected} for {LINEAR[0]}, got {list(shape)}" in str(caught.value)
    assert_merged(folder, unet, {})


def test_files_that_are_none(folder, tmp_path):
    unet, path = MultiViewUNet.from_pretrained(folder), tmp_path / "lora.safetensors"
    with pytest.raises(CheckpointNotFoundError, match=r"lora\.safetensors: no such file"):
        merge_lora(unet, path)
    with pytest.raises(CheckpointError, match=r"lora\.bin: expected a \.safetensors file.*torch\.load\('lora\.bin'"):
        merge_lora(unet, tmp_path / "lora.bin")
    save_file({}, path)
    with pytest.raises(CheckpointError, match="no LoRA that fits this U-Net"):
        merge_lora(unet, path)
    with pytest.raises(ValueError, match="scale: expected a finite number, got nan"):
        merge_lora(unet, path, scale=float("nan"))
    pairs = factors(folder, LINEAR)
    pairs[LINEAR[3]][0][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight has 1 NaN"):
        merge_lora(unet, written(path, pairs, "peft"))
    assert_merged(folder, unet, {})


def test_a_sum_beyond_the_type_is_refused(folder, tmp_path):
    unet = MultiViewUNet.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"the sum is beyond torch\.float16 at scale=1000000"):
        merge_lora(unet, written(tmp_path / "lora.safetensors", factors(folder, LINEAR), "peft"), scale=1_000_000.0)


def test_damaged_files(folder, tmp_path):
    path = written(tmp_path / "lora.safetensors", factors(folder, LINEAR), "kohya", **kohya_alphas(LINEAR))
    whole, errors = path.read_bytes(), 0
    before = {key: value.clone() for key, value in MultiViewUNet.from_pretrained(folder).state_dict().items()}
    unet = MultiViewUNet.from_pretrained(folder)
    for seed in range(100):
        path.write_bytes(damaged_safetensors(whole, random.Random(seed)))
        try:
            merge_lora(unet, path)
        except ValueError as error:
            errors += 1
            assert "lora.safetensors" in str(error)
        else:
            assert all(value.isfinite().all() for value in unet.state_dict().values())
            unet.load_state_dict(before)
        assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert errors > 80
