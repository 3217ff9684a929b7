"""What only a GPU can show: results that are bit-equal, in a graph, on a side stream, on a second GPU."""

import pytest
import torch

from gafext import _C

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and _C.build_info()["cuda"]), reason="needs a GPU")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
OPS = torch.ops.gafext


def heads(batch, length, num_heads, head_dim, dtype, device):
    """(B,H,L,D) over the memory of (B,L,H*D), as a projection leaves it."""
    return torch.randn(batch, length, num_heads, head_dim, device=device).to(dtype).transpose(1, 2)


# Each gives an operation and a function that draws its inputs.


def attention(queries, keys, head_dim, batch=4, num_heads=5, **options):
    def draw(dtype, device="cuda"):
        return [heads(batch, n, num_heads, head_dim, dtype, device) for n in (queries, keys, keys)]

    return lambda *inputs: OPS.flash_attention(*inputs, **options), draw


def cross_view(views, positions, num_heads):
    def draw(dtype, device="cuda"):
        return [heads(2 * views, positions, num_heads, 64, dtype, device) for _ in range(3)]

    return lambda *inputs: OPS.cross_view_attention(*inputs, views), draw


def gate(rows, inner):
    return OPS.geglu_gate, lambda dtype, device="cuda": [torch.randn(rows, 2 * inner, device=device).to(dtype)]


def norm(batch, positions, channels):
    def draw(dtype, device="cuda"):
        shapes = ((batch, positions, channels), (channels,), (channels,))
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    return lambda x, weight, bias: OPS.group_norm_silu(x.transpose(1, 2), 32, weight, bias), draw


CALLS = {
    "self 1024": attention(1024, 1024, 64),
    "self 4096": attention(4096, 4096, 64, batch=1),
    "self 100, causal": attention(100, 100, 40, is_causal=True),
    "keys 77": attention(256, 77, 80),
    "keys 257": attention(1024, 257, 64),
    "head 128": attention(1024, 1024, 128),
    "head 160": attention(256, 256, 160),
    "few long heads": attention(64, 4096, 64, batch=1, num_heads=2),
    "cross view 4": cross_view(4, 1024, 5),
    "cross view 8": cross_view(8, 257, 10),
    "cross view 6": cross_view(6, 63, 3),
    "gate": gate(1024, 1280),
    "norm, few packs": norm(8, 64, 1280),
    "norm, many packs": norm(8, 1024, 320),
    "norm, in chunks": norm(1, 4096, 320),
}
every_call = pytest.mark.parametrize("call, draw", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
