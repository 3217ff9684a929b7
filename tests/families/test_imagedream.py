"""ImageDream and MVDream in their own layout, against a plain-PyTorch rendering that reads that layout."""

import pytest
import torch
from helpers import (
    UNET_WEIGHTS,
    assert_backends_agree,
    assert_equal_weights,
    assert_lists,
    edit_json,
    edit_weights,
    max_abs_diff,
)
from plain_imagedream import IMAGEDREAM, MVDREAM, Plain, write

from gafext.errors import CheckpointError
from gafext.models.unet import MultiViewUNet
from gafext.ops.backend import set_attention_backend


@pytest.fixture(scope="module")
def imagedream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagedream")
    state = write(folder)
    return MultiViewUNet.from_pretrained(folder), Plain(state)


def inputs(*, portraits=1, views=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(portraits * views, 4, 8, 8, generator=generator),
        "text": torch.randn(1, 7, 40, generator=generator).repeat(portraits * views, 1, 1),
        "camera": torch.randn(portraits * views, 16, generator=generator),
        "clip": torch.randn(portraits, 17, 1280, generator=generator),
        "reference": torch.randn(portraits, 4, 8, 8, generator=generator),
    }


@pytest.mark.parametrize("case", ["image", "zero features and reference", "image without reference", "no image"])
@torch.no_grad()
def test_imagedream_against_plain_pytorch(imagedream, case):
    ours, plain = imagedream
    x = inputs(portraits=2)
    if case.startswith("zero"):
        x["clip"], x["reference"] = torch.zeros_like(x["clip"]), torch.zeros_like(x["reference"])
    tokens = None if case == "no image" else plain.tokens(x["clip"].double())
    reference = None if case in ("no image", "image without reference") else x["reference"]
    our_tokens = None if tokens is None else ours.image_projection(x["clip"])
    if tokens is not None:
        assert ours.image_projection.clip_output == "penultimate"
        assert max_abs_diff(our_tokens, tokens) < 2e-5
    expected = plain(x["sample"], 481, x["text"], x["camera"], views=5, tokens=tokens, reference=reference)
    given = x["sample"].clone()
    result = ours(
        given, 481, x["text"], pose=x["camera"], image_embeds=our_tokens, num_views=5, reference_latents=reference
    )
    assert expected.std() > 0.1
    assert max_abs_diff(result, expected) < 2e-5
    assert torch.equal(given, x["sample"])  # the reference is written into a copy


@torch.no_grad()
def test_mvdream_against_plain_pytorch(tmp_path):
    plain, ours = Plain(write(tmp_path, MVDREAM, seed=4)), MultiViewUNet.from_pretrained(tmp_path)
    assert ours.image_projection is None and ours.config.image_attention is None
    x = inputs(views=4)
    expected = plain(x["sample"], 999, x["text"], x["camera"], views=4)
    assert max_abs_diff(ours(x["sample"], 999, x["text"], pose=x["camera"], num_views=4), expected) < 2e-5
    expected = plain(x["sample"], 999, torch.zeros_like(x["text"]), x["camera"], views=4)
    assert max_abs_diff(ours(x["sample"], 999, pose=x["camera"], num_views=4), expected) < 2e-5


