"""Weights that rest in main memory: the numbers, where weights are during a run, and after it."""

import copy

import pytest
import torch
from helpers import HAS_CUDA, UNET_WEIGHTS
from safetensors.torch import load_file
from small_checkpoints import (
    multi_view_config,
    portrait,
    run,
    save_checkpoint,
    save_ip_adapter,
    save_lora,
    save_upsampler,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gafext import MultiViewDiffusionPipeline, MultiViewUNet
from gafext.models.offload import Offload

COPIES = {"aten::_to_copy", "aten::detach", "aten::clone", "aten::empty_like", "aten::copy_"}


class Uses(TorchDispatchMode):
    """Operations that compute with some tensors' memory."""

    def __init__(self, tensors):
        super().__init__()
        self.memory, self.seen = {tensor.data_ptr() for tensor in tensors if tensor.numel()}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        name = function._schema.name
        if name not in COPIES and any(leaf.data_ptr() in self.memory for leaf in leaves):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def weights(pipe):
    networks = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    return {id(network): list(network.parameters()) for network in networks}


@pytest.fixture(autouse=True)
def linear_layers_are_pytorchs(pretend_cpu):
    """As one with hooks always is: the kernel for AMX has other bits."""
    pretend_cpu("avx512")


@pytest.fixture
def pipe(checkpoint, tmp_path):
    pipe = MultiViewDiffusionPipeline.from_pretrained(checkpoint, device="cpu")
    pipe.upsampler = save_upsampler(tmp_path / "upsampler")
    return pipe


ENABLE = ["enable_model_cpu_offload", "enable_sequential_cpu_offload"]


@pytest.mark.parametrize("enable", ENABLE)
def test_offloading_computes_the_same_with_copies_alone(pipe, enable):
    """The device is the CPU, where the weights are copied as they would be to a GPU: no resting weight is used."""
    expected = run(pipe, guidance_scale=2.0)
    getattr(pipe, enable)(device="cpu")
    resting = [parameter for parameters in weights(pipe).values() for parameter in parameters]
    places = [parameter.data_ptr() for parameter in resting]
    with Uses(resting) as uses:
        ours = run(pipe, guidance_scale=2.0)
    assert torch.equal(ours.images, expected.images)
    assert not uses.seen
    assert [parameter.data_ptr() for parameter in resting] == places
    pipe.remove_all_hooks()
    with Uses(resting) as uses:
        assert torch.equal(run(pipe, guidance_scale=2.0).images, expected.images)
    assert len(uses.seen) > 100


@pytest.mark.parametrize("enable", ENABLE)
def test_one_part_at_a_time_is_on_the_device(pipe, enable):
    getattr(pipe, enable)(device="cpu")
    home = {id(p): p.data_ptr() for parameters in weights(pipe).values() for p in parameters}
    order, most = [], 0
    names = {id(part): name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}

    def note(module, args):
        nonlocal most
        moved = {
            names[network]: sum(p.numel() for p in parameters if p.data_ptr() != home[id(p)])
            for network, parameters in weights(pipe).items()
        }
        present = [name for name, count in moved.items() if count]
        assert len(present) <= 1
        most = max(most, *moved.values())
        if present and order[-1:] != present:
            order.extend(present)

    for network in (pipe.unet, pipe.vae, pipe.image_encoder, pipe.upsampler):
        for module in network.modules():
            module.register_forward_pre_hook(note)
    run(pipe)
    unet = sum(p.numel() for p in pipe.unet.parameters())
    assert set(order) == {"unet", "vae", "image_encoder", "upsampler"}
    if enable == "enable_model_cpu_offload":
        assert most == unet and order.count("upsampler") == 1 and order[-1] == "vae" and len(order) <= 8
    else:
        assert most < unet / 3


def test_steps_keep_the_unet_on_the_device_until_the_end(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    weight, places = pipe.unet.conv_in.weight, []
    rest = weight.data_ptr()
    made = pipe.prepare(portrait(), num_inference_steps=3, generator=0)
    for _ in pipe.steps(made):
        places.append(weight.data_ptr())
    assert len(set(places)) == 1 and places[0] != rest
    pipe.maybe_free_model_hooks()
    assert weight.data_ptr() == rest


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("attention", ["block", "decoupled"])
@torch.no_grad()
def test_every_kind_of_unet_block_is_moved_whole(linear, attention):
    """Also blocks whose code reads the weights of the modules inside."""
    unet = MultiViewUNet(multi_view_config(use_linear_projection=linear, image_attention=attention)).eval()
    sample, pose, image = torch.randn(2, 8, 8, 8), torch.randn(2, 12), torch.randn(1, 5, 40)
    given = {"pose": pose, "image_embeds": image, "num_views": 2}
    expected = unet(sample, 7, **given)
    offload = Offload([unet], torch.device("cpu"), sequential=True)
    with Uses(list(unet.parameters())) as uses:
        assert torch.equal(unet(sample, 7, **given), expected)
        conditioning = unet.precompute(pose=pose, image_embeds=image)
        assert torch.equal(unet(sample, 7, conditioning=conditioning, num_views=2), expected)
    assert not uses.seen
    offload.remove()
    assert "forward" not in vars(unet)


@torch.no_grad()
def test_a_copy_of_a_network_runs_itself():
    unet = MultiViewUNet(multi_view_config(in_channels=4)).eval()
    given = {"pose": torch.randn(2, 12), "num_views": 2}
    sample = torch.randn(2, 4, 8, 8)
    expected = unet(sample, 7, **given)
    Offload([unet], torch.device("cpu"))
    twin = copy.deepcopy(unet)
    twin.conv_out.bias += 1.0
    assert torch.allclose(twin(sample, 7, **given), expected + 1.0, atol=1e-5)
    assert torch.equal(unet(sample, 7, **given), expected)


@torch.no_grad()
def test_a_forward_of_ones_own_is_called_and_given_back():
    """As of another library's hooks."""
    unet = MultiViewUNet(multi_view_config(in_channels=4)).eval()
    given, sample, plain = {"pose": torch.randn(2, 12), "num_views": 2}, torch.randn(2, 4, 8, 8), unet.forward
    unet.forward = lambda *args, **kwargs: plain(*args, **kwargs) + 1.0
    own, expected = unet.forward, unet(sample, 7, **given)
    offload = Offload([unet], torch.device("cpu"))
    assert torch.equal(unet(sample, 7, **given), expected)
    offload.remove()
    assert unet.forward is own


def test_another_dtype_goes_on_offloading_and_a_device_ends_it(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    with Uses(list(pipe.unet.parameters())) as uses:
        run(pipe)
    assert not uses.seen
    pipe.to("cpu")
    with Uses(list(pipe.unet.parameters())) as uses:
        run(pipe)
    assert uses.seen


@pytest.mark.parametrize("enable", ENABLE)
@pytest.mark.filterwarnings("ignore:.*does not look at the portrait")
def test_adapters_and_saving_while_offloading(tmp_path, enable):
    save_checkpoint(tmp_path / "model", multi_view=False)
    adapter, lora = save_ip_adapter(tmp_path / "adapter.safetensors"), save_lora(tmp_path / "lora.safetensors")
    plain = MultiViewDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    ours = MultiViewDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    getattr(ours, enable)(device="cpu")
    run(ours)
    for pipe in (plain, ours):
        pipe.load_lora_weights(lora)
        pipe.load_ip_adapter(adapter)
    with Uses(list(ours.unet.parameters())) as uses:
        images = run(ours).images
    assert torch.equal(images, run(plain).images) and not uses.seen
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("unet", "vae"):
        a, b = (load_file(tmp_path / which / name / UNET_WEIGHTS) for which in ("plain", "ours"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    ours.to("cpu")
    assert "forward" not in vars(ours.unet)


@pytest.mark.parametrize("enable", ENABLE)
@pytest.mark.skipif(HAS_CUDA or torch.backends.mps.is_available(), reason="there is an accelerator")
def test_a_machine_without_accelerator_goes_on_with_a_warning(pipe, enable):
    with pytest.warns(UserWarning, match=f"{enable}: no accelerator .* stay in main memory"):
        getattr(pipe, enable)()
    with Uses(list(pipe.unet.parameters())) as uses:
        run(pipe)
    assert uses.seen
    with pytest.raises(ValueError, match="gpu_id: expected 1, the index of device, or None, got 0"):
        getattr(pipe, enable)(gpu_id=0, device="cuda:1")


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
@pytest.mark.parametrize("enable", ENABLE)
def test_offloading_on_a_gpu(pipe, enable):
    expected = run(pipe.to("cuda"), guidance_scale=2.0).images
    getattr(pipe, enable)()
    assert pipe.device.type == "cuda" and next(pipe.unet.parameters()).device.type == "cpu"
    assert (run(pipe, guidance_scale=2.0).images - expected).abs().max() < 1e-4
    assert all(p.device.type == "cpu" for parameters in weights(pipe).values() for p in parameters)


def test_a_cuda_graph_of_weights_that_move_is_refused(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="graph: expected False with offloading"):
        run(pipe, graph=True)
    pipe.remove_all_hooks()
    run(pipe, graph=True)
