"""diffusers' pipelines and networks with gafext's operations, against themselves without."""

import copy
import functools
import pickle

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from helpers import called, max_abs_diff, normal, randomized
from small_checkpoints import PIPELINES, stock_pipeline, stock_vae, wide_unet
from torch import nn

import gafext
from gafext.integrations.layers import Conv2d


def generate(pipe, **options):
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", **options}
    return pipe("a b ab", generator=torch.Generator().manual_seed(0), **options).images


@torch.no_grad()
def forward(unet):
    return unet(normal(2, 4, 16, 16), 7, normal(2, 5, unet.config.cross_attention_dim)).sample


def ip_adapter(unet, seed=0):
    """The tensors of an IP-Adapter file for a small U-Net."""
    cross = [name for name in unet.attn_processors if "attn2" in name]
    weights = {}
    for index in range(len(cross)):
        for which in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * index + 1}.{which}.weight"] = normal(128, 32, seed=seed + 7 * index) / 6
    proj = {
        "proj.weight": normal(4 * 32, 16),
        "proj.bias": normal(128),
        "norm.weight": normal(32),
        "norm.bias": normal(32),
    }
    return {"image_proj": proj, "ip_adapter": weights}


def layers(network):
    """All that `restore` has to give back."""
    return {
        path: (type(module), module.__dict__.get("forward"), module.__dict__.get("processor"))
        for path, module in network.named_modules()
    }


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_gives_the_same_images(kind, tmp_path):
    pipe = stock_pipeline(kind, tmp_path)
    stock = generate(pipe)
    before = {name: layers(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found = gafext.accelerate(pipe)
    assert not found.left_alone
    assert {"Attention", "GEGLU", "Conv2d", "Linear", "GroupNorm", "ResnetBlock2D", "CLIPTextModel"} <= set(
        found.swapped
    )
    assert max_abs_diff(generate(pipe), stock) <= 1e-4
    gafext.restore(pipe)
    assert {name: layers(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)} == before
    assert torch.equal(generate(pipe), stock)


@torch.no_grad()
def test_channels_last_weights_are_laid_out_once():
    unet = wide_unet().to(memory_format=torch.channels_last).eval()
    stock = forward(unet)
    gafext.accelerate(unet)
    assert max_abs_diff(forward(unet), stock) <= 1e-4
    convolutions = [layer for layer in unet.modules() if type(layer) is Conv2d and layer.kernel_size == (3, 3)]
    assert convolutions and all(layer.weight.is_contiguous() for layer in convolutions if layer.stride == (1, 1))


def test_results_have_the_stock_memory_format():
    unet, vae = wide_unet(), stock_vae((128, 128), norm_num_groups=8)
    gafext.accelerate(unet)
    gafext.accelerate(vae)
    assert forward(unet).is_contiguous()
    with torch.no_grad():
        assert vae(normal(1, 3, 64, 64)).sample.is_contiguous()


def test_its_kernels_run():
    unet = wide_unet()
    gafext.accelerate(unet)
    run = torch.no_grad()(functools.partial(unet, normal(2, 4, 32, 32), 7, normal(2, 77, 32)))
    assert {"gafext::flash_attention", "gafext::conv3x3", "gafext::geglu"} <= called(run)
    gafext.restore(unet)
    assert not [name for name in called(run) if name.startswith("gafext")]


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_ip_adapter(loaded, tmp_path):
    pipe = stock_pipeline("sd15", tmp_path)
    weights = ip_adapter(pipe.unet)
    embeds = [normal(2, 1, 16)]
    if loaded == "after":
        gafext.accelerate(pipe)
    pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    randomized(pipe.unet.encoder_hid_proj, seed=5)
    pipe.set_ip_adapter_scale(0.7)
    run = functools.partial(generate, pipe, ip_adapter_image_embeds=embeds)
    if loaded == "before":
        gafext.accelerate(pipe)
    assert not gafext.accelerate(pipe).left_alone
    ours = run()
    processors = dict(pipe.unet.attn_processors)
    gafext.restore(pipe)
    assert pipe.unet.attn_processors == processors
    stock = run()
    assert max_abs_diff(ours, stock) <= 1e-4
    gafext.accelerate(pipe)
    pipe.set_ip_adapter_scale(0.0)
    off = run()
    assert max_abs_diff(off, stock) > 1e-3
    pipe.unload_ip_adapter()
    assert max_abs_diff(generate(pipe), off) <= 1e-6


def test_masks_and_scale_lists_are_left_to_diffusers(tmp_path):
    pipe = stock_pipeline("sd15", tmp_path)
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    run = functools.partial(
        generate, pipe, ip_adapter_image_embeds=[normal(2, 1, 16)], cross_attention_kwargs={"ip_adapter_masks": [mask]}
    )
    stock = run()
    gafext.accelerate(pipe)
    assert max_abs_diff(run(), stock) <= 1e-4
    unet, mask = pipe.unet, torch.tensor([[1.0, 1, 0, 0, 0]])
    pipe.unload_ip_adapter()
    inputs = normal(1, 4, 16, 16), 7, normal(1, 5, 32)
    with torch.no_grad():
        ours = unet(*inputs, encoder_attention_mask=mask).sample
        assert max_abs_diff(ours, unet(*inputs).sample) > 1e-3
        gafext.restore(unet)
        assert max_abs_diff(ours, unet(*inputs, encoder_attention_mask=mask).sample) <= 1e-4


class TwiceProcessor(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_custom_processors_and_forwards_are_left_alone():
    unet = wide_unet()
    name, other = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "mid_block.attentions.0.proj_in"
    custom, norm = TwiceProcessor(), AttnProcessor()
    unet.get_submodule(name).set_processor(custom)
    unet.get_submodule(name.replace("attn1", "attn2")).set_processor(norm)
    unet.get_submodule(other).forward = lambda x: 0 * x
    stock = forward(unet)
    found = gafext.accelerate(unet)
    assert list(found.left_alone) == [name, name.replace("attn1", "attn2"), other]
    assert "TwiceProcessor" in found.left_alone[name] and "forward" in found.left_alone[other]
    assert max_abs_diff(forward(unet), stock) <= 1e-4
    assert unet.get_submodule(name).processor is custom
    gafext.restore(unet)
    assert torch.equal(forward(unet), stock)


def test_a_processor_set_afterwards_counts():
    unet = wide_unet()
    gafext.accelerate(unet)
    plain = forward(unet)
    unet.set_attn_processor(TwiceProcessor())
    twice = forward(unet)
    assert max_abs_diff(twice, plain) > 1e-3
    assert len(gafext.accelerate(unet).left_alone) == len(unet.attn_processors)
    gafext.restore(unet)
    assert max_abs_diff(forward(unet), twice) <= 1e-4


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_lora(loaded):
    unet = wide_unet()
    if loaded == "after":
        gafext.accelerate(unet)
    targets = ["to_q", "to_out.0", "conv1", "ff.net.0.proj", "ff.net.2"]
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    unet.eval()
    gafext.accelerate(unet)
    ours = forward(unet)
    gafext.restore(unet)
    assert max_abs_diff(ours, forward(unet)) <= 1e-4
    gafext.accelerate(unet)
    unet.disable_adapters()
    plain = forward(unet)
    assert max_abs_diff(plain, ours) > 1e-3
    unet.enable_adapters()
    unet.fuse_lora()
    assert max_abs_diff(forward(unet), ours) <= 1e-4


@pytest.mark.parametrize("hooked", ["before", "after"])
def test_offloading_hooks(hooked):
    unet = wide_unet()
    stock = forward(unet)
    if hooked == "after":
        gafext.accelerate(unet)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    gafext.accelerate(unet)
    assert unet.conv_in.weight.is_meta
    assert "gafext::geglu_gate" in called(forward, unet)
    assert max_abs_diff(forward(unet), stock) <= 1e-4
    gafext.restore(unet)
    assert torch.equal(forward(unet), stock)
    gafext.accelerate(unet)
    accelerate.hooks.remove_hook_from_submodules(unet)
    assert max_abs_diff(forward(unet), stock) <= 1e-4
    gafext.restore(unet)
    assert torch.equal(forward(unet), stock)
    assert type(unet.conv_in) is nn.Conv2d


def cast(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def offload(unet):
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


class Wrapping(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


def wrap(unet):
    for layer in unet.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            HookRegistry.check_if_exists_or_initialize(layer).register_hook(Wrapping(), "wrapping")


@pytest.mark.parametrize("hook", [cast, offload, wrap])
def test_restores_below_hooks_of_diffusers(hook):
    unet, stock = wide_unet(), wide_unet()
    gafext.accelerate(unet)
    hook(unet)
    hook(stock)
    assert "gafext::conv3x3" in called(forward, unet)
    assert max_abs_diff(forward(unet), forward(stock)) <= 1e-4
    gafext.restore(unet)
    assert not [name for name in called(forward, unet) if name.startswith("gafext")]
    assert torch.equal(forward(unet), forward(stock))


def test_hooks_of_layers_are_called():
    unet = wide_unet()
    gafext.accelerate(unet)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    seen = []
    for layer in (unet.down_blocks[0].resnets[0].norm1, block.ff.net[0].proj, block.attn1.to_q, block.attn1):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    forward(unet)
    assert seen == ["GroupNorm", "Linear", "Attention", "Linear"]


def test_compiles_without_a_graph_break():
    unet = wide_unet()
    block = unet.down_blocks[0]

    def run(x, embedding, text):
        x = block.resnets[0](x, embedding)
        return block.attentions[0](x, text, return_dict=False)[0]

    inputs = normal(2, 128, 16, 16), normal(2, 512), normal(2, 5, 32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        stock = run(*inputs)
        gafext.accelerate(unet)
        assert "gafext::geglu" in called(compiled, *inputs)
        assert max_abs_diff(compiled(*inputs), stock) <= 1e-4
        gafext.restore(unet)
        assert torch.equal(compiled(*inputs), run(*inputs))


def test_autoencoder():
    vae, images = stock_vae((128, 128), norm_num_groups=8), normal(2, 3, 64, 48)
    with torch.no_grad():
        stock = vae(images).sample
        assert gafext.accelerate(vae).swapped["Attention"] == 2
        assert max_abs_diff(vae(images).sample, stock) <= 1e-4
        vae.enable_tiling()
        vae.enable_slicing()
        assert vae(images).sample.shape == images.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    unet = wide_unet(block_out_channels=(32, 64))
    exact, inputs = forward(unet), (normal(2, 4, 16, 16).to(dtype), 7, normal(2, 5, 32).to(dtype))
    unet.to(dtype)
    with torch.no_grad():
        theirs = max_abs_diff(unet(*inputs).sample, exact)
        gafext.accelerate(unet)
        assert max_abs_diff(unet(*inputs).sample, exact) <= 2 * theirs


def test_training_gives_the_same_gradients():
    unet = wide_unet().train()
    inputs = normal(1, 4, 16, 16), 7, normal(1, 5, 32)
    gradients = []
    for step in (lambda: None, lambda: gafext.accelerate(unet)):
        step()
        unet.zero_grad()
        unet(*inputs).sample.square().mean().backward()
        gradients.append(unet.conv_in.weight.grad.clone())
    assert max_abs_diff(*gradients) <= 1e-5 * gradients[0].abs().max().item() + 1e-7


def test_copies_and_files(tmp_path):
    unet = wide_unet()
    stock = forward(unet)
    gafext.accelerate(unet)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert max_abs_diff(forward(other), stock) <= 1e-4
        gafext.restore(other)
        assert torch.equal(forward(other), stock)
    unet.save_pretrained(tmp_path)
    assert torch.equal(forward(diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()), stock)


def test_twice_is_once_and_restoring_nothing_is_nothing():
    unet = wide_unet()
    gafext.restore(unet)
    first = gafext.accelerate(unet)
    assert first.swapped["Attention"] == len(unet.attn_processors)
    assert gafext.accelerate(unet) == ({}, {})


@pytest.mark.parametrize("call", [gafext.accelerate, gafext.restore])
def test_other_objects_are_refused(call):
    with pytest.raises(TypeError, match=r"pipe: expected a diffusers pipeline or a torch.nn.Module, got str"):
        call("stabilityai/stable-diffusion-2-1")


def test_gafexts_own_networks_are_left_alone(pipe):
    """`quantize` and the others know their layers by the class."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    before = {name: layers(network) for name, network in networks.items()}
    assert gafext.accelerate(pipe) == ({}, {name: "it is gafext's own" for name in networks})
    found = gafext.accelerate(nn.ModuleDict({"unet": pipe.unet, "head": nn.Linear(4, 4)}))
    assert found == ({"Linear": 1}, {"unet": "it is gafext's own"})
    assert {name: layers(network) for name, network in networks.items()} == before
