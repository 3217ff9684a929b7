"""What only a GPU can show: results that are bit-equal, in a graph, on a side stream, in a new thread, on a second GPU;
and Hopper's own instructions, whose layouts are else our reading of documents.
"""

import concurrent.futures
import subprocess
import sys

import pytest
import torch
from cuda_calls import CALLS, OPS
from helpers import HAS_CUDA, ROOT, heads

from gafext.ops.flash_attention import attention_weights

pytestmark = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
every_call = pytest.mark.parametrize("call, draw", CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_runs_are_bit_equal(call, draw, dtype):
    inputs = draw(dtype)
    first = call(*inputs)
    assert first.isfinite().all()
    for _ in range(99):
        torch.full_like(first, float("nan"))  # what the next result may find in its memory
        assert torch.equal(call(*inputs), first)


@every_call
def test_a_graph_gives_what_the_call_gives_also_for_new_inputs(call, draw):
    inputs = draw(torch.bfloat16)
    call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs)
    for _ in range(3):
        for old, new in zip(inputs, draw(torch.bfloat16), strict=True):
            old.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, call(*inputs))


@every_call
def test_it_runs_on_the_current_stream(call, draw):
    """The stream fills the inputs late: on any other stream, the call would read what they held before."""
    inputs, late = ([x.contiguous() for x in draw(torch.bfloat16)] for _ in range(2))
    expected = call(*late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 25 ms
        for x, value in zip(inputs, late, strict=True):
            x.copy_(value)
        out = call(*inputs)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_call
def test_it_runs_on_the_device_of_its_tensors(call, draw):
    inputs = draw(torch.bfloat16, "cuda:1")
    assert torch.cuda.current_device() == 0
    out = call(*inputs)
    assert out.device.index == 1 and torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.equal(out, call(*inputs))


@every_call
def test_it_runs_in_a_new_thread(call, draw):
    """Whose first step on the GPU is the call itself: memory for its results lies ready in PyTorch's cache."""
    inputs = draw(torch.bfloat16)
    expected = call(*inputs)
    call(*inputs)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        out = pool.submit(call, *inputs).result()
    assert torch.equal(out, expected)


FIRST_CALLS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from cuda_calls import CALLS
for name, (call, draw) in CALLS.items():
    inputs, graph = draw(torch.bfloat16), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs)
    graph.replay()
    assert torch.equal(out, call(*inputs)), name
"""


def test_the_first_call_of_all_may_be_captured():
    """Kernels are loaded at their first launch."""
    command = [sys.executable, "-c", FIRST_CALLS, str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, done.stderr


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
# (batch, heads, queries, keys, head_dim): each shape of flash_attention_sm90.cu, ends within a tile.
HOPPER = {
    "64, 3 consumers": (4, 5, 1000, 1111, 64),
    "64, 2 consumers": (2, 6, 1000, 500, 64),
    "64, tiles of 96 keys": (4, 5, 1024, 257, 64),
    "80": (2, 6, 1000, 500, 80),
    "80, tiles of 96 keys": (4, 5, 1024, 257, 80),
    "128": (2, 6, 1000, 500, 128),
    "128, tiles of 96 keys": (4, 5, 1024, 257, 128),
    "one head of one batch": (1, 1, 8500, 300, 64),
}
every_shape = pytest.mark.parametrize("sizes", HOPPER.values(), ids=HOPPER)
half_precision = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)


def projections(batch, length, num_heads, head_dim):
    return heads(batch, length, num_heads, head_dim, device="cuda")


def contiguous_heads(batch, length, num_heads, head_dim):
    return torch.randn(batch, num_heads, length, head_dim, device="cuda")


def slices(batch, length, num_heads, head_dim):
    """16 bytes into rows of a wider memory, heads and batches in reverse order of memory."""
    wide = torch.randn(num_heads, batch, length + 1, head_dim + 24, device="cuda")
    return wide.transpose(0, 1)[:, :, 1:, 8 : 8 + head_dim]


def as_drawn(draw, sizes, dtype):
    """Query, key and value; `to` keeps the strides of what is dense, and slices are dense after it."""
    batch, num_heads, queries, keys, head_dim = sizes
    drawn = [draw(batch, length, num_heads, head_dim) for length in (queries, keys, keys)]
    if draw is not slices:
        return [x.to(dtype) for x in drawn]
    halves = [x._base.to(dtype) for x in drawn]
    return [h.as_strided(x.shape, x.stride(), x.storage_offset()) for h, x in zip(halves, drawn, strict=True)]


def assert_close_to_float64(out, query, key, value, **options):
    """Within what rounding the weights and the result to the dtype can cost."""
    weights = attention_weights(query.double(), key.double(), scale=options.pop("scale", None), **options)
    exact = weights @ value.double()
    allowed = torch.finfo(out.dtype).eps * (weights @ value.double().abs()) + 1e-4
    excess = (out.double() - exact).abs() / allowed
    assert (excess <= 1).all(), (
        f"{excess.max():.3g} of the error that rounding explains, {(excess > 1).float().mean():.2%} of the elements, "
        f"the first at (batch, head, row, column) {(~(excess <= 1)).nonzero()[0].tolist()}"
    )


@on_hopper
@half_precision
@pytest.mark.parametrize("draw", [projections, contiguous_heads, slices])
@every_shape
def test_hopper_gives_attention(sizes, draw, dtype, monkeypatch):
    inputs = as_drawn(draw, sizes, dtype)
    for options in ({}, {"is_causal": True}, {"scale": 0.3}):
        monkeypatch.delenv("GAFEXT_CUDA_ATTENTION", raising=False)
        out = OPS.flash_attention(*inputs, **options)
        monkeypatch.setenv("GAFEXT_CUDA_ATTENTION", "mma")
        assert not torch.equal(out, OPS.flash_attention(*inputs, **options)), "both are from the same kernel"
        assert_close_to_float64(out, *inputs, **options)


@on_hopper
@half_precision
@every_shape
def test_hopper_reads_all_columns_of_the_values(sizes, dtype):
    """Equal weights: which key is which does not matter, so that only the columns of the values are tested."""
    query, key, value = as_drawn(projections, sizes, dtype)
    out = OPS.flash_attention(torch.zeros_like(query), key, value)
    assert_close_to_float64(out, torch.zeros_like(query), key, value)


@on_hopper
@half_precision
@every_shape
def test_hopper_finds_the_key_of_a_query(sizes, dtype):
    """All weight on one key, whose values are the binary digits of its number."""
    batch, num_heads, queries, keys, head_dim = sizes
    _, key, _ = as_drawn(projections, sizes, dtype)
    wanted = torch.randint(keys, (queries,), device="cuda")
    digits = (torch.arange(keys, device="cuda")[:, None] >> torch.arange(head_dim, device="cuda") % 11) & 1
    value = digits.to(dtype).expand(batch, num_heads, keys, head_dim).contiguous()
    out = OPS.flash_attention(8 * key[:, :, wanted], key, value)
    found = (out[..., :11].float().round().long() << torch.arange(11, device="cuda")).sum(-1)
    wrong = (found != wanted).nonzero()
    assert not len(wrong), (
        f"{len(wrong)} of {found.numel()}: {[(w, found[tuple(w)].item()) for w in wrong[:9].tolist()]}"
    )
    assert torch.equal(out.round(), value[:, :, wanted])
