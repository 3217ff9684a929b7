"""Checkpoints in 8-bit integers: saved, loaded, copied, and refused where they do not fit."""

import copy
import json

import pytest
import torch
from helpers import UNET_WEIGHTS, edit_json, edit_weights, normal, randomized
from safetensors.torch import load_file
from small_checkpoints import diffusers, multi_view_config, run, save_ip_adapter, save_lora, save_upsampler, stock_unet
from torch.utils._python_dispatch import TorchDispatchMode

import gafext
from gafext.checkpoints.assemble import assemble_unet
from gafext.checkpoints.describe import describe
from gafext.checkpoints.ip_adapter import load_ip_adapter
from gafext.checkpoints.mv_adapter import with_mv_adapter
from gafext.cli import main
from gafext.errors import CheckpointError
from gafext.models.int8 import is_quantized, quantize, unsupported_reasons
from gafext.models.int8_conv import Int8Conv3x3, Int8PatchConv
from gafext.models.unet import MultiViewUNet

pytestmark = pytest.mark.skipif(bool(unsupported_reasons(torch.device("cpu"))), reason="needs AVX2")

# Of every kind of 8-bit layer: 1x1 projections and shortcuts, 3x3 convolutions of stride 1 and 2, linear layers.
WIDE = {"block_out_channels": (128, 256), "attention_head_dim": (2, 4), "use_linear_projection": False}
INPUTS = {
    "sample": normal(2, 8, 8, 8, seed=1),
    "timestep": 301,
    "pose": normal(2, 12, seed=2),
    "image_embeds": normal(1, 5, 40, seed=3),
    "num_views": 2,
}
load = gafext.MultiViewDiffusionPipeline.from_pretrained


def wide_unet():
    unet = randomized(MultiViewUNet(multi_view_config(**WIDE)), seed=1).eval()
    quantize(unet)
    assert any(isinstance(module, Int8Conv3x3) for module in unet.modules())
    patches = [module for module in unet.modules() if isinstance(module, Int8PatchConv)]
    assert {(layer.kernel, layer.stride) for layer in patches} == {(1, 1), (3, 2)}
    return unet


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network of `WIDE`, and its folder, not to be written to."""
    unet = wide_unet()
    folder = tmp_path_factory.mktemp("unet")
    unet.save_pretrained(folder)
    return unet, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder, to be damaged."""
    copied = tmp_path / "unet"
    copied.mkdir()
    for path in saved[1].iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def assert_same_network(ours, expected):
    before, after = expected.state_dict(), ours.state_dict()
    assert before.keys() == after.keys()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())
    with torch.no_grad():
        assert torch.equal(ours(**INPUTS), expected(**INPUTS))


