"""Weight files: finding, validating, reading and writing them."""

from gafext.weights.files import (
    available_variant,
    find_weights,
    parse_json,
    read_json,
    require_safetensors,
    write_json,
)
from gafext.weights.keys import KeyRule, same_key, unwrapped_rule
from gafext.weights.store import (
    WeightFile,
    check_keys,
    listing,
    load_into,
    remove_shards,
    save_tensors,
    save_weights,
)

__all__ = [
    "KeyRule",
    "WeightFile",
    "available_variant",
    "check_keys",
    "find_weights",
    "listing",
    "load_into",
    "parse_json",
    "read_json",
    "remove_shards",
    "require_safetensors",
    "same_key",
    "save_tensors",
    "save_weights",
    "unwrapped_rule",
    "write_json",
]
