"""MultiViewUNet against diffusers, on small checkpoints that diffusers itself saves, and what it adds to them."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import UNET_WEIGHTS, assert_backends_agree, assert_lists, edit_json, edit_weights, max_abs_diff
from small_checkpoints import multi_view_config, multi_view_unet, stock_unet

from gafext.config import SD21_MULTIVIEW_UNET, SD21_UNET
from gafext.errors import CheckpointError
from gafext.models.embeddings import timestep_embedding
from gafext.models.unet import MultiViewUNet

STOCK = {
    "three stages, linear projection, 8 inputs, pose": dict(
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 6),
        use_linear_projection=True,
        in_channels=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=12,
    ),
    "two stages, convolution projection, two transformer layers": dict(
        block_out_channels=(32, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        layers_per_block=1,
        transformer_layers_per_block=2,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    ),
    "SD 2.1's four stages, no pose": dict(
        block_out_channels=(16, 32, 32, 32),
        attention_head_dim=(1, 2, 4, 4),
        use_linear_projection=True,
    ),
}


def inputs(*, views: int, portraits: int = 1, size: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = views * portraits
    return {
        "sample": torch.randn(rows, 8, size, size, generator=generator),
        "pose": torch.randn(rows, 12, generator=generator),
        "image_embeds": torch.randn(portraits, 7, 40, generator=generator),
    }


@pytest.mark.parametrize("height,width", [(8, 8), (9, 13)])
@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_a_stock_folder_gives_stock_numbers(name, height, width, tmp_path):
    theirs = stock_unet(STOCK[name], seed=3)
    theirs.save_pretrained(tmp_path)
    ours = MultiViewUNet.from_pretrained(tmp_path)
    sample = torch.randn(3, theirs.config.in_channels, height, width)
    timestep = torch.tensor([1, 500, 999])
    text = torch.randn(3, 5, 40)
    pose_dim = theirs.config.projection_class_embeddings_input_dim
    pose = torch.randn(3, pose_dim) if pose_dim else None
    expected = theirs(sample, timestep, text, class_labels=pose).sample
    assert expected.std() > 0.1
    assert max_abs_diff(ours(sample, timestep, text, pose=pose), expected) < 2e-5
    # None is the all-zero text, which is not computed.
    expected = theirs(sample, timestep, torch.zeros_like(text), class_labels=pose).sample
    assert max_abs_diff(ours(sample, timestep, None, pose=pose), expected) < 2e-5


@torch.no_grad()
def test_saved_again_it_loads_in_diffusers(tmp_path):
    stock_unet(next(iter(STOCK.values()))).save_pretrained(tmp_path / "theirs")
    MultiViewUNet.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    theirs, ours = (UNet2DConditionModel.from_pretrained(tmp_path / who) for who in ("theirs", "ours"))
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


@torch.no_grad()
def test_the_part_without_new_attentions_runs_in_diffusers(tmp_path):
    ours = multi_view_unet()
    ours.save_pretrained(tmp_path)
    theirs, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True, low_cpu_mem_usage=False)
    assert not info["missing_keys"] and info["unexpected_keys"]
    x = inputs(views=4)
    # What is left of ours when nothing new contributes: no image tokens, and attn_cv's output projection zeroed.
    for block in ours.transformer_blocks():
        block.attn_cv.to_out[0].weight.zero_()
        block.attn_cv.to_out[0].bias.zero_()
    expected = theirs(x["sample"], 7, torch.zeros(4, 3, 40), class_labels=x["pose"]).sample
    assert max_abs_diff(ours(x["sample"], 7, pose=x["pose"], num_views=4), expected) < 2e-5


def test_published_size_counts():
    with torch.device("meta"):
        stock, multi_view = MultiViewUNet(SD21_UNET), MultiViewUNet(SD21_MULTIVIEW_UNET)
    assert sum(p.numel() for p in stock.parameters()) == 865_910_724
    assert len(stock.state_dict()) == 686
    added = {key for key in multi_view.state_dict() if key not in stock.state_dict()}
    stems = ("norm_cv", "attn_cv", "norm_ip", "attn_ip", "class_embedding", "image_projection")
    assert all(any(stem in key for stem in stems) for key in added)
    assert len(multi_view.transformer_blocks()) == 16


@torch.no_grad()
def test_each_condition_is_read():
    unet = multi_view_unet()
    x = inputs(views=4)

    def run(**changes):
        x_ = {**x, **changes}
        return unet(
            x_["sample"],
            x_.get("timestep", 500),
            pose=x_["pose"],
            image_embeds=x_["image_embeds"],
            num_views=4,
        )

    base = run()
    other = inputs(views=4, seed=9)
    normals = torch.cat([x["sample"][:, :4], other["sample"][:, 4:]], dim=1)
    changes = {
        "pose": {"pose": other["pose"]},
        "image": {"image_embeds": other["image_embeds"]},
        "no image": {"image_embeds": None},
        "normal latents": {"sample": normals},
        "timestep": {"timestep": 100},
    }
    for what, change in changes.items():
        assert max_abs_diff(run(**change), base) > 1e-3, what


@torch.no_grad()
def test_views_talk_to_each_other_and_portraits_do_not():
    unet = multi_view_unet()
    x = inputs(views=3, portraits=2)
    base = unet(x["sample"], 10, pose=x["pose"], image_embeds=x["image_embeds"], num_views=3)
    changed = x["sample"].clone()
    changed[1] += 1
    after = unet(changed, 10, pose=x["pose"], image_embeds=x["image_embeds"], num_views=3)
    moved = (after - base).flatten(1).abs().amax(1)
    assert (moved[:3] > 1e-4).all()
    assert (moved[3:] == 0).all()


@torch.no_grad()
def test_conditioning_computed_once_gives_the_same_and_may_leave_rows_out():
    unet = multi_view_unet()
    x = inputs(views=4)
    conditional = unet(x["sample"], 10, pose=x["pose"], image_embeds=x["image_embeds"], num_views=4)
    unconditional = unet(x["sample"], 10, pose=x["pose"], num_views=4)
    assert max_abs_diff(conditional, unconditional) > 1e-3
    both = unet.precompute(pose=x["pose"].repeat(2, 1), image_embeds=x["image_embeds"])
    result = unet(x["sample"].repeat(2, 1, 1, 1), 10, conditioning=both, num_views=4)
    assert max_abs_diff(result, torch.cat([unconditional, conditional])) < 1e-5


def test_backends_agree():
    unet, x = multi_view_unet(), inputs(views=4)
    assert_backends_agree(unet, lambda: unet(timestep=10, num_views=4, **x), tolerance=2e-5)


def test_it_trains():
    unet = multi_view_unet().train()
    x = inputs(views=2)
    unet(
        x["sample"],
        10,
        pose=x["pose"],
        image_embeds=unet.image_projection(torch.randn(1, 7, 24)),
        num_views=2,
    ).sum().backward()
    # Text is None, so attn2 teaches its output bias alone.
    untouched = {n for n, p in unet.named_parameters() if p.grad is None}
    assert untouched and all(".attn2." in n or ".norm2." in n for n in untouched if ".resnets." not in n)
    assert not any(".resnets." in n for n in untouched)


def test_timestep_embedding_against_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    steps = torch.tensor([0, 1, 999])
    for channels in (32, 33):
        expected = get_timestep_embedding(steps, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert max_abs_diff(timestep_embedding(steps, channels), expected) < 1e-6


def test_wrong_inputs_are_named():
    unet = multi_view_unet()
    x = inputs(views=4)
    cases = {
        "sample": dict(sample=x["sample"][:, :4]),
        "num_views": dict(num_views=3),
        "pose": dict(pose=x["pose"][:, :5]),
        "pose: expected \\[B\\*V,12\\], got None": dict(pose=None),
        "image_embeds": dict(image_embeds=x["image_embeds"][..., :3]),
        "portraits": dict(image_embeds=x["image_embeds"].repeat(2, 1, 1)),
        "encoder_hidden_states": dict(encoder_hidden_states=torch.zeros(4, 2, 7)),
        "timestep": dict(timestep=torch.zeros(3)),
        "reference_latents": dict(reference_latents=torch.zeros(1, 4, 8, 8)),
    }
    for name, change in cases.items():
        arguments = {**x, "timestep": 10, "num_views": 4, **change}
        sample, timestep = arguments.pop("sample"), arguments.pop("timestep")
        with pytest.raises(ValueError, match=name):
            unet(sample, timestep, **arguments)


def saved(tmp_path):
    multi_view_unet().save_pretrained(tmp_path)
    return tmp_path / UNET_WEIGHTS, tmp_path / "config.json"


def test_the_added_attentions_show_by_their_keys(tmp_path):
    _, config = saved(tmp_path)
    added = ("cross_view", "image_attention", "image_embed_dim")
    edit_json(config, lambda values: [values.pop(key) for key in added])
    assert MultiViewUNet.from_pretrained(tmp_path).config == multi_view_config()


def test_a_square_sample_size_of_two_numbers(tmp_path):
    _, config = saved(tmp_path)
    edit_json(config, sample_size=[8, 8])
    assert MultiViewUNet.from_pretrained(tmp_path).config == multi_view_config()


def test_a_stock_unet_saved_by_us_has_no_field_of_ours(tmp_path):
    stock_unet(next(iter(STOCK.values()))).save_pretrained(tmp_path / "theirs")
    MultiViewUNet.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours"))
    assert set(ours) <= set(theirs) and ours["_class_name"] == "UNet2DConditionModel"


def test_every_misfit_is_listed(tmp_path):
    path, _ = saved(tmp_path)

    def spoil(tensors):
        del tensors["conv_in.bias"], tensors["time_embedding.linear_1.weight"]
        tensors |= {"conv_out.bias": torch.zeros(5), "surplus.a": torch.zeros(1), "surplus.b": torch.zeros(1)}

    edit_weights(path, spoil)
    assert_lists(
        lambda: MultiViewUNet.from_pretrained(tmp_path),
        *(str(path), "conv_in.bias", "time_embedding.linear_1.weight", "surplus.a", "surplus.b"),
        "conv_out.bias: expected [4], got [5]",
    )


def test_what_is_off_at_every_level_is_off(tmp_path):
    _, config = saved(tmp_path)
    edit_json(config, only_cross_attention=[False, False], something_new=[None])
    MultiViewUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change,word",
    [
        ({"block_out_channels": [32, 33]}, "norm_num_groups"),
        ({"block_out_channels": [32]}, "down_block_types"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"in_channels": "8"}, "in_channels"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"cross_attention_dim": 48}, "wrong shapes"),
        ({"layers_per_block": 2}, "missing keys"),
        ({"cross_view": None}, "unknown keys"),
        ({"something_new": 3}, "something_new"),
        ({"only_cross_attention": [False, True]}, "only_cross_attention"),
        ({"sample_size": [8, 9]}, "sample_size"),
        ({"sample_size": 10**9}, "sample_size"),
    ],
)
def test_a_configuration_that_contradicts(change, word, tmp_path):
    _, config = saved(tmp_path)
    edit_json(config, **change)
    with pytest.raises(CheckpointError, match=word) as error:
        MultiViewUNet.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
