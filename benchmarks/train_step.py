"""Time a training step of operations, of two blocks and of the whole of SD 2.1's U-Net: gafext against PyTorch.

    python benchmarks/train_step.py [--rounds 7] [--case NAME ...] [--json FILE]
    python benchmarks/train_step.py --memory --json FILE

A step is a forward and a backward pass for the inputs and the weights; of the whole U-Net, as `gafext train` takes it
of one head with 4 views, for the weights that `gafext assemble` adds. Contestants take turns on one thread; times are
CPU seconds of the process, because other processes may use the machine too. malloc keeps freed memory for both.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence

import torch
from race import Contestant, json_file, positive, race, random_network, write
from torch import Tensor

from gafext import ops
from gafext.bench.environment import environment
from gafext.config import SD21_MULTIVIEW_UNET, SD_SCHEDULE
from gafext.models.blocks import MultiViewTransformerBlock, ResnetBlock2D
from gafext.models.unet import MultiViewUNet
from gafext.ops.backend import set_attention_backend
from gafext.ops.memory import keep_freed_memory, release_freed_memory
from gafext.training.batches import Batch
from gafext.training.denoiser import Denoiser
from gafext.training.trained import choose_trained, recomputing
from gafext.watch.peak import peak_memory

BACKENDS = {"pytorch": "sdpa", "gafext": "auto"}


def step(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Tensor:
    """Run both passes; return the gradient of the first leaf."""
    return torch.autograd.grad(function(), leaves, grad, allow_unused=True)[0]  # of attn2, no text uses but a bias


def operation(function: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], *, last: bool = False, **options):
    """Prepare an operation on random tensors of these shapes, images in channels-last memory if `last`."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator) * 0.05 for shape in shapes]
    if last:
        leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad = torch.randn(function(*leaves, **options).shape, generator=generator)

    def prepared(backend: str) -> Callable[[], Tensor]:
        return functools.partial(step, lambda: function(*leaves, backend=backend, **options), leaves, grad)

    return prepared


def across_views(query: Tensor, key: Tensor, value: Tensor, *, heads: int, views: int, backend: str = "auto") -> Tensor:
    """Attend across views, from and to projections [B*V,L,H*D]."""
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return ops.cross_view_attention(query, key, value, views, backend=backend).transpose(1, 2).flatten(2)


def block(module: torch.nn.Module, *inputs: Tensor, **options):
    """Prepare a block; its weights get gradients too."""
    leaves = [inputs[0].requires_grad_(), *module.parameters()]
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def prepared(backend: str) -> Callable[[], Tensor]:
        def forward():
            set_attention_backend(module, backend)
            return module(*inputs, **options)

        return functools.partial(step, forward, leaves, grad)

    return prepared


def transformer_block():
    module = MultiViewTransformerBlock(640, 10, context_channels=1024)
    return block(module, torch.randn(4, 256, 640), image_embeds=torch.randn(1, 257, 1024), num_views=4)


def resnet_block():
    module = ResnetBlock2D(640, 640, time_channels=1280, groups=32, eps=1e-5)
    return block(module, torch.randn(4, 640, 16, 16), torch.randn(4, 1280))


def unet_and_batch() -> tuple[MultiViewUNet, Denoiser, Batch]:
    """Make what `gafext train` trains by default, and a batch of one head with 4 views."""
    unet = random_network(MultiViewUNet, SD21_MULTIVIEW_UNET, torch.device("cpu"), torch.float32).train()
    choose_trained(unet, "new", rank=0, seed=0)
    generator = torch.Generator().manual_seed(0)
    latents, normals, noise = (torch.randn(1, 4, 4, 32, 32, generator=generator) for _ in range(3))
    batch = Batch(
        latents=latents,
        normals=normals,
        noise=noise,
        pose=torch.randn(1, 4, 12, generator=generator),
        features=torch.randn(1, 257, 1280, generator=generator),
        timesteps=torch.full((1, 4), 500),
        sees=torch.ones(1, 4),
    )
    return unet, Denoiser(unet, SD_SCHEDULE, prompt_embeds=None, gamma=5.0), batch


def whole_unet():
    unet, denoiser, batch = unet_and_batch()
    leaves = [unet.conv_in.weight, *(p for p in unet.parameters() if p.requires_grad and p is not unet.conv_in.weight)]

    def prepared(backend: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            set_attention_backend(unet, backend)
            return torch.autograd.grad(denoiser(batch), leaves, allow_unused=True)[0]

        return step

    return prepared


def measure_memory() -> dict[str, int | None]:
    """Measure the peak memory in bytes of a step of the whole U-Net, gradients in it, beyond its weights."""
    unet, denoiser, batch = unet_and_batch()
    found = {}
    for name, recomputes in (("without checkpointing", False), ("with checkpointing", True)):
        with recomputing(unet, recomputes), peak_memory(torch.device("cpu")) as peak:
            denoiser(batch).backward()
        unet.zero_grad(set_to_none=True)
        release_freed_memory()
        found[name] = peak.above
    return found


CASES: dict[str, Callable] = {
    "attention across 4 views, 32x32, 320 channels": lambda: operation(
        across_views, [(4, 1024, 320)] * 3, heads=5, views=4
    ),
    "GEGLU, 4096 rows of 320": lambda: operation(ops.geglu, [(4096, 320), (2560, 320), (2560,)]),
    "GEGLU's gate, 4096 rows of 1280": lambda: operation(ops.geglu_gate, [(4096, 2560)]),
    "3x3 convolution, 320 channels, 32x32": lambda: operation(
        ops.conv3x3, [(4, 320, 32, 32), (320, 320, 3, 3), (320,)], last=True
    ),
    "3x3 convolution, 1280 channels, 8x8": lambda: operation(
        ops.conv3x3, [(4, 1280, 8, 8), (1280, 1280, 3, 3), (1280,)], last=True
    ),
    "transformer block, 640 channels, 16x16": transformer_block,
    "ResNet block, 640 channels, 16x16": resnet_block,
    "U-Net, 4 views, 32x32": whole_unet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--memory", action="store_true", help="measure the whole U-Net's memory instead of times")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    args = parser.parse_args()
    if args.rounds == 1:
        parser.error("--rounds: expected at least 2: one has no quartiles")
    if args.memory:
        result = {"environment": environment("cpu"), "command": "python benchmarks/train_step.py --memory --json FILE"}
        write(result | {"peak_bytes": measure_memory()}, args.json)
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    result = {
        "environment": environment("cpu"),
        "command": f"python benchmarks/train_step.py --rounds {args.rounds} --json FILE",
        "cases": {},
    }
    for name in args.case:
        print(name)
        prepared = CASES[name]()
        makers = {key: Contestant(key, prepared(backend)).warmed_up for key, backend in BACKENDS.items()}
        result["cases"][name] = race(makers, args.rounds, torch.device("cpu"), clock=time.process_time)
    write(result, args.json)
    print(json.dumps(result["cases"], indent=2))


if __name__ == "__main__":
    main()
