"""Keys of LoRA files, as peft, diffusers, kohya and LyCORIS write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from gafext.config import UNetConfig
from gafext.weights.keys import ldm_unet_names, ldm_unet_rule

_FACTOR = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<peft>A|B)(?:\.\w+)?"  # peft, diffusers
    r"|[._]lora(?:_linear_layer)?\.(?P<diffusers>down|up)"  # older diffusers: x.lora.down, processor.to_q_lora.down
    r"|\.lora_(?P<kohya>down|mid|up))"  # kohya
    r"\.weight"
)
_WRAPPERS = re.compile(r"^(?:(?:base_model|model|module|unet|_orig_mod)\.)+")
_OTHER_FORMS = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "OFT": ("oft_blocks", "oft_diag"),
}


def lora_rule(modules: Iterable[str], config: UNetConfig) -> Callable[[str], tuple[str, str] | None]:
    """Read LoRA files: keys to (module, "down" | "mid" | "up" | "alpha"), or None for other keys.

    Args:
        modules: names of the network's layers; needed for kohya's names, in which every dot is an underscore.
        config: configuration of the U-Net; needed for latent diffusion's block names.

    Source: github.com/kohya-ss/sd-scripts: networks/lora.py; diffusers: loaders/lora_conversion_utils.py.
    """
    from_ldm, ldm = ldm_unet_rule(config), {name: other for other, name in ldm_unet_names(config).items()}
    flat = {}
    for name in modules:
        flat[name.replace(".", "_")] = name
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            other = ldm.get(".".join(parts[:length]))
            if other is not None:
                flat["_".join([other, *parts[length:]]).replace(".", "_")] = name
                break

    def rule(key: str) -> tuple[str, str] | None:
        match = _FACTOR.fullmatch(key)
        if match is not None:
            part = match["peft"] or match["diffusers"] or match["kohya"]
            name, part = match["module"], {"A": "down", "B": "up"}.get(part, part)
        elif key.endswith(".alpha"):
            name, part = key.removesuffix(".alpha"), "alpha"
        else:
            return None
        name = _WRAPPERS.sub("", name)
        if name.startswith("lora_unet_"):
            return flat.get(name.removeprefix("lora_unet_"), name), part
        name = from_ldm(f"{name}.").removesuffix(".")
        return re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", ".")), part

    return rule


def is_factor(key: str) -> bool:
    """Return whether a key names a factor of a LoRA."""
    return _FACTOR.fullmatch(key) is not None


def other_forms(keys: Iterable[str]) -> list[str]:
    """List the adapters other than LoRA that keys belong to, with one of the keys: "LoHa (x.hada_w1_a)"."""
    keys = sorted(keys)
    found = {
        form: next((key for key in keys if not names.isdisjoint(key.split("."))), None)
        for form, names in ((form, frozenset(names)) for form, names in _OTHER_FORMS.items())
    }
    return [f"{form} ({key})" for form, key in found.items() if key is not None]
