"""Tokenization and encoding of prompts: the empty prompt without transformers, other prompts with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gafext import weights
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.models.clip_text import CLIPTextEncoder, CLIPTextOutput

_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_IDS = {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "!": 0}


def empty_prompt_ids(folder: str | Path, length: int) -> Tensor:
    """Return the token ids of the empty prompt: begin, end, then padding.

    The padding token is read from the tokenizer's files: ViT-L pads with the end token, Stable Diffusion 2 with "!".

    Args:
        folder: folder of a transformers tokenizer; missing files: the ids of ViT-L, 49406 and 49407.
        length: T, the text encoder's `max_position_embeddings`.

    Returns:
        [1,T] int64.

    Raises:
        CheckpointError: a file is damaged, or the vocabulary lacks one of the three tokens.
    """
    folder = Path(folder)
    tokens, ids = _special_tokens(folder), _vocabulary(folder)
    missing = sorted({token for token in tokens.values() if not isinstance(ids.get(token), int)})
    if missing:
        raise CheckpointError(f"{folder}: the vocabulary lacks the tokens {missing}")
    begin, end, pad = (ids[token] for token in tokens.values())
    return torch.tensor([([begin, end] + [pad] * length)[:length]])


def prompt_ids(folder: str | Path, prompt: str | list[str], length: int) -> Tensor:
    """Tokenize prompts with transformers, truncated or padded to one length.

    Args:
        folder: folder of a transformers CLIP tokenizer.
        prompt: one prompt or a list of B prompts.
        length: T, the text encoder's `max_position_embeddings`.

    Returns:
        [B,T] int64.

    Raises:
        CheckpointError: transformers is not installed, or cannot read the tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such folder, and a prompt other than '' needs its tokenizer")
    try:
        from transformers import CLIPTokenizer
    except ImportError:
        raise CheckpointError(
            f"{folder}: a prompt other than '' needs transformers (pip install transformers); or pass prompt_embeds"
        ) from None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # JSON, file and tokenizer errors: no common base class
        raise CheckpointError(f"{folder}: not readable as a CLIP tokenizer ({error})") from error
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return tokenizer([prompt] if isinstance(prompt, str) else list(prompt), **options).input_ids


@torch.no_grad()
def encode_text(
    folder: str | Path,
    prompt: str | list[str] = "",
    *,
    device: torch.device | str | None = None,
    variant: str | None = None,
) -> CLIPTextOutput:
    """Encode prompts with a checkpoint's text encoder, which is loaded for this call only.

    Args:
        folder: folder with `text_encoder/`, and `tokenizer/` for prompts other than "".
        prompt: one prompt or a list of B prompts; prompts other than "" need transformers.
        device: device to encode on; None: CPU; "meta": only the shapes, without reading the weights.
        variant: variant in the name of the weight file, such as "fp16".

    Returns:
        Output of the text encoder for B prompts, float32.

    Raises:
        CheckpointError: a file is missing or damaged, the tokenizer does not fit, or transformers is not installed.
    """
    folder = Path(folder)
    encoder = CLIPTextEncoder.from_pretrained(folder / "text_encoder", device=device, variant=variant)
    tokenizer, length = folder / "tokenizer", encoder.config.max_position_embeddings
    ids = empty_prompt_ids(tokenizer, length) if prompt == "" else prompt_ids(tokenizer, prompt, length)
    if ids.max() >= encoder.config.vocab_size:
        raise CheckpointError(
            f"{tokenizer}: expected token ids under the text encoder's vocab_size {encoder.config.vocab_size}, "
            f"got {int(ids.max())}"
        )
    if encoder.device.type == "meta":
        hidden = torch.empty(*ids.shape, encoder.config.hidden_size, device="meta")
        return CLIPTextOutput(hidden, hidden, hidden, hidden[:, 0])
    return encoder(ids.to(encoder.device))


def _special_tokens(folder: Path) -> dict[str, str]:
    """Read the begin, end and padding tokens: strings, or objects with a string `content`.

    special_tokens_map.json goes first, unless tokenizer_config.json says itself which tokens were added: so do
    transformers (tokenization_utils_base.py).
    """
    tokens = dict(_TOKENS)
    config, special = (
        weights.read_json(path) if (path := folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    for values in (config, {} if "added_tokens_decoder" in config else special):
        for name in tokens:
            value = values.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            tokens[name] = value if isinstance(value, str) else tokens[name]
    return tokens


def _vocabulary(folder: Path) -> dict[str, int]:
    if (folder / "vocab.json").is_file():
        return weights.read_json(folder / "vocab.json")
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _IDS
    values = weights.read_json(path)
    try:
        added = {entry["content"]: entry["id"] for entry in values.get("added_tokens") or []}
        return {**values["model"]["vocab"], **added}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer with a vocabulary ({error!r})") from None
