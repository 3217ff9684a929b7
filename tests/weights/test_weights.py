"""Every layout of checkpoint files, and what loading costs."""

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from helpers import assert_equal_weights, edit_json, edit_weights, max_abs_diff
from safetensors.torch import load_file, save_file
from small_checkpoints import stock_clip, stock_unet, stock_vae

from gafext import weights
from gafext.config import UNetConfig, VAEConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError, OutputError
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.clip_text import CLIPTextEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL

STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_variants_are_exact(tmp_path, variant):
    models = {name: stock_vae(seed=seed) for seed, name in enumerate([None, "fp16", "non_ema"])}
    for name, model in models.items():
        model.save_pretrained(tmp_path, variant=name)
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path, variant=variant), models[variant])


def test_a_missing_variant_lists_what_is_there(tmp_path):
    stock_vae().save_pretrained(tmp_path)
    stock_vae().save_pretrained(tmp_path, variant="non_ema", max_shard_size="20KB")
    with pytest.raises(CheckpointNotFoundError, match=rf"{STEM}\.fp16\.safetensors: .*; variants: None, non_ema\)"):
        AutoencoderKL.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    ("stock", "ours", "size"), [(stock_vae, AutoencoderKL, "20KB"), (stock_clip, CLIPVisionEncoder, "5KB")]
)
def test_shards(tmp_path, stock, ours, size, variant):
    theirs = stock()
    theirs.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_weights(ours.from_pretrained(tmp_path, variant=variant), theirs)


@pytest.mark.parametrize("name", [f"{STEM}.fp16.safetensors.index.json", f"{STEM}.safetensors.fp16.index.json"])
def test_older_names_of_a_variants_index(tmp_path, name):
    theirs = stock_vae()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    (tmp_path / f"{STEM}.safetensors.index.fp16.json").rename(tmp_path / name)
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path, variant="fp16"), theirs)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda places: places.pop("quant_conv.bias"), r"misplaced \(1\):\s+quant_conv\.bias: None, found in"),
        (lambda places: places.update(extra=max(places.values())), r"extra: .*, found in None"),
        (lambda places: places.update({"quant_conv.bias": "other.safetensors"}), r"other\.safetensors: no such file"),
        (lambda places: places.update({"quant_conv.bias": "../x.safetensors"}), "weight_map: expected"),
        (lambda places: places.update({"quant_conv.bias": 7}), "weight_map: expected"),
        (lambda places: places.clear(), r"missing keys \(\d+\)"),
    ],
)
def test_an_index_that_does_not_tell_the_truth(tmp_path, edit, message):
    stock_vae().save_pretrained(tmp_path, max_shard_size="20KB")
    edit_json(tmp_path / f"{STEM}.safetensors.index.json", lambda index: edit(index["weight_map"]))
    with pytest.raises(CheckpointError, match=message) as caught:
        AutoencoderKL.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_saving_over_shards_leaves_none_of_them(tmp_path):
    stock_vae(seed=0).save_pretrained(tmp_path, max_shard_size="20KB")
    stock_vae(seed=1).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    new = AutoencoderKL.from_pretrained(tmp_path, variant="fp16")
    new.save_pretrained(tmp_path)
    assert_equal_weights(diffusers.AutoencoderKL.from_pretrained(tmp_path), new.state_dict())
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path), new.state_dict())
    assert_equal_weights(
        AutoencoderKL.from_pretrained(tmp_path, variant="fp16"), new.state_dict()
    )  # another variant stays


@pytest.mark.parametrize("ones", [1, 2])
def test_attention_stored_as_1x1_convolutions(tmp_path, ones):
    theirs = stock_vae()
    theirs.save_pretrained(tmp_path)

    def add_dimensions(tensors):
        for key, value in tensors.items():
            if re.search(r"attentions\.0\.to_.+weight", key):
                tensors[key] = value.view(*value.shape, *[1] * ones)

    edit_weights(tmp_path / f"{STEM}.safetensors", add_dimensions)
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path), theirs)


# Names of single files of Stable Diffusion 2, as the published converters have them: four stages, two layers.


