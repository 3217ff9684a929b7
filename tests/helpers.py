"""Comparisons, inputs of the operations, edits of files. Without diffusers, which a GPU machine may lack."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gafext import _C
from gafext.bench.cases import Case, Contestant
from gafext.errors import CheckpointError
from gafext.ops.backend import set_attention_backend

ROOT = Path(__file__).resolve().parents[1]
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP_WEIGHTS = "model.safetensors"
BACKENDS = ("auto", "kernel", "sdpa", "reference")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HAS_CUDA = torch.cuda.is_available() and _C.build_info()["cuda"]
on_devices = pytest.mark.parametrize("device", ["cpu", "cuda"] if HAS_CUDA else ["cpu"])


def max_abs_diff(left: torch.Tensor, right: torch.Tensor) -> float:
    """max |left - right|, in float64; shapes must agree and every value be finite."""
    assert left.shape == right.shape, f"{tuple(left.shape)} and {tuple(right.shape)}"
    assert left.isfinite().all() and right.isfinite().all()
    return (left.double() - right.double()).abs().max().item()


def worst_difference(ours: object, expected: dict[str, torch.Tensor]) -> float:
    """The largest difference between attributes of a network's result and the expected tensors."""
    return max(max_abs_diff(getattr(ours, name), tensor) for name, tensor in expected.items())


@torch.no_grad()
def randomized(module: torch.nn.Module, *, seed: int) -> torch.nn.Module:
    """Fill a module with weights that hide nothing: no bias is 0 and no normalisation is 1, as fresh modules have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values *= parameter[0].numel() ** -0.5
        else:
            values = 0.2 * values + (1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(values)
    return module


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers of the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Operations


def heads(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(B,H,L,D) over the memory of (B,L,H*D), as a projection leaves it."""
    return torch.randn(batch, length, num_heads, head_dim, device=device).to(dtype).transpose(1, 2)


LAYOUTS = ["contiguous", "projection", "packed", "anywhere"]


def heads_in_layout(
    layout: str, count: int, batch: int, num_heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """`count` tensors (B,H,L,D) in one of `LAYOUTS`."""
    inner = num_heads * head_dim
    if layout == "contiguous":
        return [torch.randn(batch, num_heads, length, head_dim).to(dtype) for _ in range(count)]
    if layout == "projection":
        return [heads(batch, length, num_heads, head_dim, dtype) for _ in range(count)]
    if layout == "packed":
        flat = torch.randn(batch, length, count * inner).to(dtype).chunk(count, dim=2)
    else:  # rows that begin anywhere
        flat = [torch.randn(batch, length + 1, inner + 7).to(dtype)[:, 1:, 3 : 3 + inner] for _ in range(count)]
    return [tensor.unflatten(2, (num_heads, head_dim)).transpose(1, 2) for tensor in flat]


def channels_last(*shape: int) -> torch.Tensor:
    """[B,C,...] in the memory of [B,...,C]."""
    batch, channels, *sides = shape
    return torch.randn(batch, *sides, channels).movedim(-1, 1)


def assert_as_exact_as_torch(
    ours: Callable, reference: Callable, *args: object, torchs: Callable | None = None, **options: object
) -> torch.Tensor:
    """Check the result: at most twice the error of PyTorch's own operation, both measured against float64.

    Args:
        ours: the operation.
        reference: the formula, for float64.
        args: of both; so are the options.
        torchs: PyTorch's own operation; the formula by default.
    """
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in args]
    out, theirs = ours(*args, **options), (torchs or reference)(*args, **options)
    exact = reference(*wide, **options)
    assert out.shape == theirs.shape and out.dtype == args[0].dtype
    if out.numel():
        error, allowed = ((t.double() - exact).abs().max().item() for t in (out, theirs))
        assert error <= 2 * allowed + 1e-6, f"{error} against PyTorch's {allowed}"
    return out


