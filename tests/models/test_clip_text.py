"""CLIPTextEncoder against transformers, on small checkpoints that transformers itself saves."""

import sys
from dataclasses import asdict, fields

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
    randomized,
    worst_difference,
)
from safetensors.torch import load_file
from small_checkpoints import SMALL_TEXT, stock_text, stock_tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from gafext.checkpoints.prompts import empty_prompt_ids, prompt_ids
from gafext.config import CLIP_VIT_H_14_TEXT, CLIP_VIT_L_14_TEXT, CLIPTextConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.clip_text import CLIPTextEncoder


def tokens(*, batch=3, length=12, end=98, seed=0):
    """Begin, words, and the end token at another place in each row, padded with it."""
    ids = torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 97
    for row in range(batch):
        ids[row, 2 + 3 * row :] = end
    return ids


@torch.no_grad()
def difference(ours, theirs, input_ids):
    expected = theirs(input_ids, output_hidden_states=True)
    names = {"last_hidden_state": expected.last_hidden_state, "unnormalized": expected.hidden_states[-1]}
    names |= {"penultimate": expected.hidden_states[-2], "pooled": expected.pooler_output}
    return worst_difference(ours(input_ids), names)


@pytest.fixture
def folder(tmp_path):
    stock_text().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {},  # as ViT-L
        {"hidden_act": "gelu", "eos_token_id": 2, "bos_token_id": 0},  # as ViT-H in Stable Diffusion 2
        {"hidden_size": 80, "num_attention_heads": 2, "max_position_embeddings": 77},  # heads 40 wide
        {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "layer_norm_eps": 1e-3},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_transformers(tmp_path, changes, seed):
    theirs = stock_text(seed=seed, **changes)
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextEncoder.from_pretrained(tmp_path)
    assert not ours.training and ours.dtype == torch.float32
    for length in (12, 9, 1):
        assert difference(ours, theirs, tokens(length=length, seed=seed)) < 1e-5


def test_pooling_finds_the_first_end_token_or_with_the_wrong_id_2_the_largest(tmp_path):
    ids = torch.tensor([[97, 5, 98, 7, 98], [97, 5, 6, 7, 8], [2, 98, 2, 98, 3], [98, 97, 2, 98, 1]])
    for end, expected in ((98, [2, 0, 1, 0]), (2, [2, 0, 1, 0]), (7, [3, 3, 0, 0])):
        theirs = stock_text(eos_token_id=end)
        theirs.save_pretrained(tmp_path)
        result = CLIPTextEncoder.from_pretrained(tmp_path)(ids)
        assert torch.equal(result.pooled, result.last_hidden_state[torch.arange(4), torch.tensor(expected)])
        assert max_abs_diff(result.pooled, theirs(ids).pooler_output) < 1e-5


@torch.no_grad()
def test_a_token_sees_only_those_before_it(folder):
    model, ids = CLIPTextEncoder.from_pretrained(folder), tokens()
    changed = ids.clone()
    changed[:, 7] = 5
    before, after = model(ids).last_hidden_state, model(changed).last_hidden_state
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(dim=-1).any()


def test_every_backend_gives_the_same(folder):
    model = CLIPTextEncoder.from_pretrained(folder)
    assert_backends_agree(model, lambda: model(tokens()).last_hidden_state, tolerance=1e-5)
    assert {layer.self_attn.attention_backend for layer in model.text_model.encoder.layers} == {"reference"}


def test_every_spelling_of_the_keys(folder, tmp_path):
    plain = CLIPTextEncoder.from_pretrained(folder)
    theirs = stock_text(kind=CLIPTextModelWithProjection)
    theirs.save_pretrained(folder)
    names = set(load_file(folder / WEIGHTS))
    assert "text_projection.weight" in names and "text_model.final_layer_norm.bias" in names
    edit_weights(
        folder / WEIGHTS, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(12).view(1, -1)})
    )
    ours = CLIPTextEncoder.from_pretrained(folder)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert difference(ours, theirs.text_model, tokens()) < 1e-5


def test_the_text_tower_of_a_full_model(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=SMALL_TEXT, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    theirs = randomized(transformers.CLIPModel(config), seed=0).eval()
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextEncoder.from_pretrained(tmp_path)
    assert difference(ours, theirs.text_model, tokens()) < 1e-5
    edit_json(tmp_path / "config.json", text_config=[1])
    with pytest.raises(CheckpointError, match="text_config: expected an object"):
        CLIPTextEncoder.from_pretrained(tmp_path)


def test_published_sizes():
    with torch.device("meta"):
        sizes = [
            (sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict()))
            for model in map(CLIPTextEncoder, (CLIP_VIT_L_14_TEXT, CLIP_VIT_H_14_TEXT))
        ]
    assert sizes == [(123_060_480, 196), (340_387_840, 372)]


