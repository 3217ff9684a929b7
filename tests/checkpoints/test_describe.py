"""`gafext info --model` on every kind of folder and file: what it says is what loading does."""

import json

import plain_facelift
import plain_imagedream
import pytest
import torch
from helpers import UNET_WEIGHTS, edit_json, edit_weights
from safetensors.torch import load_file, save_file
from small_checkpoints import (
    multi_view_unet,
    save_checkpoint,
    save_ip_adapter,
    save_lora,
    save_upsampler,
    stock_clip,
    stock_text,
    stock_unet,
    stock_vae,
)

from gafext import MultiViewDiffusionPipeline
from gafext.checkpoints.describe import describe
from gafext.cli import main


def info(capsys, path, *options):
    """The exit code, the JSON on stdout, and stderr."""
    capsys.readouterr()  # what saving has written
    code = main(["info", "--json", "--model", str(path), *options])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_a_checkpoint(tmp_path, capsys):
    save_checkpoint(tmp_path)
    save_upsampler(tmp_path / "upsampler")
    edit_weights(tmp_path / "vae" / UNET_WEIGHTS, lambda t: t.update({key: v.half() for key, v in t.items()}))
    for name in ("README.md", "unet/custom.py", "safety_checker/model.safetensors", "unet/pytorch_model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "vae" / "diffusion_pytorch_model.non_ema.safetensors").touch()
    code, said, err = info(capsys, tmp_path)
    assert (code, err, said["refused"], said["notes"]) == (0, "", None, [])
    assert said["kind"].startswith("checkpoint") and said["family"] == "gaf"
    pipe = MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    networks = {"unet": pipe.unet, "vae": pipe.vae, "image_encoder": pipe.image_encoder}
    networks["upsampler/unet"] = pipe.upsampler.unet
    assert said["parts"].keys() == networks.keys()
    for name, network in networks.items():
        part = said["parts"][name]
        assert part["parameters"] == sum(value.numel() for value in network.state_dict().values())
        assert part["dtype"] == ("float16" if name == "vae" else "float32")
        assert part["bytes"] == sum((tmp_path / file).stat().st_size for file in part["files"]) > 0
        assert set(part["files"]) <= set(said["reads"])
    assert said["parts"]["unet"]["network"] == "MultiViewUNet"
    assert "scheduler/scheduler_config.json" in said["reads"]
    assert said["ignores"] == {
        "README.md": "not needed",
        "safety_checker/": "not a component that gafext has",
        "unet/custom.py": "code, never run",
        "unet/pytorch_model.bin": "pickled weights, never opened",
        "vae/diffusion_pytorch_model.non_ema.safetensors": "weights of another variant or layout",
    }
    for name in said["ignores"]:  # and loading does without them
        path = tmp_path / name
        [file.unlink() for file in (path.iterdir() if path.is_dir() else [path])]
    MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")

    assert main(["info", "--model", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("family: gaf", "vae: AutoencoderKL, float16, ", "size: ", "  unet/config.json")
    )


def test_no_value_of_the_weights_is_read(tmp_path, capsys):
    save_checkpoint(tmp_path)
    edit_weights(tmp_path / "unet" / UNET_WEIGHTS, lambda tensors: tensors["conv_in.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert info(capsys, tmp_path)[0] == 0
    pipe = MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="meta")
    assert all(value.is_meta for value in pipe.unet.parameters())


def test_a_family_with_a_text_encoder(tmp_path, capsys):
    save_checkpoint(tmp_path)
    resampler = {"resampler_width": 16, "resampler_depth": 1, "resampler_heads": 1, "image_tokens": 3}
    image = {"image_attention": "decoupled", "image_projection": "resampler", "image_embed_dim": 24, **resampler}
    pose = {"projection_class_embeddings_input_dim": 16}
    unet = multi_view_unet(cross_view="dense", image_unconditional="zero_features", **image, **pose)
    unet.save_pretrained(tmp_path / "unet")
    stock_text(hidden_size=40).save_pretrained(tmp_path / "text_encoder", variant="fp16")
    edit_json(tmp_path / "text_encoder" / "config.json", vocab_size=49408)
    code, said, err = info(capsys, tmp_path, "--variant", "fp16")
    assert code == 1 and "token_embedding.weight: expected [49408, 40], got [99, 40]" in err
    edit_json(tmp_path / "text_encoder" / "config.json", vocab_size=99)
    code, said, err = info(capsys, tmp_path, "--variant", "fp16")
    assert code == 1 and "expected token ids under the text encoder's vocab_size 99" in err
    stock_text(hidden_size=40, vocab_size=49408).save_pretrained(tmp_path / "text_encoder", variant="fp16")
    code, said, err = info(capsys, tmp_path, "--variant", "fp16")
    assert (code, said["family"]) == (0, "imagedream")
    assert said["parts"]["text_encoder"]["files"] == ["text_encoder/model.fp16.safetensors"]
    assert len(said["notes"]) == 3 and all("no weights of variant 'fp16'" in note for note in said["notes"])


def test_facelift_in_a_subfolder(tmp_path, capsys):
    plain_facelift.write(tmp_path / "mvdiffusion" / "pipeckpts")
    code, said, _ = info(capsys, tmp_path, "--subfolder", "mvdiffusion/pipeckpts")
    assert (code, said["family"]) == (0, "facelift")
    assert {"unet", "vae", "image_encoder", "image_normalizer"} <= said["parts"].keys()
    assert {"prompt_embeds.safetensors", "image_noising_scheduler/scheduler_config.json"} <= set(said["reads"])
    code, said, err = info(capsys, tmp_path)
    assert code == 1 and "got mvdiffusion" in err


def test_a_unet_of_another_class_is_described_as_it_loads(tmp_path, capsys):
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "unet" / "config.json", _class_name="SomebodysUNet")
    code, said, _ = info(capsys, tmp_path)
    MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert code == 0 and said["parts"]["unet"]["network"] == "SomebodysUNet"
    assert main(["info", "--variant", "fp16"]) == 1
    assert "expected --model with them" in capsys.readouterr().err


def test_a_unet_of_latent_diffusions_keys(tmp_path, capsys):
    plain_imagedream.write(tmp_path)
    code, said, _ = info(capsys, tmp_path)
    assert (code, said["family"]) == (0, "imagedream") and said["kind"].startswith("one network, for MultiViewUNet.")


def test_a_refusal_is_that_of_loading_beside_what_is_there(tmp_path, capsys):
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "unet" / "config.json", cross_attention_dim=48)
    code, said, err = info(capsys, tmp_path)
    with pytest.raises(ValueError) as caught:
        MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert code == 1 and said["refused"] == str(caught.value) and err == f"gafext: error: {caught.value}\n"
    assert said["parts"].keys() == {"unet", "vae", "image_encoder"}
    (tmp_path / "unet" / UNET_WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    code, said, err = info(capsys, tmp_path)
    assert code == 1 and "git-LFS pointer" in err and said["parts"].keys() == {"vae", "image_encoder"}


@pytest.mark.parametrize(
    ("save", "network"),
    [
        (stock_vae, "AutoencoderKL"),
        (stock_unet, "MultiViewUNet"),
        (stock_clip, "CLIPVisionEncoder"),
        (stock_text, "CLIPTextEncoder"),
    ],
)
def test_one_network(tmp_path, capsys, save, network):
    save().save_pretrained(tmp_path, max_shard_size="20KB")
    code, said, _ = info(capsys, tmp_path)
    (part,) = said["parts"].values()
    assert code == 0 and said["kind"] == f"one network, for {network}.from_pretrained" and len(part["files"]) > 1
    assert said["ignores"] == {}
    edit_json(tmp_path / "config.json", _class_name="FluxTransformer2DModel", model_type="bert")
    code, said, err = info(capsys, tmp_path)
    assert code == 1 and "got 'FluxTransformer2DModel'" in err


def test_a_latent_upsampler(tmp_path, capsys):
    save_upsampler(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    code, said, _ = info(capsys, tmp_path)
    assert code == 0 and said["kind"].startswith("latent upsampler") and said["parts"].keys() == {"unet"}


@pytest.mark.parametrize(
    ("tensors", "code", "words"),
    [
        (lambda path: save_lora(path), 0, "LoRA, for --lora"),
        (lambda path: save_ip_adapter(path), 0, "IP-Adapter, for --ip-adapter"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_mv.weight": 2}, 0, "MV-Adapter, for"),
        ({"lora_unet_x.lora_down.weight": 1, "lora_unet_x.dora_scale": 1}, 1, "got DoRA (lora_unet_x.dora_scale)"),
        ({"lora_unet_x.hada_w1_a": 1}, 1, "got LoHa"),
        ({"image_proj.proj.0.weight": 2, "image_proj.norm.weight": 1}, 1, "expected an IP-Adapter, plain, Plus or"),
        ({"image_proj_model.proj.3.weight": 1, "adapter_modules.1.to_k_ip.weight": 2}, 0, "full-face IP-Adapter"),
        ({"model.diffusion_model.out.2.weight": 4}, 1, "expected latent diffusion's keys model.diffusion_model"),
        ({"conv_in.weight": 4}, 1, "got the keys conv_in.weight. For the weights of one network, name the folder"),
        ({}, 1, "got the keys of no tensor"),
    ],
)
def test_a_file(tmp_path, capsys, tensors, code, words):
    path = tmp_path / "x.safetensors"
    if callable(tensors):
        tensors(path)
    else:
        save_file({key: torch.ones((2,) * ndim).bfloat16() for key, ndim in tensors.items()}, path)
    got, said, err = info(capsys, path)
    assert got == code and words in json.dumps(said) and (code == 0 or words in err)
    assert said["parts"]["file"]["parameters"] == sum(tensor.numel() for tensor in load_file(path).values())
    code, said, err = info(capsys, tmp_path)  # the folder of such a file
    assert code == 1 and "got x.safetensors. Name one of the files" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.ckpt", "Pickled weights can run code"),
        ("notes.txt", "expected a folder or a .safetensors file"),
        ("absent", "absent: no such folder"),
        ("empty", "got an empty folder"),
    ],
)
def test_anything_else_is_refused_with_the_reason(tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    for file in ("model.ckpt", "notes.txt"):
        (tmp_path / file).write_bytes(b"\x80\x04.")
    code, said, err = info(capsys, tmp_path / name)
    assert code == 1 and words in err and words in said["refused"] and "Traceback" not in err
    assert describe(tmp_path / name) == said