def assert_same_words(function: Callable, op: Callable, make: Callable, words: str) -> None:
    """The public function, its operation and the fake kernel refuse make(zeros) in the same words."""
    for refuse, device, error in ((function, "cpu", ValueError), (op, "cpu", RuntimeError), (op, "meta", ValueError)):
        with pytest.raises(error) as raised:
            refuse(*make(lambda *shape, device=device: torch.zeros(shape, device=device)))
        assert str(raised.value) == words


# For `assert_same_words`: x, weight and bias of a linear layer, also of one whose result is divided in two.
BAD_LAYERS = {
    "columns": (lambda t: (t(3, 8), t(6, 9)), "x must have shape (..., 9) to go with weight (6, 9), got (3, 8)"),
    "scalar": (lambda t: (t(), t(6, 1)), "x must have shape (..., 1) to go with weight (6, 1), got ()"),
    "bias": (
        lambda t: (t(3, 8), t(6, 8), t(3)),
        "bias must have shape (6,) to go with weight (6, 8), got (3,)",
    ),
    "weight dtype": (
        lambda t: (t(3, 8), t(6, 8).half()),
        "weight must have the dtype of x, float32, got float16",
    ),
    "bias dtype": (
        lambda t: (t(3, 8), t(6, 8), t(6).double()),
        "bias must have the dtype of x, float32, got float64",
    ),
}


def assert_refused(op: Callable, words: str, *args: object) -> None:
    """The operation and its fake kernel refuse arguments, of any strides, with these words."""

    def on_meta(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    for given, error in ((args, RuntimeError), ([on_meta(value) for value in args], ValueError)):
        with pytest.raises(error) as raised:
            op(*given)
        assert str(raised.value) == words


def assert_same_bits_on_any_number_of_threads(function: Callable, *args: object, counts: Iterable[int] = (1, 2, 3)):
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


def assert_gradients(functions: Iterable[Callable], reference: Callable, *tensors: torch.Tensor) -> None:
    """Gradients for the tensors are those of the reference in float64."""
    exact = [t.double().requires_grad_() for t in tensors]
    out = reference(*exact)
    factor = torch.randn(out.shape)
    (out * factor).sum().backward()
    for function in functions:
        ours = [t.clone().requires_grad_() for t in tensors]
        (function(*ours) * factor).sum().backward()
        for mine, theirs in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


def assert_gradients_as_exact(
    ours: Callable,
    reference: Callable,
    grad: torch.Tensor,
    *tensors: torch.Tensor,
    torchs: Callable | None = None,
) -> None:
    """Check gradients: at most twice the error of autograd's through PyTorch's own operation, against float64.

    Args:
        ours: ours(grad, *tensors) computes them, a tensor each.
        reference: the formula of the operation itself, for float64.
        grad: of the operation's result.
        tensors: the operation's.
        torchs: PyTorch's own operation; the formula by default.
    """

    def through(function, grad, tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*leaves), leaves, grad)

    exact = through(reference, grad.double(), [tensor.double() for tensor in tensors])
    theirs = through(torchs or reference, grad, tensors)
    with torch.no_grad():
        results = ours(grad, *tensors)
    for mine, their, right, tensor in zip(results, theirs, exact, tensors, strict=True):
        assert mine.shape == tensor.shape and mine.dtype == tensor.dtype
        if mine.numel():
            error, allowed = ((t.double() - right).abs().max().item() for t in (mine, their))
            assert error <= 2 * allowed + 1e-6, f"{error} against PyTorch's {allowed}"


