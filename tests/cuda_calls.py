"""Calls of every CUDA kernel, for tests and for the processes that they start."""

import torch
from helpers import heads

OPS = torch.ops.gafext


# Each gives an operation and a function that draws its inputs.


def attention(queries, keys, head_dim, batch=4, num_heads=5, **options):
    def draw(dtype, device="cuda"):
        return [heads(batch, n, num_heads, head_dim, dtype, device) for n in (queries, keys, keys)]

    return lambda *inputs: OPS.flash_attention(*inputs, **options), draw


def cross_view(views, positions, num_heads):
    def draw(dtype, device="cuda"):
        return [heads(2 * views, positions, num_heads, 64, dtype, device) for _ in range(3)]

    return lambda *inputs: OPS.cross_view_attention(*inputs, views), draw


def cross_view_backward(views, positions, num_heads):
    def draw(dtype, device="cuda"):
        return [heads(2 * views, positions, num_heads, 64, dtype, device) for _ in range(4)]

    return lambda *inputs: torch.stack(OPS.cross_view_attention_backward(*inputs, views)), draw


def gate_backward(rows, inner):
    def draw(dtype, device="cuda"):
        return [torch.randn(rows, width, device=device).to(dtype) for width in (inner, 2 * inner)]

    return OPS.geglu_gate_backward, draw


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
    "head 80, keys 257": attention(1024, 257, 80),
    "head 80, causal": attention(1000, 1000, 80, is_causal=True),
    "head 160": attention(256, 256, 160),
    "few long heads": attention(64, 4096, 64, batch=1, num_heads=2),
    "cross view 4": cross_view(4, 1024, 5),
    "cross view 8": cross_view(8, 257, 10),
    "cross view 6": cross_view(6, 63, 3),
    "cross view 4, backward": cross_view_backward(4, 1024, 5),
    "cross view 6, backward": cross_view_backward(6, 63, 3),
    "gate": gate(1024, 1280),
    "gate, backward": gate_backward(1024, 1280),
    "norm, few packs": norm(8, 64, 1280),
    "norm, many packs": norm(8, 1024, 320),
    "norm, in chunks": norm(1, 4096, 320),
}
