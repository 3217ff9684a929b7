"""The transformer block against a plain-PyTorch rendering of its five operations on the same state dict."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, max_abs_diff, randomized

from gafext.models.blocks import MultiViewTransformerBlock
from gafext.ops.backend import set_attention_backend


def plain_block(state, x, text, image, *, views, heads):
    """x [B*V,L,C], text [B*V,T,C'], image [B,T',C'] -> [B*V,L,C]; one matrix product at a time, in the order of GAF."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def attend(name, queries, context):  # [N,L,C], [N,T,C'] -> [N,L,C]
        q = queries @ state[f"{name}.to_q.weight"].T
        k, v = (context @ state[f"{name}.{w}.weight"].T for w in ("to_k", "to_v"))
        split = lambda t: t.view(*t.shape[:2], heads, -1).permute(0, 2, 1, 3)  # noqa: E731
        scores = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // heads) ** 0.5
        mixed = (scores.softmax(-1) @ split(v)).permute(0, 2, 1, 3).flatten(2)
        return mixed @ state[f"{name}.to_out.0.weight"].T + state[f"{name}.to_out.0.bias"]

    n = norm("norm1", x)
    x = x + attend("attn1", n, n)
    if "norm_cv.weight" in state:
        rows, length, channels = x.shape
        # one sequence of V views for every position
        n = norm("norm_cv", x).view(-1, views, length, channels).transpose(1, 2).reshape(-1, views, channels)
        n = attend("attn_cv", n, n).view(-1, length, views, channels).transpose(1, 2)
        x = x + n.reshape(rows, length, channels)
    x = x + attend("attn2", norm("norm2", x), text)
    if image is not None:
        x = x + attend("attn_ip", norm("norm_ip", x), image.repeat_interleave(views, dim=0))
    value, gate = F.linear(norm("norm3", x), state["ff.net.0.proj.weight"], state["ff.net.0.proj.bias"]).chunk(2, -1)
    return x + F.linear(value * F.gelu(gate), state["ff.net.2.weight"], state["ff.net.2.bias"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "portraits,views,length,channels,heads",
    [(1, 4, 65, 64, 1), (2, 3, 16, 80, 2), (1, 1, 7, 96, 4), (2, 8, 9, 40, 1)],
)
@torch.no_grad()
def test_against_plain_pytorch(portraits, views, length, channels, heads, backend):
    torch.manual_seed(views)
    block = randomized(MultiViewTransformerBlock(channels, heads, context_channels=24), seed=5)
    set_attention_backend(block, backend)
    state = {name: value.double() for name, value in block.state_dict().items()}
    x = torch.randn(portraits * views, length, channels)
    text, image = torch.randn(portraits * views, 5, 24), torch.randn(portraits, 11, 24)
    zero = torch.zeros_like(text)
    for given_text, plain_text in ((text, text), (None, zero), (zero, zero)):
        for tokens in (image, None):
            ours = block(x, given_text, image_embeds=tokens, num_views=views)
            plain = plain_block(
                state,
                x.double(),
                plain_text.double(),
                None if tokens is None else tokens.double(),
                views=views,
                heads=heads,
            )
            assert max_abs_diff(ours, plain) < 1e-5


@torch.no_grad()
def test_ready_keys_and_values_and_rows_without_an_image():
    block = randomized(MultiViewTransformerBlock(64, 2, context_channels=24), seed=5)
    x, image = torch.randn(4, 9, 64), torch.randn(1, 11, 24)
    with_image = block(x, image_embeds=image, num_views=4)
    ready = block.image_key_value(image)
    assert torch.equal(block(x, image_embeds=ready, num_views=4), with_image)
    both = block(torch.cat([x, x]), image_embeds=ready, num_views=4)
    # Rounded differently: 72 rows of a GEGLU go through AMX where there is one, 36 don't (1.2e-6 seen).
    assert max_abs_diff(both, torch.cat([block(x, num_views=4), with_image])) < 4e-6


def test_more_portraits_than_rows_is_an_error():
    block = MultiViewTransformerBlock(64, 2, context_channels=24)
    with pytest.raises(ValueError, match="image_embeds: expected at most 1 portraits"):
        block(torch.randn(4, 9, 64), image_embeds=torch.randn(2, 11, 24), num_views=4)