@pytest.mark.parametrize("config", [IMAGEDREAM, MVDREAM], ids=["ImageDream", "MVDream"])
def test_saved_under_our_names_it_is_the_same(config, tmp_path):
    theirs = write(tmp_path / "theirs", config)
    loaded = MultiViewUNet.from_pretrained(tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    again = MultiViewUNet.from_pretrained(tmp_path / "ours")
    assert again.config == loaded.config
    assert_equal_weights(again, loaded)
    left = loaded.state_dict()
    assert len(left) == len(theirs)
    assert sum(value.double().sum() for value in theirs.values()) == pytest.approx(
        sum(value.double().sum().item() for value in left.values())
    )


@torch.no_grad()
def test_both_passes_in_one_batch_with_everything_precomputed(imagedream):
    ours, plain = imagedream
    x = inputs()
    clip = torch.cat([torch.zeros_like(x["clip"]), x["clip"]])
    reference = torch.cat([torch.zeros_like(x["reference"]), x["reference"]])
    sample, camera, text = x["sample"].repeat(2, 1, 1, 1), x["camera"].repeat(2, 1), x["text"].repeat(2, 1, 1)
    expected = plain(sample, 20, text, camera, views=5, tokens=plain.tokens(clip.double()), reference=reference)
    conditioning = ours.precompute(
        pose=camera, image_embeds=ours.image_projection(clip), encoder_hidden_states=x["text"][:1]
    )
    assert conditioning.text_key_values[0].key.shape[0] == 1  # one text for all ten rows
    calls = []
    projections = [getattr(b.attn2, to) for b in ours.transformer_blocks() for to in ("to_k", "to_v", "to_k_ip")]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in projections]
    result = ours(sample, 20, conditioning=conditioning, num_views=5, reference_latents=reference)
    for hook in hooks:
        hook.remove()
    assert max_abs_diff(result, expected) < 2e-5
    assert not calls


@torch.no_grad()
def test_views_talk_across_positions_and_portraits_do_not(imagedream):
    block = imagedream[0].transformer_blocks()[0]
    x = torch.randn(6, 9, 32)
    changed = x.clone()
    changed[1, 4] = torch.randn(32)
    moved = (block(changed, num_views=3) - block(x, num_views=3)).abs().amax(-1)  # [6,9]
    assert (moved[:3] > 0).all()
    assert (moved[3:] == 0).all()


def test_backends_agree(imagedream):
    ours, x = imagedream[0], inputs()
    given = {"pose": x["camera"], "num_views": 5, "reference_latents": x["reference"]}

    def call():
        return ours(x["sample"], 7, x["text"], image_embeds=ours.image_projection(x["clip"]), **given)

    assert_backends_agree(ours, call, tolerance=2e-5)
    set_attention_backend(ours, "auto")


@pytest.mark.parametrize(
    "change,match",
    [
        ({"reference_latents": torch.zeros(2, 4, 8, 8)}, "reference_latents: expected \\[1, 4, 8, 8\\], got \\[2, 4"),
        (
            {"encoder_hidden_states": torch.zeros(3, 7, 40)},
            "encoder_hidden_states: expected a divisor of 5 rows, got 3",
        ),
        ({"image_embeds": torch.zeros(2, 5, 40)}, "image_embeds: expected 5 / num_views=5 portraits, got 2"),
    ],
)
@torch.no_grad()
def test_wrong_inputs_are_named(imagedream, change, match):
    x = inputs()
    with pytest.raises(ValueError, match=match):
        imagedream[0](x["sample"], 7, pose=x["camera"], num_views=5, **change)


@pytest.mark.parametrize(
    "change,word",
    [
        ({"use_scale_shift_norm": True}, "use_scale_shift_norm"),
        ({"resblock_updown": True}, "resblock_updown"),
        ({"num_head_channels": 7}, "num_head_channels=7"),
        ({"num_head_channels": -1}, "num_heads or num_head_channels"),
        ({"model_channels": 48}, "norm_num_groups"),
        ({"channel_mult": []}, "block_out_channels"),
        ({"context_dim": [40]}, "context_dim"),
        ({"attention_resolutions": [1]}, "unknown keys"),
        ({"num_res_blocks": 1}, "wrong shapes"),
        ({"ip_dim": 0}, "unknown keys"),
        ({"camera_dim": None}, "class_embedding.linear_1.weight"),
    ],
)
def test_a_configuration_that_contradicts(change, word, tmp_path):
    write(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(CheckpointError, match=word) as error:
        MultiViewUNet.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_every_misfit_is_listed(tmp_path):
    write(tmp_path)

    def spoil(tensors):
        del tensors["middle_block.1.norm.bias"], tensors["image_embed.latents"]
        tensors["label_emb.weight"] = torch.zeros(1)

    path = tmp_path / UNET_WEIGHTS
    edit_weights(path, spoil)
    named = (str(path), "mid_block.attentions.0.norm.bias", "image_projection.latents", "label_emb.weight")
    assert_lists(lambda: MultiViewUNet.from_pretrained(tmp_path), *named)
