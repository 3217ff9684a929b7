import torch
import torch.nn.functional as F


def reference_flash_attention(query, key, value, *, scale=None, is_causal=False):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (query @ key.transpose(-1, -2))
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1) @ value


def unsupported_reasons(query, key, value):
    reasons = []
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append("dtype")
    if query.shape[-1] > 256:
        reasons.append("head_dim")
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        reasons.append("stride")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        reasons.append("inputs need a gradient")
    return reasons


def flash_attention(query, key, value, *, scale=None, is_causal=False):
    if unsupported_reasons(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, scale=scale, is_causal=is_causal)
    return torch.ops.gafext.flash_attention(query, key, value, scale=scale, is_causal=is_causal)
