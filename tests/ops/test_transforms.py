"""torch.func and forward-mode differentiation, which the kernels do not know: calls under them are PyTorch's."""

import pytest
import torch
from helpers import channels_last, max_abs_diff
from torch import nn
from torch.autograd import forward_ad

from gafext import ops
from gafext.ops.conv2d import conv2d_layer

X, WEIGHT = channels_last(2, 64, 8, 8), torch.randn(64, 64, 3, 3) / 24
LAYER = nn.Conv2d(64, 5, 3, stride=2).requires_grad_(False)
HEADS = torch.randn(2, 3, 16, 8)

FUNCTIONS = {
    "conv3x3": (lambda x: ops.conv3x3(x, WEIGHT), X),
    "conv2d_layer": (lambda x: conv2d_layer(LAYER, x), X),
    "group_norm_silu": (lambda x: ops.group_norm_silu(x, 8), X.contiguous()),
    "geglu_gate": (ops.geglu_gate, torch.randn(5, 6)),
    "linear": (lambda x: ops.linear(x, WEIGHT[0, :, 0].repeat(1, 32)), torch.randn(200, 96)),
}


def cases():
    return pytest.mark.parametrize("function, x", FUNCTIONS.values(), ids=FUNCTIONS)


@cases()
def test_forward_mode_has_the_tangent(function, x):
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda wide: function(wide), (x,), (direction,))
    step = 1e-2
    finite = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
    assert tangent.abs().max() > 0.1 and max_abs_diff(tangent, finite) < 0.02 * finite.abs().max()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction)))
        assert max_abs_diff(dual.tangent, tangent) < 1e-4


def test_forward_mode_has_the_tangent_where_no_graph_is_kept():
    """PyTorch keeps tangents under no_grad."""
    weight, scale = torch.ones(8, 8, dtype=torch.int8), torch.ones(8)

    def layer(residual):
        return ops.linear_int8(torch.zeros(3, 5, 8), weight, scale, None, residual)

    zeros, ones = torch.zeros(3, 5, 8), torch.ones(3, 5, 8)
    with torch.no_grad():
        assert torch.equal(torch.func.jvp(layer, (zeros,), (ones,))[1], ones)
        with forward_ad.dual_level():
            assert torch.equal(forward_ad.unpack_dual(layer(forward_ad.make_dual(zeros, ones))).tangent, ones)


@cases()
def test_vmap_and_grad(function, x):
    mapped = torch.vmap(function)(torch.stack([x, 2 * x]))
    assert max_abs_diff(mapped, torch.stack([function(x), function(2 * x)])) < 1e-4
    leaf = x.clone().requires_grad_()
    function(leaf).square().sum().backward()
    gradient = torch.func.grad(lambda wide: function(wide).square().sum())(x)
    assert max_abs_diff(gradient, leaf.grad) < 1e-4 * leaf.grad.abs().max()


def test_attention_never_loses_a_tangent():
    """PyTorch's attention has none, and says so."""
    for attention in (lambda x: ops.flash_attention(x, x, x), lambda x: ops.cross_view_attention(x, x, x, 2)):
        with pytest.raises(NotImplementedError, match="forward"):
            torch.func.jvp(attention, (HEADS,), (HEADS,))


def test_a_convolution_with_shapes_that_change_compiles():
    compiled = torch.compile(ops.conv3x3, fullgraph=True, dynamic=True, backend="eager")
    for inputs, outputs in ((8, 4), (64, 32), (96, 64)):
        x, weight = channels_last(2, inputs, 6, 6), torch.randn(outputs, inputs, 3, 3) / 30
        assert max_abs_diff(compiled(x, weight), ops.conv3x3(x, weight)) < 1e-4


def test_batched_gradients_of_a_convolution():
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    out = ops.conv3x3(x, weight)
    grads = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, (x, weight), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(out, (x, weight), grad, retain_graph=True)
        assert all(max_abs_diff(a[i], b) < 1e-3 for a, b in zip(batched, one, strict=True))