class LargestFloats(TorchDispatchMode):
    """Records the size of the largest floating-point tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.device.type == "cpu":
            self.numel = max(self.numel, out.numel())
        return out


def test_network_is_loaded_as_it_was_saved_and_never_in_float32(saved):
    unet, folder = saved
    with LargestFloats() as made:
        loaded = MultiViewUNet.from_pretrained(folder)
    assert_same_network(loaded, unet)
    assert loaded.config == unet.config and not loaded.training
    widest = max(value.numel() for value in unet.state_dict().values() if value.dtype == torch.int8)
    assert made.numel <= max(parameter.numel() for parameter in loaded.parameters()) < widest / 2


def test_copy_is_the_same_and_independent(saved):
    unet, _ = saved
    copied = copy.deepcopy(unet)
    assert_same_network(copied, unet)
    layer, original = (network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q for network in (copied, unet))
    layer.weight.zero_()
    assert original.weight.any()


def test_file_takes_a_quarter(saved, tmp_path):
    _, folder = saved
    exact = MultiViewUNet(multi_view_config(**WIDE))
    exact.save_pretrained(tmp_path)
    small, whole = ((place / UNET_WEIGHTS).stat().st_size for place in (folder, tmp_path))
    rounded = sum(value.numel() for value in load_file(folder / UNET_WEIGHTS).values() if value.dtype == torch.int8)
    assert small <= whole - 3 * rounded + 0.02 * whole  # the scales and their names
    assert small < 0.4 * whole  # the time embedding is not rounded, and has a large share of a network this small


def test_pipeline(checkpoint, tmp_path, capsys):
    save_upsampler(tmp_path / "float32" / "upsampler")
    for path in checkpoint.iterdir():
        (tmp_path / "float32" / path.name).symlink_to(path)
    rounded = load(tmp_path / "float32", dtype="int8", device="cpu")
    rounded.save_pretrained(tmp_path / "int8")
    expected = run(rounded).images
    for dtype in (None, "int8"):
        again = load(tmp_path / "int8", dtype=dtype, device="cpu")
        assert torch.equal(run(again).images, expected) and again.describe()["dtype"] == "int8"
    found = describe(tmp_path / "int8")
    assert found["refused"] is None and "int8" in found["parts"]["unet"]["dtype"]
    arguments = ["--views", "2", "--steps", "1", "--device", "cpu", "--quiet", "--out", str(tmp_path / "views")]
    assert main(["generate", "--model", str(tmp_path / "int8"), *arguments]) == 0
    assert json.loads((tmp_path / "views" / "run.json").read_text())["dtype"] == "int8"
    again.save_pretrained(tmp_path / "again")  # what was loaded is a view of a file
    assert (tmp_path / "again/unet" / UNET_WEIGHTS).read_bytes() == (tmp_path / "int8/unet" / UNET_WEIGHTS).read_bytes()


def test_saving_in_float32_again_leaves_no_trace(saved, folder):
    exact = MultiViewUNet(multi_view_config(**WIDE))
    exact.save_pretrained(folder)
    assert not is_quantized(MultiViewUNet.from_pretrained(folder, dtype=torch.bfloat16))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(saved, dtype):
    with pytest.raises(ValueError, match=rf"dtype: expected 'int8' or None for the 8-bit .*, got {dtype}\. To have"):
        MultiViewUNet.from_pretrained(saved[1], dtype=dtype)


def test_other_machines_are_refused(saved, checkpoint, tmp_path, pretend_cpu):
    quantized = load(checkpoint, dtype="int8", device="cpu")
    quantized.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a machine for 8-bit weights, but 8-bit layers are for CPUs \(dev"):
        MultiViewUNet.from_pretrained(saved[1], device="cuda")
    pretend_cpu("portable")
    with pytest.raises(ValueError, match=r"8-bit weights, but without AVX2 .* load the checkpoint that they were"):
        load(tmp_path, device="cpu")
    assert describe(tmp_path)["refused"] is None  # the folder is in order


def test_diffusers_refuses(saved):
    with pytest.raises(ValueError, match="Unknown quantization type, got gafext_int8"):
        diffusers.UNet2DConditionModel.from_pretrained(saved[1])


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WEIGHT, SCALE = f"{LAYER}.weight", f"{LAYER}.scale"
DAMAGES = {
    "scale that is no number": (lambda t: t[SCALE][3].fill_(torch.nan), "scale has 1 NaN or infinite values"),
    "weight beyond the rounding": (lambda t: t[WEIGHT][3, 3].fill_(-128), "weight has values up to 128"),
    "weight in float32": (lambda t: t.update({WEIGHT: t[WEIGHT].float()}), f"unknown keys (1):\n    {SCALE}"),
    "scale in 8 bits": (lambda t: t.update({SCALE: t[SCALE].char()}), "scale: expected one of the types"),
    "scale is gone": (lambda t: t.pop(SCALE), f"missing keys (1):\n    {SCALE}"),
    "scale of another width": (lambda t: t.update({SCALE: torch.ones(3)}), "expected [256], got [3]"),
    "scale of no layer": (lambda t: t.update({"conv_norm_out.scale": torch.ones(128)}), "unknown keys (1)"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights(folder, name):
    damage, words = DAMAGES[name]
    edit_weights(folder / UNET_WEIGHTS, damage)
    with pytest.raises(CheckpointError) as raised:
        MultiViewUNet.from_pretrained(folder)
    assert words in str(raised.value)


def test_damaged_files(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="quantization_config=.*bitsandbytes.*: expected one of"):
        MultiViewUNet.from_pretrained(folder)
    whole = (folder / UNET_WEIGHTS).read_bytes()
    (folder / UNET_WEIGHTS).write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        MultiViewUNet.from_pretrained(folder)


def test_changes_of_the_weights_are_refused(checkpoint, tmp_path):
    lora = save_lora(tmp_path / "lora.safetensors")
    rounded = load(checkpoint, dtype="int8", device="cpu", lora=lora)
    before = rounded.unet.state_dict()
    words = "expected floating-point weights, got 8-bit ones: make the change before they are rounded"
    for change in (lambda: rounded.load_lora_weights(lora), rounded.unload_lora_weights):
        with pytest.raises(ValueError, match=words):
            change()
    assert all(torch.equal(value, before[key]) for key, value in rounded.unet.state_dict().items())
    stock_unet().save_pretrained(tmp_path / "stock")
    stock = MultiViewUNet.from_pretrained(tmp_path / "stock")
    quantize(stock)
    for name, change in {
        "parent": lambda: assemble_unet(stock, image_embed_dim=24),
        "mv_adapter": lambda: with_mv_adapter(stock, tmp_path / "adapter.safetensors"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: {words}"):
            change()


def test_an_ip_adapter_in_float32_is_saved_beside(tmp_path):
    stock_unet().save_pretrained(tmp_path / "stock")
    unet = MultiViewUNet.from_pretrained(tmp_path / "stock")
    quantize(unet)
    load_ip_adapter(unet, save_ip_adapter(tmp_path / "adapter.safetensors"))
    unet.save_pretrained(tmp_path / "both")
    again = MultiViewUNet.from_pretrained(tmp_path / "both")
    given = {"sample": normal(2, 4, 8, 8), "timestep": 3, "image_embeds": normal(2, 4, 40, seed=1)}
    with torch.no_grad():
        assert torch.equal(again(**given), unet(**given))