def assert_second_gradients(function: Callable, reference: Callable, *tensors: torch.Tensor) -> None:
    """Gradients of the gradients are those of the reference in float64."""

    def second(function, tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    exact = second(reference, [tensor.double() for tensor in tensors])
    for mine, right in zip(second(function, tensors), exact, strict=True):
        assert max_abs_diff(mine, right) <= 1e-5 * right.abs().max().item()


def assert_same_when_compiled(function: Callable, inputs: Iterable[tuple], *, backend: str) -> None:
    """One graph for every size gives the bits of the function itself."""
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for args in inputs:
        assert torch.equal(compiled(*args), function(*args))


def called(function: Callable, *args: object, **options: object) -> set[str]:
    """Names of the operations that a call runs, such as "gafext::geglu"."""
    with torch.profiler.profile() as profile:
        function(*args, **options)
    return {event.key for event in profile.key_averages()}


def mps_implementation(op: Callable) -> Callable:
    """What the dispatcher would run for tensors on MPS, here for tensors of the CPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)
    return lambda *args, **options: op.default.redispatch(keys, *args, **options)


def assert_no_copies(function: Callable, op: str, *args: object) -> None:
    """A call runs the operation, on the tensors as they are."""
    operations = called(function, *args)
    assert f"gafext::{op}" in operations
    assert not operations & {"aten::copy_", "aten::clone", "aten::contiguous"}


# Networks


@torch.no_grad()
def assert_backends_agree(module: torch.nn.Module, call: Callable, *, tolerance: float) -> None:
    """Every backend of attention gives what "reference" gives, which stays set."""
    results = {}
    for backend in BACKENDS:
        set_attention_backend(module, backend)
        results[backend] = call()
    for backend, result in results.items():
        assert max_abs_diff(result, results["reference"]) < tolerance, backend


def loaded_by(theirs: type, ours: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The library's own network of the files that ours saves, which it reads to the last tensor; so do we."""
    ours.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", f"{ours.weights_stem}.safetensors"]
    again = type(ours).from_pretrained(folder)
    assert again.config == ours.config
    assert_equal_weights(again, ours)
    network, loading = theirs.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    return network.eval()


def assert_lists(load: Callable[[], object], *parts: str) -> None:
    """A checkpoint is refused, and the error names all of these."""
    with pytest.raises(CheckpointError) as caught:
        load()
    assert [part for part in parts if part not in str(caught.value)] == []


# Schedulers


def noise_maker(seed: int = 0, shape: tuple[int, ...] = (2, 4, 5, 3)) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def fake_model(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Stands for the network: bounded, and depends on both its inputs."""
    return torch.sin(sample + 0.01 * float(t)) + 0.1 * sample


def write_scheduler(folder: Path, **values: object) -> Path:
    (folder / "scheduler_config.json").write_text(json.dumps(values))
    return folder


# Evaluation


def doubling(*contestants: Contestant, size: int = 16) -> Case:
    """A tiny case for the bench, with contestants beside one that doubles its input."""
    return Case(
        op="doubling",
        shape=str(size),
        where="nowhere",
        bound="memory",
        flops=size,
        inputs=lambda: (torch.ones(size),),
        contestants=[Contestant("gafext", lambda x: 2 * x), *contestants],
    )


def ablated_pipeline(evaluation, line: str):
    """The pipeline that one line of the ablations runs."""
    changes = []

    def generate(**change):
        changes.append(change)
        return [subject.views.rgb for subject in evaluation.subjects]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "generate", generate)
        evaluation.ablations([line])
    return changes[0]["pipe"]


# Files


def edit_json(path: Path, edit: Callable[[dict], object] | None = None, **changes: object) -> None:
    """Rewrite a JSON file after `edit(values)`, with the changes."""
    values = json.loads(path.read_text())
    if edit is not None:
        edit(values)
    path.write_text(json.dumps({**values, **changes}))


def edit_weights(path: Path, edit: Callable[[dict], object]) -> None:
    """Rewrite a safetensors file after `edit(tensors)`."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_equal_weights(ours: torch.nn.Module, theirs: torch.nn.Module | dict[str, torch.Tensor]) -> None:
    """Bit-equal weights under equal names."""
    ours, theirs = ours.state_dict(), theirs.state_dict() if isinstance(theirs, torch.nn.Module) else theirs
    assert ours.keys() == theirs.keys()
    assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


def assert_operations_pass_on(processor: str, operations: Iterable[str], selection: str) -> None:
    """Run the tests of operations that pytest's -k selects, in a process whose kernels run on an emulated processor."""
    files = [f"tests/ops/test_{operation}.py" for operation in operations]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selection]
    environment = {**os.environ, "GAFEXT_EMULATED_CPU": processor}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def script(name):
    """Load a script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module