def test_what_it_saves_transformers_loads(folder, tmp_path):
    ours = CLIPTextEncoder.from_pretrained(folder)
    assert difference(ours, loaded_by(CLIPTextModel, ours, tmp_path / "saved"), tokens()) < 1e-5


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 13, dtype=torch.int64), r"expected \(B,T\), T from 1 to 12, got \(1, 13\)"),
        (torch.zeros(5, dtype=torch.int64), r"expected \(B,T\).* got \(5,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"expected \(B,T\).* got \(1, 0\)"),
        (torch.zeros(1, 4), "expected int64 or int32, got torch.float32"),
        (torch.tensor([[3, 99]]), r"expected 0 to 98, got \[3, 99\]"),
        (torch.tensor([[-1, 4]]), r"expected 0 to 98, got \[-1, 4\]"),
    ],
)
def test_ids_of_a_wrong_shape_type_or_range(folder, ids, message):
    with pytest.raises(ValueError, match=f"input_ids: {message}"):
        CLIPTextEncoder.from_pretrained(folder)(ids)


def test_every_key_that_does_not_fit_is_listed(folder):
    def spoil(tensors):
        del tensors["final_layer_norm.weight"]
        tensors["encoder.layers.0.extra.bias"] = torch.zeros(3)
        tensors["encoder.layers.1.mlp.fc1.bias"] = torch.zeros(63)

    edit_weights(folder / WEIGHTS, spoil)
    assert_lists(
        lambda: CLIPTextEncoder.from_pretrained(folder),
        *("missing keys (1)", "text_model.final_layer_norm.weight"),
        *("unknown keys (1)", "text_model.encoder.layers.0.extra.bias"),
        *("wrong shapes (1)", "text_model.encoder.layers.1.mlp.fc1.bias: expected [64], got [63]"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"missing keys .*encoder\.layers\.3\.mlp\.fc2\.weight"),
        ({"vocab_size": 100}, r"token_embedding\.weight: expected \[100, 32\], got \[99, 32\]"),
        ({"num_attention_heads": 3}, "hidden_size=32 does not divide into num_attention_heads=3"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"model_type": "clip_vision_model"}, "model_type='clip_vision_model'"),
        ({"rope_theta": 1e4}, "rope_theta=10000.0 is not known"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"hidden_size": 0}, "hidden_size=0: expected 1 to 65536"),
    ],
)
def test_a_config_that_contradicts_the_weights_or_is_not_supported(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        CLIPTextEncoder.from_pretrained(folder)


def test_a_key_left_out_means_transformers_default():
    theirs = transformers.CLIPTextConfig()
    assert asdict(CLIPTextConfig()) == {field.name: getattr(theirs, field.name) for field in fields(CLIPTextConfig)}


@pytest.mark.parametrize("changes", [{}, {"pad_token": "!"}, {"pad_token": {"__type": "AddedToken", "content": "!"}}])
@pytest.mark.parametrize("resaved", [False, True])
def test_prompt_ids_equal_transformers(tmp_path, changes, resaved):
    folder = stock_tokenizer(tmp_path / "tokenizer", **changes)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    if resaved:  # transformers 5 writes one tokenizer.json instead
        folder = tmp_path / "resaved"
        tokenizer.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    for length in (7, 2, 1):
        expected = tokenizer([""], padding="max_length", max_length=max(length, 2), truncation=True).input_ids
        assert empty_prompt_ids(folder, length).tolist() == [row[:length] for row in expected]
    assert torch.equal(prompt_ids(folder, "", 7), empty_prompt_ids(folder, 7))
    pad = 0 if changes else 9
    assert prompt_ids(folder, ["AB c", "a " * 9], 6).tolist() == [[8, 7, 6, 9, pad, pad], [8, 4, 4, 4, 4, 9]]


@pytest.mark.parametrize("added", [False, True])
def test_which_file_of_special_tokens_goes_first(added, tmp_path):
    folder = stock_tokenizer(tmp_path / "tokenizer")
    end = transformers.CLIPTokenizer.from_pretrained(folder).eos_token
    (folder / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    edit_json(folder / "tokenizer_config.json", pad_token=end, **({"added_tokens_decoder": {}} if added else {}))
    expected = transformers.CLIPTokenizer.from_pretrained(folder)([""], padding="max_length", max_length=7).input_ids
    assert empty_prompt_ids(folder, 7).tolist() == expected
    assert torch.equal(prompt_ids(folder, "", 7), empty_prompt_ids(folder, 7))


def test_empty_prompt_without_tokenizer_files_is_vit_l_s(tmp_path):
    assert empty_prompt_ids(tmp_path / "nowhere", 5).tolist() == [[49406, 49407, 49407, 49407, 49407]]
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    assert empty_prompt_ids(tmp_path, 4).tolist() == [[49406, 49407, 0, 0]]


def test_tokenizers_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(CheckpointNotFoundError, match="nowhere: no such folder"):
        prompt_ids(tmp_path / "nowhere", "a", 5)
    folder = stock_tokenizer(tmp_path / "tokenizer", pad_token="<pad>")
    with pytest.raises(CheckpointError, match=r"the vocabulary lacks the tokens \['<pad>'\]"):
        empty_prompt_ids(folder, 5)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vocab\.json: not readable as JSON"):
        empty_prompt_ids(folder, 5)
    with pytest.raises(CheckpointError, match="not readable as a CLIP tokenizer"):
        prompt_ids(folder, "a", 5)
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer with a vocabulary"):
        empty_prompt_ids(folder, 5)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="needs transformers"):
        prompt_ids(folder, "a", 5)
