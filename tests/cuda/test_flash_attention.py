"""The tensor-core attention under the emulator: every shape of kernel, 200 random cases, infinities, split keys."""

import random

import pytest
import torch
import torch.nn.functional as F
from emulator import ORDERS, EmulatorError, emulate
from emulator_build import needs_compiler
from helpers import LAYOUTS
from helpers import heads_in_layout as heads

from gafext.ops.flash_attention import attention_weights

pytestmark = needs_compiler
HALVES = [torch.float16, torch.bfloat16]
SIZES = [8, 40, 48, 56, 64, 80, 96, 120, 128, 160, 256, 264, 512]
FORWARD = {"forward": ORDERS["forward"]}


def assert_right(query, key, value, *, scale=None, is_causal=False, **machine):
    """Within what rounding the weights and the result to the dtype can cost, from float64."""
    out = emulate("flash_attention", query, key, value, scale=scale, is_causal=is_causal, **machine)
    weights = attention_weights(query.double(), key.double(), scale=scale, is_causal=is_causal)
    roundoff = torch.finfo(query.dtype).eps / 2
    allowed = 2 * roundoff * (weights @ value.double().abs())
    # Weights below 2^-14 have fewer digits in float16; sums are in float32.
    allowed += key.shape[2] * 2.0**-25 * value.abs().max().double() + 1e-5
    excess = ((out.double() - weights @ value.double()).abs() / allowed).max().item()
    assert excess <= 1, f"{excess} of the error that rounding explains"
    return out


