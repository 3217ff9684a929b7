"""cross_view_attention against float64, against the layout's definition, and against misuse."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_torch,
    assert_gradients,
    assert_gradients_as_exact,
    assert_no_copies,
    assert_refused,
    assert_same_bits_on_any_number_of_threads,
    assert_same_when_compiled,
    assert_same_words,
    assert_second_gradients,
    called,
    heads,
    heads_in_layout,
    mps_implementation,
    on_devices,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from gafext.ops import cross_view_attention
from gafext.ops.cross_view_attention import (
    reference_cross_view_attention,
    sdpa_cross_view_attention,
    unsupported_reasons,
)

OP = torch.ops.gafext.cross_view_attention
BACKWARD = torch.ops.gafext.cross_view_attention_backward


def position_by_position(query, key, value, num_views, *, scale=None):
    """The definition, one SDPA call for each portrait and position; a query with NaN has NaN with any torch."""
    out = torch.empty_like(query)
    for first in range(0, query.shape[0], num_views):
        views = slice(first, first + num_views)
        for position in range(query.shape[2]):
            q, k, v = (t[views, :, position].transpose(0, 1) for t in (query, key, value))  # [H,V,D]
            out[views, :, position] = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1)
    return out.masked_fill(query.isnan().any(dim=-1, keepdim=True), torch.nan)


def assert_exact(*args, **options):
    assert_as_exact_as_torch(cross_view_attention, position_by_position, *args, **options)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("num_views", [1, 2, 3, 4, 5, 6, 8, 13, 16, 17, 32])
def test_every_number_of_views(num_views, head_dim, dtype, device):
    query, key, value = (heads(2 * num_views, 7, 3, head_dim, dtype, device) for _ in range(3))
    assert_exact(query, key, value, num_views)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 17, 64, 80, 128, 160, 255, 256])
def test_every_head_size(head_dim, dtype, device):
    query, key, value = (heads(4, 5, 2, head_dim, dtype, device) for _ in range(3))
    assert_exact(query, key, value, 4)


@on_devices
@pytest.mark.parametrize("length", [1, 63, 65, 257])
def test_odd_lengths(length, device):
    query, key, value = (heads(3, length, 2, 24, device=device) for _ in range(3))
    assert_exact(query, key, value, 3, scale=0.7)


def test_the_reference_is_the_definition():
    query, key, value = (heads(6, 5, 2, 8).double() for _ in range(3))
    torch.testing.assert_close(
        reference_cross_view_attention(query, key, value, 3), position_by_position(query, key, value, 3)
    )


def packed_qkv():
    return heads_in_layout("packed", 3, 8, 4, 33, 24)


def contiguous_heads():
    return tuple(torch.randn(8, 4, 33, 24) for _ in range(3))


def broadcast_keys():  # one key and value for all positions: strides of 0
    query, key, value = (torch.randn(8, 4, n, 24) for n in (33, 1, 1))
    return query, key.expand(8, 4, 33, 24), value.expand(8, 4, 33, 24)


@pytest.mark.parametrize("inputs", [packed_qkv, contiguous_heads, broadcast_keys])
def test_strides_without_copies(inputs):
    query, key, value = inputs()
    assert unsupported_reasons(query, key, value, 4) == []
    assert_exact(query, key, value, 4)
    assert_no_copies(cross_view_attention, "cross_view_attention", query, key, value, 4)
    assert cross_view_attention(query, key, value, 4).stride() == (33 * 4 * 24, 24, 4 * 24, 1)


@on_devices
@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (4, 0, 5, 8), (4, 2, 0, 8)], ids=str)
def test_empty_inputs(shape, device):
    query = torch.randn(shape, device=device)
    assert cross_view_attention(query, query, query, 4).shape == shape


@on_devices
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity_stay_at_their_position(where, poison, device):
    tensors = {name: heads(8, 9, 2, 8, device=device) for name in ("query", "key", "value")}
    tensors[where][2, 1, 4, 3] = poison
    out = cross_view_attention(*tensors.values(), 4)
    torch.testing.assert_close(out, position_by_position(*tensors.values(), 4), equal_nan=True)
    assert out[4:].isfinite().all() and out[:, :, :4].isfinite().all()  # another portrait, another position


def poisoned(num_views, head_dim, dtype):
    """Query, key and value whose positions have up to three infinities, NaNs and numbers of huge products each."""
    tensors = [heads(num_views, 100, 2, head_dim) for _ in range(3)]
    large = 1.0 if dtype == torch.float16 else 1e30  # float16 holds nothing of huge products
    poison = torch.tensor([float("nan"), float("inf"), float("-inf"), large, -large, 0.0])
    for position in range(100):
        for _ in range(torch.randint(4, ())):
            tensor = tensors[torch.randint(3, ())]
            view, column = torch.randint(num_views, ()), torch.randint(head_dim, ())
            tensor[view, :, position, column] = poison[torch.randint(len(poison), (2,))]
        if position % 10 == 0:  # columns of infinity: scores that are infinite one and all
            tensors[position // 10 % 2][:, :, position, 0] = poison[1 + position // 20 % 2]
            tensors[1 - position // 10 % 2][:, :, position, 0] = 1.0
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64])
@pytest.mark.parametrize("num_views", [1, 2, 4, 6, 8, 16, 21, 32])
def test_nan_infinity_and_huge_scores_as_in_pytorch(num_views, head_dim, dtype):
    """What is compared: PyTorch's "math" attention in float32: it spreads NaN as IEEE arithmetic does and gives zeros
    where every score is -infinity. PyTorch's CPU flash kernel agrees where it works in whole vectors (float32, 16 views
    and more); its scalar tail loses NaN (a row of NaN scores becomes zeros) and its half precision infinity.
    """
    tensors = poisoned(num_views, head_dim, dtype)
    out = cross_view_attention(*tensors, num_views)
    with sdpa_kernel(SDPBackend.MATH):
        expected = sdpa_cross_view_attention(*(t.float() for t in tensors), num_views).to(dtype)
    assert expected.isnan().any() and (expected == 0).all(-1).any() and expected.isfinite().all(-1).any()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
    if dtype == torch.float32 and num_views % 16 == 0:
        torch.testing.assert_close(out, sdpa_cross_view_attention(*tensors, num_views), equal_nan=True)


def test_all_scores_minus_infinity_give_zeros_as_in_pytorch():
    query, key, value = torch.ones(4, 1, 2, 8), torch.ones(4, 1, 2, 8), torch.randn(4, 1, 2, 8)
    key[..., 0] = float("-inf")
    out = cross_view_attention(query, key, value, 4)
    assert torch.equal(out, position_by_position(query, key, value, 4))


def test_same_bits_on_any_number_of_threads():
    inputs = [heads(10, 100, 3, 40) for _ in range(3)]
    assert_same_bits_on_any_number_of_threads(cross_view_attention, *inputs, 5)


S = (4, 3, 5, 8)
BAD_INPUTS = {
    "3 dimensions": (
        lambda t: (t(4, 5, 8), t(*S), t(*S), 2),
        "query must have shape (batch, heads, length, head_dim), got (4, 5, 8)",
    ),
    "key": (
        lambda t: (t(*S), t(4, 3, 6, 8), t(*S), 2),
        "key must have the shape of query, (4, 3, 5, 8), got (4, 3, 6, 8)",
    ),
    "value": (
        lambda t: (t(*S), t(*S), t(4, 3, 5), 2),
        "value must have the shape of query, (4, 3, 5, 8), got (4, 3, 5)",
    ),
    "no views": (lambda t: (t(*S), t(*S), t(*S), 0), "num_views must be at least 1, got 0"),
    "views": (
        lambda t: (t(*S), t(*S), t(*S), 3),
        "the batch of query must be a multiple of num_views = 3, got (4, 3, 5, 8)",
    ),
    "dtype": (
        lambda t: (t(*S), t(*S).bfloat16(), t(*S), 2),
        "key must have the dtype of query, float32, got bfloat16",
    ),
}


@pytest.mark.parametrize("make, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_has_one_message_everywhere(make, words):
    assert_same_words(cross_view_attention, OP, make, f"cross_view_attention: {words}")


UNSUPPORTED = {
    "dtype": (torch.float64, 8, 2, "dtype must be float32, float16 or bfloat16, got float64"),
    "head size": (torch.float32, 300, 2, "head_dim must be in 1..256, got 300"),
    "views": (torch.float32, 8, 33, "num_views must be in 1..32, got 33"),
}


@pytest.mark.parametrize("dtype, head_dim, num_views, reason", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_goes_to_pytorch_with_the_reason(dtype, head_dim, num_views, reason):
    tensors = [heads(num_views, 5, 2, head_dim, dtype) for _ in range(3)]
    assert unsupported_reasons(*tensors, num_views) == [reason]
    expected = position_by_position(*tensors, num_views)
    torch.testing.assert_close(cross_view_attention(*tensors, num_views), expected)
    assert_refused(OP, f"cross_view_attention: {reason}", *tensors, num_views)


def test_gradients():
    def on(function):
        return lambda *tensors: function(*tensors, 3, scale=0.3)

    tensors = [heads(6, 11, 2, 16) for _ in range(3)]
    assert_gradients((on(OP), on(cross_view_attention)), on(reference_cross_view_attention), *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    inputs = tuple(heads(6, 5, 2, 8, dtype).requires_grad_() for _ in range(3))
    torch.library.opcheck(OP.default, (*inputs, 3), {"scale": 0.5})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph_with_dynamic_shapes(backend):
    sizes = ((3, 9), (3, 17), (4, 5))
    inputs = ((*(heads(2 * views, length, 2, 8) for _ in range(3)), views) for views, length in sizes)
    assert_same_when_compiled(cross_view_attention, inputs, backend=backend)


def test_the_mps_route_has_the_values_and_the_memory_of_the_kernel():
    query, key, value = (heads(6, 9, 3, 8) for _ in range(3))
    ours, mps = cross_view_attention(query, key, value, 3), mps_implementation(OP)(query, key, value, 3)
    assert mps.stride() == ours.stride()
    torch.testing.assert_close(mps, ours)


def gradients(grad, *tensors, num_views, scale=None):
    return BACKWARD(grad, *tensors, num_views, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 8, 33, 64, 255])
@pytest.mark.parametrize("num_views", [1, 2, 3, 4, 7, 32])
def test_backward(num_views, head_dim, dtype):
    *tensors, grad = (heads(2 * num_views, 3, 2, head_dim, dtype) for _ in range(4))
    assert_backward_is_exact(grad, *tensors, num_views=num_views)


@pytest.mark.parametrize("length", [1, 63, 65, 257])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_of_any_layout_and_length(layout, length):
    *tensors, grad = heads_in_layout(layout, 4, 4, 3, length, 24)
    assert_backward_is_exact(grad, *tensors, num_views=4, scale=-0.5)
    assert_backward_is_exact(grad[..., :1].expand_as(grad), *tensors, num_views=2)  # as of a sum: strides of 0


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (4, 0, 5, 8), (4, 2, 0, 8)], ids=str)
def test_backward_of_nothing(shape):
    tensors = [torch.randn(shape) for _ in range(4)]
    assert [grad.shape for grad in BACKWARD(*tensors, 2)] == [shape] * 3


def assert_backward_is_exact(grad, *tensors, num_views, **options):
    forms = [
        functools.partial(form, num_views=num_views, **options)
        for form in (gradients, reference_cross_view_attention, sdpa_cross_view_attention)
    ]
    assert_gradients_as_exact(*forms[:2], grad, *tensors, torchs=forms[2])


def test_backward_misuse_opcheck_and_threads():
    grad, query, key, value = (heads(4, 65, 2, 40) for _ in range(4))
    words = "cross_view_attention_backward: grad must have the shape of query, (4, 2, 65, 40), got (4, 2, 64, 40)"
    assert_refused(BACKWARD, words, grad[:, :, 1:], query, key, value, 2)
    words = "cross_view_attention_backward: num_views must be in 1..32, got 33"
    assert_refused(BACKWARD, words, *(heads(33, 2, 2, 8) for _ in range(4)), 33)
    torch.library.opcheck(BACKWARD.default, (grad, query, key, value, 2), {"scale": 0.5})
    assert_same_bits_on_any_number_of_threads(lambda *t: torch.stack(BACKWARD(*t, 2)), grad, query, key, value)


def test_training_runs_the_kernels_and_second_gradients_the_formula():
    tensors = [heads(6, 11, 2, 16).requires_grad_() for _ in range(3)]
    used = called(lambda: cross_view_attention(*tensors, 3).sum().backward())
    assert {"gafext::cross_view_attention", "gafext::cross_view_attention_backward"} <= used
    assert_second_gradients(lambda *t: OP(*t, 3), lambda *t: reference_cross_view_attention(*t, 3), *tensors)
    with pytest.raises(NotImplementedError, match="cross_view_attention_backward: has no gradient"):
        BACKWARD(tensors[0].detach(), *tensors, 3)[0].sum().backward()
