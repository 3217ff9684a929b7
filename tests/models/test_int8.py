"""The U-Net's linear layers in 8-bit integers."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import channels_last
from torch import nn

import gafext
from gafext.config import SD21_UNET
from gafext.models.attention import GEGLU
from gafext.models.blocks import Conv2d, Conv3x3, MultiViewTransformerBlock
from gafext.models.int8 import Int8Linear, is_quantized, quantize, quantize_transformers, unsupported_reasons
from gafext.models.int8_conv import Int8Conv3x3, Int8PatchConv
from gafext.models.unet import MultiViewUNet
from gafext.ops.backend import BACKENDS, set_attention_backend

pytestmark = pytest.mark.skipif(bool(unsupported_reasons(torch.device("cpu"))), reason="needs AVX2")


def relative_error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 65, 64)], ids=str)
def test_layer(shape, bias):
    linear = nn.Linear(64, 130, bias=bias)
    linear.weight[5] = 0.0  # a channel without a scale
    x = torch.randn(shape) * 30
    ours = Int8Linear(linear)(x)
    assert ours.shape == (*shape[:-1], 130) and ours.dtype == torch.float32
    assert 1e-4 < relative_error(ours, linear(x)) < 0.02
    assert torch.equal(Int8Linear(linear)(torch.zeros(shape)), linear(torch.zeros(shape)))
    assert Int8Linear(linear)(x.new_empty(0, 64)).shape == (0, 130)


@torch.no_grad()
def test_rows_do_not_depend_on_each_other():
    linear = nn.Linear(64, 130)
    x = torch.randn(9, 64) * torch.logspace(-2, 2, 9)[:, None]
    out = Int8Linear(linear)(x)
    for row in range(9):
        assert torch.equal(Int8Linear(linear)(x[row : row + 1])[0], out[row])
        assert relative_error(out[row], linear(x[row])) < 0.03


@torch.no_grad()
def test_layer_can_be_copied_pickled_and_compiled():
    layer, x = Int8Linear(nn.Linear(64, 32)), torch.randn(5, 64)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_weights_take_a_quarter_of_the_memory():
    linear = nn.Linear(640, 1280, bias=False)
    layer = Int8Linear(linear)
    assert sum(buffer.nbytes for buffer in layer.buffers()) < 0.26 * linear.weight.nbytes


@pytest.mark.parametrize("instruction_set", ["portable", "neon"])
def test_slow_products_are_refused_with_the_reason(pretend_cpu, instruction_set):
    pretend_cpu(instruction_set, int8_products="SDOT")
    assert bool(unsupported_reasons(torch.device("cpu"))) == (instruction_set == "portable")
    pretend_cpu(instruction_set, int8_products="NEON, as 16 bits")
    assert unsupported_reasons(torch.device("cpu"))[0].startswith("without AVX2 or SDOT there are no fast products")
    with pytest.raises(ValueError, match="got int8: without AVX2"):
        quantize_transformers(nn.Linear(2, 2))


def test_layer_refuses_what_it_is_not_for():
    layer = Int8Linear(nn.Linear(64, 32))
    with pytest.raises(ValueError, match="expected an input without gradient"):
        layer(torch.zeros(1, 64, requires_grad=True))
    with pytest.raises(ValueError, match="expected float32 or bfloat16 weights, got torch.float16"):
        quantize_transformers(nn.Linear(2, 2).half())
    with pytest.raises(ValueError, match="expected an input on the CPU, got meta"):
        layer(torch.zeros(1, 64, device="meta"))
    with pytest.raises(ValueError, match=r"8-bit layers are for CPUs \(device='cpu'\), got meta"):
        quantize_transformers(nn.Linear(2, 2, device="meta"))


@torch.no_grad()
def test_pipeline(checkpoint):
    exact = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
    rounded = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, dtype="int8", device="cpu")
    kept = [name for name, module in rounded.unet.named_modules() if isinstance(module, nn.Linear)]
    assert kept and not any(".transformer_blocks." in name for name in kept)
    assert is_quantized(rounded.unet) and not is_quantized(exact.unet)
    options = {"num_views": 2, "num_inference_steps": 2, "generator": 0, "output_type": "latent", "progress_bar": False}
    a, b = (pipe(gafext.PORTRAIT, **options) for pipe in (exact, rounded))
    assert 1e-5 < relative_error(b.images, a.images) < 0.1
    assert (a.run["dtype"], b.run["dtype"]) == ("float32", "int8")
    with pytest.raises(ValueError, match="expected float32 on the CPU for dtype='int8', got torch.float16"):
        rounded.to(torch.float16)
    rounded.to("cpu")


@torch.no_grad()
def test_the_rest_in_bfloat16(checkpoint, tmp_path):
    exact = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
    rounded = gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, dtype="int8-bfloat16", device="cpu")
    assert is_quantized(rounded.unet) and rounded.unet.dtype == torch.bfloat16
    options = {"num_views": 2, "num_inference_steps": 2, "generator": 0, "output_type": "latent", "progress_bar": False}
    a, b = (pipe(gafext.PORTRAIT, **options) for pipe in (exact, rounded))
    assert 1e-5 < relative_error(b.images.float(), a.images) < 0.1
    assert b.run["dtype"] == "int8-bfloat16"
    rounded.save_pretrained(tmp_path / "saved")
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert is_quantized(again.unet) and again.unet.dtype == torch.float32
    assert relative_error(again(gafext.PORTRAIT, **options).images, a.images) < 0.1


def test_what_ends_the_last_stages_residual_blocks_stays_in_floats():
    network = MultiViewUNet(
        replace(SD21_UNET, block_out_channels=(128, 128, 128, 128), attention_head_dim=(2, 2, 2, 2))
    )
    quantize(network.bfloat16())
    kinds = {path: type(layer) for path, layer in network.named_modules()}
    assert kinds["up_blocks.2.resnets.0.conv2"] is Int8Conv3x3 and kinds["up_blocks.3.resnets.0.conv2"] is Conv3x3
    assert kinds["up_blocks.3.resnets.0.conv1"] is Int8Conv3x3
    assert kinds["up_blocks.3.resnets.0.conv_shortcut"] is Conv2d
    assert kinds["up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"] is Int8Linear


@torch.no_grad()
def test_layers_that_add_the_residual_compute_the_same(monkeypatch):
    block = MultiViewTransformerBlock(64, 2, context_channels=48, cross_view="position", image_attention="block").eval()
    for path, layer in list(block.named_modules()):
        if type(layer) is nn.Linear:
            block.set_submodule(path, Int8Linear(layer))
    x, text, image = torch.randn(4, 9, 64), torch.randn(2, 5, 48), torch.randn(1, 3, 48)
    out = block(x, text, image_embeds=image, num_views=2)
    monkeypatch.setattr(Int8Linear, "adds_residual", False)
    assert relative_error(block(x, text, image_embeds=image, num_views=2), out) < 1e-6


@torch.no_grad()
def test_convolutions_are_saved_as_they_compute(tmp_path):
    """With AMX the first pass brings their weights into another memory format."""
    network = MultiViewUNet(
        replace(SD21_UNET, block_out_channels=(128, 128, 128, 128), attention_head_dim=(2, 2, 2, 2))
    )
    quantize(network.eval())
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(5.0), torch.randn(2, 7, 1024)
    expected = network(*inputs)
    network.save_pretrained(tmp_path / "saved")
    again = MultiViewUNet.from_pretrained(tmp_path / "saved", device="cpu")
    assert is_quantized(again) and torch.equal(again(*inputs), expected)
    assert torch.equal(copy.deepcopy(network)(*inputs), expected)


def test_dtype_is_checked(checkpoint):
    with pytest.raises(
        ValueError, match=r"dtype: expected a torch.dtype, None or one of .*'int8-bfloat16'\], got 'int4'"
    ):
        gafext.MultiViewDiffusionPipeline.from_pretrained(checkpoint, dtype="int4", device="cpu")


def test_command_line(checkpoint, tmp_path, capsys):
    from gafext.cli import main

    arguments = ["generate", "--model", str(checkpoint), "--views", "2", "--steps", "1", "--device", "cpu", "--quiet"]
    assert main([*arguments, "--dtype", "int8", "--out", str(tmp_path / "views")]) == 0
    assert json.loads((tmp_path / "views" / "run.json").read_text())["dtype"] == "int8"


LAYERS = {
    "linear": lambda: (nn.Linear(128, 128), Int8Linear),
    "3x3": lambda: (Conv3x3(128, 128), Int8Conv3x3),
    "1x1": lambda: (nn.Conv2d(128, 128, 1), Int8PatchConv),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_conversion_leaves_weights_and_scales(name):
    plain, kind = LAYERS[name]()
    layer, x = kind(plain), torch.randn(3, 128) if name == "linear" else channels_last(2, 128, 5, 5)
    expected = layer(x)
    halved = layer.to(torch.bfloat16)
    assert (halved.weight.dtype, halved.scale.dtype, halved.bias.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    assert halved(x.bfloat16()).dtype == torch.bfloat16
    back = halved.float()
    back.bias = plain.bias
    assert torch.equal(back(x), expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_not_rounded_are_refused(name, strict):
    plain, kind = LAYERS[name]()
    layer = kind(plain)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="weight: expected 8-bit integers, got torch.float32"):
        layer.load_state_dict(plain.state_dict(), strict=strict)
    assert torch.equal(layer.weight, before)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_of_attention_leaves_the_gate_in_8_bits(backend):
    gate, x = GEGLU(64, 128), torch.randn(3, 64)
    gate.proj = Int8Linear(gate.proj)
    expected = gate(x)
    set_attention_backend(gate, backend)
    assert torch.equal(gate(x), expected)