def three(layout, batch, num_heads, length, keys, head_dim, dtype):
    query = heads(layout, 1, batch, num_heads, length, head_dim, dtype)
    return query + heads(layout, 2, batch, num_heads, keys, head_dim, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", SIZES)
def test_every_head_size(head_dim, dtype):
    tensors = three("packed", 1, 2, 33, 77, head_dim, dtype)
    for is_causal in (False, True):
        assert_right(*tensors, is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [s for s in SIZES if s > 8])
def test_many_rows_a_block(head_dim):
    """Long queries on few multiprocessors: blocks of 128 rows, of 64 for the widest head."""
    tensors = three("projection", 1, 1, 260, 141, head_dim, torch.float16)
    for is_causal in (False, True):
        assert_right(*tensors, is_causal=is_causal, multiprocessors=1, orders=FORWARD)
    assert_right(*tensors, multiprocessors=1, orders={"random lanes": ORDERS["random lanes"]})


@pytest.mark.parametrize("head_dim, keys", [(64, 1100), (80, 1025), (512, 600)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_split_keys(head_dim, keys, is_causal):
    length = keys - 300 if is_causal else 65
    tensors = three("projection", 1, 1, length, keys, head_dim, torch.bfloat16)
    whole = assert_right(*tensors, is_causal=is_causal, multiprocessors=1, orders=FORWARD)
    split = assert_right(*tensors, is_causal=is_causal, multiprocessors=132, orders=FORWARD)
    assert not torch.equal(whole, split)  # the sums are in another order


@pytest.mark.parametrize("head_dim", [64, 512])
def test_no_rows_and_many_keys(head_dim):
    """Keys would be split, and there is no workspace."""
    for batch, length in ((2, 0), (0, 8), (0, 600)):
        tensors = three("packed", batch, 2, length, 1200, head_dim, torch.float16)
        out = emulate("flash_attention", *tensors, multiprocessors=132, orders=FORWARD)
        assert out.shape == (batch, 2, length, head_dim)


@pytest.mark.parametrize("capability", [75, 86, 90, 120])
def test_every_capability(capability):
    for head_dim in (40, 64, 80, 128, 160, 256, 512)[: 6 if capability == 75 else 7]:
        assert_right(*three("packed", 1, 1, 20, 30, head_dim, torch.float16), capability=capability, orders=FORWARD)
    with pytest.raises(EmulatorError, match="NotSupported"):
        emulate("flash_attention", *three("packed", 1, 1, 20, 30, 512, torch.float16), capability=75)


@pytest.mark.parametrize("seed", range(20))
def test_random_cases(seed):  # 200 in all
    choose = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        head_dim, dtype = choose.choice(SIZES), choose.choice(HALVES)
        batch, num_heads = choose.randint(1, 2), choose.randint(1, 2)
        longest = min(260, int((400_000 / (batch * num_heads * max(head_dim, 48))) ** 0.5))
        lengths = [choose.choice([n for n in (1, 15, 16, 17, 31, 33, 63, 64, 65, 77, 129, 257) if n <= longest])]
        lengths.append(choose.randint(1, longest))
        choose.shuffle(lengths)
        tensors = three(choose.choice(LAYOUTS[:3]), batch, num_heads, *lengths, head_dim, dtype)
        scale, is_causal = choose.choice([None, None, None, 0.3, -1.0, 0.0]), choose.random() < 0.4
        assert_right(*tensors, scale=scale, is_causal=is_causal, multiprocessors=choose.choice([1, 3, 132]))


def test_blocks_without_keys_wait_for_their_queries():
    """Causal, keys in parts: the first rows see none of the second part. And no key at all."""
    assert_right(*three("projection", 1, 1, 100, 1100, 256, torch.float16), is_causal=True, orders=FORWARD)
    for head_dim in (64, 128, 256, 512):
        query, key, value = three("projection", 1, 1, 260, 1, head_dim, torch.float16)
        none = emulate("flash_attention", query, key[:, :, :0], value[:, :, :0], multiprocessors=1, orders=FORWARD)
        assert torch.equal(none, torch.zeros_like(query))


def test_rows_that_are_not_aligned_go_to_the_simple_kernel():
    for head_dim in (40, 42):
        assert_right(*three("anywhere", 1, 2, 17, 33, head_dim, torch.float16))


SPOILS = [float("inf"), float("-inf"), float("nan"), 1e4, -6e4]
HUGE = [1e30, -1e30, 3e38, 1e18]  # of bfloat16


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [40, 512])
@pytest.mark.parametrize("dtype, spoil", [(d, s) for d in HALVES for s in SPOILS] + [(HALVES[1], s) for s in HUGE])
def test_spoilt_inputs_give_what_pytorch_gives(dtype, spoil, head_dim, is_causal):
    where = random.Random(f"{dtype} {spoil}")
    for spoilt in range(3):
        tensors = three("projection", 1, 1, 70, 85, head_dim, dtype)
        row = where.randrange(70)
        tensors[spoilt][0, 0, row, where.randrange(head_dim)] = spoil
        out = emulate("flash_attention", *tensors, is_causal=is_causal, orders=FORWARD).float()
        torchs = F.scaled_dot_product_attention(*(t.float() for t in tensors), is_causal=is_causal)
        if spoilt == 2 and is_causal:
            # Weight 0 times infinity is NaN: in rows of a tile before the spoilt one, here as in PyTorch's kernels.
            out, torchs = out[:, :, row:], torchs[:, :, row:]
        torchs = torchs.to(dtype).float()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out, torchs, equal_nan=True, atol=3 * eps, rtol=3 * eps)


def test_huge_scores_that_are_equal_share_the_weight():
    """Their difference is 0, though one rounding of the exponents' product alone would make it millions."""
    query, key = torch.full((1, 1, 3, 64), 1.1e15), torch.full((1, 1, 70, 64), 1.3e15)
    value = torch.randn(1, 1, 70, 64)
    out = emulate("flash_attention", query.bfloat16(), key.bfloat16(), value.bfloat16())
    expected = value.bfloat16().float().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("head_dim, keys", [(64, 70), (64, 1100), (512, 70)])
def test_all_scores_minus_infinity_give_zeros(head_dim, keys):
    query, key = torch.ones(1, 1, 3, head_dim).half(), torch.ones(1, 1, keys, head_dim).half()
    key[..., 0] = float("-inf")
    out = emulate("flash_attention", query, key, torch.randn_like(key), multiprocessors=132, orders=FORWARD)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("head_dim", [64, 512])
def test_a_row_does_not_depend_on_its_neighbours(head_dim):
    """Bit for bit: whether a warp scales its outputs is decided together, by how much for each row alone."""
    query, key, value = three("packed", 1, 1, 32, 200, head_dim, torch.float16)
    one = emulate("flash_attention", query, key, value, orders=FORWARD)
    query[:, :, 1:] *= torch.linspace(0, 40, 31)[:, None].half()
    other = emulate("flash_attention", query, key, value, orders=FORWARD)
    assert torch.equal(one[:, :, 0], other[:, :, 0]) and not torch.equal(one, other)


def test_scores_that_grow_move_the_reference():
    query, key, value = three("packed", 1, 1, 20, 200, 64, torch.float16)
    for growth in (torch.linspace(0, 8, 200), torch.linspace(8, 0, 200), torch.linspace(-8, 8, 200)):
        assert_right(query, key * growth[:, None].half(), value, orders=FORWARD)
