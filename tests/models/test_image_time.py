"""The image's part of the timestep embedding: `addition_embed_type="image"`."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import max_abs_diff
from small_checkpoints import multi_view_config, multi_view_unet

from gafext.cameras import orbit
from gafext.conditions.conditions import ImageTokens, prepare_conditions
from gafext.models.unet import MultiViewUNet
from gafext.training.denoiser import Blindfold
from gafext.training.trained import choose_trained

VIEWS = 3


def with_image(**changes):
    return multi_view_unet(addition_embed_type="image", **changes)


def silence(unet):
    """Let attn_cv and attn_ip add nothing, so that what is left is diffusers'."""
    for block in unet.transformer_blocks():
        for attention in (block.attn_cv, block.attn_ip):
            attention.to_out[0].weight.zero_()
            attention.to_out[0].bias.zero_()
    return unet


def inputs(portraits=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = portraits * VIEWS
    sample, pose = (torch.randn(rows, *shape, generator=random) for shape in ((8, 8, 8), (12,)))
    return sample, pose, torch.randn(portraits, 7, 40, generator=random)


@torch.no_grad()
def test_against_diffusers(tmp_path):
    ours = silence(with_image())
    ours.save_pretrained(tmp_path)
    # With a width of the image's embedding diffusers projects the text too: to zeros, as ours is.
    theirs, info = UNet2DConditionModel.from_pretrained(
        tmp_path, encoder_hid_dim=40, output_loading_info=True, low_cpu_mem_usage=False
    )
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"encoder_hid_proj"}
    for parameter in theirs.encoder_hid_proj.parameters():
        parameter.zero_()
    sample, pose, tokens = inputs()
    first = tokens[:, 0].expand(VIEWS, -1)
    expected = theirs(
        sample, 7, torch.zeros(VIEWS, 1, 40), class_labels=pose, added_cond_kwargs={"image_embeds": first}
    ).sample
    assert max_abs_diff(ours(sample, 7, pose=pose, image_embeds=tokens, num_views=VIEWS), expected) < 2e-5
    assert max_abs_diff(ours(sample, 7, pose=pose, num_views=VIEWS), expected) > 1e-3


@torch.no_grad()
def test_each_portrait_is_its_views_and_the_first_token_counts():
    unet = silence(with_image())
    sample, pose, tokens = inputs(portraits=2)
    both = unet(sample, 7, pose=pose, image_embeds=tokens, num_views=VIEWS)
    for index in range(2):
        rows = slice(index * VIEWS, (index + 1) * VIEWS)
        alone = unet(sample[rows], 7, pose=pose[rows], image_embeds=tokens[index : index + 1], num_views=VIEWS)
        assert max_abs_diff(both[rows], alone) < 1e-5
    others = tokens.clone()
    others[:, 1:] += 1
    assert torch.equal(unet(sample, 7, pose=pose, image_embeds=others, num_views=VIEWS), both)


@pytest.mark.parametrize("unconditional", [None, "zero_image"])
@torch.no_grad()
def test_the_passes_of_guidance_alone_are_those_of_both(unconditional):
    portraits = 2
    unet, tokens = with_image(), inputs(portraits)[2]
    other = None if unconditional is None else inputs(portraits, seed=5)[2]
    given = ImageTokens(tokens, other)
    made = prepare_conditions(unet, orbit(VIEWS), portraits=portraits, tokens=given, guided=True)
    sample = inputs(portraits)[0]
    together = unet(sample.repeat(2, 1, 1, 1), 7, conditioning=made.conditioning, num_views=VIEWS)
    halves = [made.unconditional(portraits), made.conditional(portraits)]
    apart = [unet(sample, 7, conditioning=half.conditioning, num_views=VIEWS) for half in halves]
    assert max_abs_diff(torch.cat(apart), together) < 1e-5
    assert max_abs_diff(apart[0], apart[1]) > 1e-3
    plain = None if other is None else ImageTokens(other, None)
    plain = prepare_conditions(unet, orbit(VIEWS), portraits=portraits, tokens=plain, guided=False)
    alone = unet(sample, 7, conditioning=plain.conditioning, num_views=VIEWS)
    assert max_abs_diff(apart[0], alone) < 1e-5


@torch.no_grad()
def test_a_view_that_does_not_see_the_portrait_in_training():
    unet = silence(with_image())
    sample, pose, tokens = inputs(portraits=2)

    def run(image_embeds=tokens):
        return unet(sample, 7, pose=pose, image_embeds=image_embeds, num_views=VIEWS)

    seen, unseen, blindfold = run(), run(None), Blindfold(unet)
    sees = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    blindfold.sees = sees.view(-1, 1, 1)
    assert torch.equal(run(), seen)
    unet.train()
    expected = torch.where(sees.view(-1, 1, 1, 1) > 0, seen, unseen)
    assert max_abs_diff(run(), expected) < 1e-5 and max_abs_diff(seen, unseen) > 1e-3
    blindfold.remove()
    assert torch.equal(run(), seen)


@pytest.mark.parametrize(
    "value, changes",
    [
        ("text", {}),
        ("image", {"image_attention": None, "image_embed_dim": None}),
        ("image", {"image_projection": "pooled", "image_tokens": 4}),  # has no class token
    ],
)
def test_other_settings_are_refused(value, changes):
    with pytest.raises(ValueError, match="addition_embed_type='.*': expected None, or 'image' with image_attention"):
        multi_view_config(addition_embed_type=value, **changes)


def test_it_is_trained_as_a_new_layer():
    unet = with_image()
    choose_trained(unet, "new", rank=4, seed=0)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "add_embedding" in name} == {
        f"add_embedding.{layer}.{kind}" for layer in ("image_proj", "image_norm") for kind in ("weight", "bias")
    }
    assert "conv_out.weight" not in trained


def test_without_it_there_are_no_layers(tmp_path):
    plain = multi_view_unet()
    plain.save_pretrained(tmp_path)
    assert plain.add_embedding is None and not any("add_embedding" in key for key in plain.state_dict())
    assert MultiViewUNet.from_pretrained(tmp_path).config.addition_embed_type is None
