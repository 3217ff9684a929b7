"""Weight files: finding, validating, reading and writing them."""

# ruff: noqa: F401  names of the package
from gafext.weights.files import (
    available_variant,
    find_weights,
    parse_json,
    read_json,
    require_safetensors,
    write_json,
)
from gafext.weights.keys import KeyRule, same_key, unwrapped_rule
from gafext.weights.store import WeightFile, check_keys, listing, load_into, save_weights
