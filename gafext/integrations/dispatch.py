"""gafext's attention behind diffusers' dispatcher, for transformers such as Flux that choose a backend by name."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, _native_attention
from torch import Tensor

from gafext.ops import flash_attention

NAME = "gafext"


def register_attention_backend() -> None:
    """Make "gafext" a backend of diffusers' `set_attention_backend` and `attention_backend`; `accelerate` does so too.

    diffusers keeps its backends in an enumeration that has no public way to add one: a member is added as the
    enumeration itself would.
    """
    if NAME in AttentionBackendName._value2member_map_:
        return
    member: Any = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[NAME] = member
    # Enumerations pickle a member as its value, which a process without this member could not read.
    member.__reduce_ex__ = lambda protocol: (registered_name, ())
    _AttentionBackendRegistry.register(member)(_attention)


def registered_name() -> AttentionBackendName:
    """Return the member of diffusers' enumeration, added if it is not there yet; a pickled one calls this function."""
    register_attention_backend()
    return AttentionBackendName(NAME)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attend with [B,L,H,D] tensors; what flash_attention does not compute falls back to diffusers' native backend."""
    same_heads = query.shape[2] == key.shape[2] and key.shape == value.shape
    if attn_mask is not None or dropout_p > 0 or return_lse or _parallel_config is not None or not same_heads:
        options = {"enable_gqa": enable_gqa, "return_lse": return_lse, "_parallel_config": _parallel_config}
        return _native_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, **options)
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attention(*heads, scale=scale, is_causal=is_causal).transpose(1, 2)
