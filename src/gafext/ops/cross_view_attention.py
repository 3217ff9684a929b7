import torch

from gafext.ops.flash_attention import unsupported_reasons as _head_reasons


def reference_cross_view_attention(query, key, value, num_views, *, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.unflatten(0, (-1, num_views)) for t in (query, key, value))
    weights = (scale * torch.einsum("bihld,bjhld->bhlij", q, k)).softmax(-1)
    return torch.einsum("bhlij,bjhld->bihld", weights, v).flatten(0, 1)


def unsupported_reasons(query, key, value, num_views):
    return _head_reasons(query, key, value) + (["num_views"] if num_views > 32 else [])


def cross_view_attention(query, key, value, num_views, *, scale=None):
    if unsupported_reasons(query, key, value, num_views):
        return reference_cross_view_attention(query, key, value, num_views, scale=scale)
    return torch.ops.gafext.cross_view_attention(query, key, value, num_views, scale=scale)
