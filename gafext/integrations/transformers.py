"""gafext's attention behind transformers' attention interface; imported once transformers is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gafext.ops import flash_attention

NAME = "gafext"
STOCK = "sdpa"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' "sdpa" does: with flash_attention where there is no mask, dropout, bias or shared head.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: [B,H,Lq,D].
        key: [B,H,Lk,D].
        value: [B,H,Lk,D]; where D is another one, transformers' own implementation computes the call.
        attention_mask: for transformers' own implementation.
        dropout: probability in training.
        scaling: factor of the scores; None is 1/sqrt(D).
        is_causal: query i attends to keys j <= i.
        options: for transformers' own implementation, which computes the call if any but a flag is set.

    Returns:
        [B,Lq,H,D] and None, in place of the weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unusual = any(value is not None and not isinstance(value, bool) for value in options.values())
    same_heads = query.shape[:2] == key.shape[:2] and key.shape == value.shape
    if unusual or attention_mask is not None or dropout > 0 or not same_heads:
        options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attended = flash_attention(query, key, value, scale=scaling, is_causal=bool(causal and query.shape[2] > 1))
    return attended.transpose(1, 2), None


def register_attention() -> None:
    """Make "gafext" an attention implementation that transformers' models can be set to."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def reason_to_leave(model: PreTrainedModel) -> str:
    """Say why a model keeps its attention implementation; empty if it does not."""
    implementation = model.config._attn_implementation
    if implementation not in (NAME, STOCK):
        return f"its attention implementation is {implementation!r}"
    return "" if model._can_set_attn_implementation() else "its attention implementation cannot be set"


def set_attention(model: PreTrainedModel, *, gafext: bool) -> bool:
    """Set the attention implementation of a model to gafext's or back; return whether that was a change.

    Parts of the model, which have a configuration within its own, change only if they have the same implementation.
    """
    old, new = (STOCK, NAME) if gafext else (NAME, STOCK)
    if model.config._attn_implementation != old:
        return False
    register_attention()
    model.set_attn_implementation(_implementations(model.config, old, new) if model.config.sub_configs else new)
    return True


def _implementations(config: Any, old: str, new: str) -> dict[str, Any]:
    """Map a configuration ("") and those within it to their implementations, with `new` for `old`."""
    own = config._attn_implementation
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    nested = {name: _implementations(part, old, new) for name, part in parts.items() if part is not None}
    return {"": new if own == old else own} | nested