def ldm_unet_names():
    names = {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
    names |= {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    names |= {"mid_block.attentions.0.": "middle_block.1."}
    names |= {f"mid_block.resnets.{i}.": f"middle_block.{2 * i}." for i in range(2)}
    for stage in range(4):
        for layer in range(2):
            names[f"down_blocks.{stage}.resnets.{layer}."] = f"input_blocks.{3 * stage + layer + 1}.0."
            names[f"down_blocks.{stage}.attentions.{layer}."] = f"input_blocks.{3 * stage + layer + 1}.1."
        for layer in range(3):
            names[f"up_blocks.{stage}.resnets.{layer}."] = f"output_blocks.{3 * stage + layer}.0."
            names[f"up_blocks.{stage}.attentions.{layer}."] = f"output_blocks.{3 * stage + layer}.1."
        names[f"down_blocks.{stage}.downsamplers.0.conv."] = f"input_blocks.{3 * (stage + 1)}.0.op."
        names[f"up_blocks.{stage}.upsamplers.0."] = f"output_blocks.{3 * stage + 2}.{2 if stage else 1}."
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    return names, {**resnet, "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def ldm_vae_names():
    names = {"mid_block.attentions.0.": "mid.attn_1."} | {
        f"mid_block.resnets.{i}.": f"mid.block_{i + 1}." for i in (0, 1)
    }
    for stage in range(4):
        names |= {f"encoder.down_blocks.{stage}.resnets.{i}.": f"encoder.down.{stage}.block.{i}." for i in range(2)}
        names |= {f"decoder.up_blocks.{stage}.resnets.{i}.": f"decoder.up.{3 - stage}.block.{i}." for i in range(3)}
        names[f"down_blocks.{stage}.downsamplers.0."] = f"down.{stage}.downsample."
        names[f"up_blocks.{stage}.upsamplers.0."] = f"up.{3 - stage}.upsample."
    inside = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm"}
    return names, {**inside, "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}


def renamed(tensors, names, inside, prefix):
    result = {}
    for key, value in tensors.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if "transformer_blocks" not in key:  # their inside is called the same
            for ours, theirs in inside.items():
                key = key.replace(ours, theirs)
        result[prefix + key] = value.view(*value.shape, 1, 1) if ".attn_1." in key and value.ndim == 2 else value
    return result


def open_clip(tensors, layers):
    """transformers' text tower under OpenCLIP's names, with the last layer that Stable Diffusion 2 does not read."""
    names = {"encoder.layers.": "resblocks.", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    result = {"logit_scale": torch.zeros(()), "text_projection": torch.zeros(64, 64), "positional_embedding": None}
    for key, value in tensors.items():
        key = key.removeprefix("text_model.").replace("final_layer_norm", "ln_final").replace("self_attn.", "attn.")
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        result["transformer." + key if key.startswith("resblocks") else key.removeprefix("embeddings.")] = value
    result["positional_embedding"] = result.pop("position_embedding.weight")
    for layer in range(layers):
        for kind in ("weight", "bias"):
            block = f"transformer.resblocks.{layer}.attn"
            parts = [result.pop(f"{block}.{which}_proj.{kind}") for which in "qkv"]
            result[f"{block}.in_proj_{kind}"] = torch.cat(parts)
    first = {key: value for key, value in result.items() if ".resblocks.0." in key}
    result |= {key.replace(".0.", f".{layers}.", 1): value + 1 for key, value in first.items()}
    return {f"cond_stage_model.model.{key}": value.clone() for key, value in result.items()}


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """One file as Stable Diffusion 2.1's, at small widths, and the three stock networks in it."""
    sizes = {"block_out_channels": (64, 64, 128, 128), "attention_head_dim": (1, 1, 2, 2), "cross_attention_dim": 64}
    unet = stock_unet(sizes, seed=0, use_linear_projection=True, norm_num_groups=32, sample_size=None)
    vae = stock_vae((32, 32, 64, 64), seed=1, layers_per_block=2, norm_num_groups=32)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    words = {"vocab_size": 40, "max_position_embeddings": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = stock_clip({**sizes, **words, "hidden_act": "gelu"}, kind=transformers.CLIPTextModel, seed=2)
    stock = {"unet": unet, "vae": vae, "text": text}
    tensors = renamed(unet.state_dict(), *ldm_unet_names(), "model.diffusion_model.")
    tensors |= renamed(vae.state_dict(), *ldm_vae_names(), "first_stage_model.")
    tensors |= open_clip(text.state_dict(), layers=2)
    tensors |= {
        "betas": torch.zeros(9),
        "model_ema.decay": torch.zeros(()),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    path = tmp_path_factory.mktemp("single") / "sd.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path, stock


def test_a_file_that_cannot_be_written(tmp_path):
    path = tmp_path / "none" / "x.safetensors"
    with pytest.raises(OutputError, match=f"{path}: cannot be written"):
        weights.save_tensors({"x": torch.zeros(9, 9).T}, path)


def test_a_single_file_gives_every_network(single_file):
    path, stock = single_file
    unet = MultiViewUNet.from_single_file(path)
    assert_equal_weights(unet, stock["unet"])
    assert unet.config == dataclasses.replace(
        UNetConfig.from_dict(dict(stock["unet"].config)), sample_size=None, attention_head_dim=(1, 1, 2, 2)
    )
    vae = AutoencoderKL.from_single_file(path)
    assert_equal_weights(vae, stock["vae"])
    assert vae.config == VAEConfig.from_dict(dict(stock["vae"].config))
    text = CLIPTextEncoder.from_single_file(path)
    ids = torch.tensor([[1, 5, 7, 2, 2]])
    assert max_abs_diff(text(ids).last_hidden_state, stock["text"](ids).last_hidden_state) < 1e-5


def test_a_single_file_equals_diffusers_converter(single_file):
    path, stock = single_file
    tensors = load_file(path)
    assert_equal_weights(
        MultiViewUNet.from_single_file(path),
        single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), stock["unet"].config),
    )
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), stock["vae"].config)
    assert_equal_weights(AutoencoderKL.from_single_file(path), vae)
    text = single_file_utils.convert_open_clip_checkpoint(stock["text"], dict(tensors))
    text.pop("text_projection.weight", None)
    third = {key for key in text if ".layers.2." in key}  # diffusers knows only layer 23 as the one not read
    assert len(third) == 16
    assert_equal_weights(
        CLIPTextEncoder.from_single_file(path), {key: value for key, value in text.items() if key not in third}
    )


def test_a_single_file_of_one_network_without_a_prefix(single_file, tmp_path):
    path, stock = single_file
    own = {
        k.removeprefix("first_stage_model."): v for k, v in load_file(path).items() if k.startswith("first_stage_model")
    }
    save_file(own, tmp_path / "vae.safetensors")
    assert_equal_weights(AutoencoderKL.from_single_file(tmp_path / "vae.safetensors"), stock["vae"])


def test_single_files_that_do_not_fit(single_file, tmp_path):
    path, stock = single_file
    with pytest.raises(CheckpointError, match=r"sd\.safetensors: single-file checkpoints hold no .*CLIPVisionConfig"):
        CLIPVisionEncoder.from_single_file(path)
    tensors = load_file(path)
    tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(3)
    del tensors["model.diffusion_model.output_blocks.3.0.in_layers.2.bias"]
    save_file(tensors, tmp_path / "odd.safetensors")
    message = r"(?s)missing keys \(1\):\s+up_blocks\.1\.resnets\.0\.conv1\.bias.*unknown keys \(1\):\s+label_emb"
    with pytest.raises(CheckpointError, match=message):
        MultiViewUNet.from_single_file(tmp_path / "odd.safetensors")
    stock["vae"].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected latent diffusion's keys first_stage_model\.\*"):
        AutoencoderKL.from_single_file(tmp_path / f"{STEM}.safetensors")
    torch.save({}, tmp_path / "sd.ckpt")
    with pytest.raises(CheckpointError, match=r"sd\.ckpt: .*torch\.load\('sd\.ckpt'.*'sd\.safetensors'\)"):
        MultiViewUNet.from_single_file(tmp_path / "sd.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"none\.safetensors: no such file"):
        MultiViewUNet.from_single_file(tmp_path / "none.safetensors")


def test_the_conversion_command_converts(tmp_path):
    model = stock_vae()
    torch.save({"state_dict": model.state_dict()}, tmp_path / f"{STEM}.bin")
    model.save_config(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKL.from_pretrained(tmp_path)
    code = re.search(r'python -c "(.*)"', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("variant", [None, "non_ema"])
def test_the_conversion_command_takes_all_shards_and_the_right_variant(tmp_path, variant):
    model, other = stock_vae(), stock_vae()
    with torch.no_grad():
        other.decoder.conv_in.bias.add_(1)
    model.save_pretrained(tmp_path, safe_serialization=False, variant=variant, max_shard_size="20KB")
    other.save_pretrained(tmp_path, safe_serialization=False, variant="fp16")
    torch.save({}, tmp_path / "optimizer.bin")
    assert len(list(tmp_path.glob("*-of-*.bin"))) > 4
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKL.from_pretrained(tmp_path, variant=variant)
    code = re.search(r'python -c "(.*)"', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path, variant=variant), model)
    with pytest.raises(CheckpointNotFoundError, match="no such file .*pickles: .*optimizer.bin"):
        AutoencoderKL.from_pretrained(tmp_path, variant="fp8")


def is_mapped(tensor, path):
    """Whether a tensor's memory is a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.endswith(str(path))
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_weights_are_the_mapped_file_until_they_are_written(tmp_path):
    stock_vae().save_pretrained(tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    before = path.read_bytes()
    model, other = (AutoencoderKL.from_pretrained(tmp_path) for _ in range(2))
    assert all(is_mapped(value, path) for value in model.state_dict().values())
    half = AutoencoderKL.from_pretrained(tmp_path, dtype=torch.float16)
    assert not any(is_mapped(value, path) for value in half.state_dict().values())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.decode(torch.ones(1, 4, 2, 2)).sum().backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert not torch.equal(model.decoder.conv_in.weight, other.decoder.conv_in.weight)
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path), other.state_dict())

    kept = {key: value.clone() for key, value in other.state_dict().items()}
    model.save_pretrained(tmp_path)  # over the file that both are mapped from
    assert_equal_weights(AutoencoderKL.from_pretrained(tmp_path), model.state_dict())
    assert_equal_weights(other, kept)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private mappings on Linux alone")
@pytest.mark.parametrize(("dtype", "times"), [("float16", 1.0), ("float32", 3.0)])
def test_loading_makes_no_second_copy(tmp_path, dtype, times):
    """A limit on memory of 0.3 of the file above what the weights take: the mapped file, and what is converted."""
    code = f"""
        import re, resource, torch
        from dataclasses import dataclass
        from pathlib import Path
        from safetensors.torch import save_file
        from gafext.config import Config
        from gafext.models.base import PretrainedModel

        @dataclass(frozen=True)
        class Sizes(Config):
            layers: int = 8

        class Stack(PretrainedModel):
            config_class = Sizes
            def __init__(self, config):
                super().__init__(config)
                self.layers = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(config.layers))

        folder = Path({str(tmp_path)!r})
        tensors = {{f"layers.{{i}}.weight": torch.full((2048, 2048), i + 0.5).half() for i in range(8)}}
        save_file(tensors, folder / "{STEM}.safetensors")
        (folder / "config.json").write_text("{{}}")
        size = sum(tensor.nbytes for tensor in tensors.values())
        del tensors
        used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(({times} + 0.3) * size), -1))
        model = Stack.from_pretrained(folder, dtype=torch.{dtype})
        assert [layer.weight[0, 0].item() for layer in model.layers] == [i + 0.5 for i in range(8)]
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def test_values_that_a_narrower_type_cannot_hold(tmp_path):
    stock_vae().save_pretrained(tmp_path)
    edit_weights(tmp_path / f"{STEM}.safetensors", lambda tensors: tensors["quant_conv.bias"][2].fill_(-70_000.0))
    assert AutoencoderKL.from_pretrained(tmp_path, dtype=torch.bfloat16).quant_conv.bias[2] == -70_144
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias has values up to 70000, over torch\.float16's"):
        AutoencoderKL.from_pretrained(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_of_any_type_is_found(tmp_path, dtype, value):
    for place in (0, 123_456, 199_999):
        tensor = torch.ones(200_000, dtype=dtype)
        tensor[place] = value
        save_file({"x": tensor}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"x\.safetensors: x has 1 NaN or infinite values"):
            weights.WeightFile(tmp_path / "x.safetensors").tensor("x")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_types_that_are_no_weights(tmp_path, dtype):
    save_file({"x": torch.ones(3).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: x: expected one of the types \('F64'"):
        weights.WeightFile(tmp_path / "x.safetensors").tensor("x")


def test_empty_tensors_and_rows(tmp_path):
    save_file({"empty": torch.zeros(0, 3), "qkv": torch.arange(6.0).view(6, 1)}, tmp_path / "x.safetensors")
    file = weights.WeightFile(tmp_path / "x.safetensors", lambda key: ("q", "k", "v") if key == "qkv" else key)
    assert file.tensor("empty").shape == (0, 3)
    assert [file.tensor(key).flatten().tolist() for key in "qkv"] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(CheckpointError, match=r"k: expected 4 tensors in one, got \[2, 1\]|qkv: expected 4 tensors"):
        weights.WeightFile(tmp_path / "x.safetensors", lambda key: tuple("abcd") if key == "qkv" else key)
