"""Damaged checkpoint files, from a seed: bytes flipped, cut and put in, headers that lie, JSON of every wrong kind."""

import json
import random
import struct

# Raw JSON in place of a value: wrong types, sizes that no network has, numbers that are none, nesting without end.
VALUES = [
    *("null", "true", "false", "0", "-1", "1", "3", "2.5", "-0.0", "1e-300", "1e400", "-1e400", "NaN", "Infinity"),
    *("-Infinity", str(2**31), str(2**63), str(2**64), str(10**30), "9" * 5000, '"x"', '""', '"\\ud800"', "[]", "{}"),
    *("[0]", "[1e9]", '["x"]', "[null]", "[[8]]", "1000000", "4096", "65536", "[32,32]", '"silu"'),
    *("[" * 900 + "]" * 900, "[" * 200_000, '{"a":' * 900 + "1" + "}" * 900),
    *("[" + "8," * 100_000 + "8]", "[" + "65536," * 63 + "65536]"),
]
TYPES = ["I64", "I32", "F64", "F16", "BF16", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "F8_E8M0", "C64", "U16", "f32", "X", 3]


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return rng.choice([_flip, _cut, _insert])(data, rng)
    return _with_wrong_value(json.loads(data), rng).encode("utf-8", "surrogatepass")


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header, body, kind = data[8 : 8 + size], data[8 + size :], rng.random()
    if kind < 0.15:
        lies = [0, 1, 2, size - 1, size + 1, len(data), 2**31, 2**32, 2**63, 2**64 - 1, 100_000_001]
        return struct.pack("<Q", rng.choice(lies)) + header + body
    if kind < 0.25:
        return _cut(data, rng)
    header = rng.choice([_flip, _insert])(header, rng) if kind < 0.5 else _wrong_header(json.loads(header), rng)
    return struct.pack("<Q", len(header) if rng.random() < 0.8 else size) + header + body


def _flip(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice([1, 2, 7, 100])) + data[at:]


def _with_wrong_value(value: dict, rng: random.Random) -> str:
    """The object as JSON, with one value or itself replaced, a key gone, there twice, or new."""
    paths = [()]
    for path in paths:
        node = _at(value, path)
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        paths.extend((*path, key) for key in keys)
    path = rng.choice(paths)
    if not path:
        return rng.choice(VALUES)
    node, key, kind = _at(value, path[:-1]), path[-1], rng.random()
    if kind < 0.3 and isinstance(node, dict):
        if kind < 0.1:
            del node[key]
        elif kind < 0.2:
            node["@"] = rng.choice([None, 1, "x", node[key]])
            return json.dumps(value).replace('"@"', json.dumps(key))
        else:
            node[rng.choice(["new", "", "\x1b[31m", "a" * 10_000, "\ud800"])] = 1
        return json.dumps(value)
    node[key] = "@"
    return json.dumps(value).replace('"@"', rng.choice(VALUES))


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def _wrong_header(header: dict, rng: random.Random) -> bytes:
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, kind = header[name], rng.random()
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if kind < 0.25:
        entry["dtype"] = rng.choice(TYPES)
    elif kind < 0.5:
        shapes = [[], [0], [2**63], [2**64 - 1, 2], [2**32, 2**32], [2**32, 2**32, 0], [-1], [1.5], ["x"], None]
        entry["shape"] = rng.choice([*shapes, shape[::-1], [*shape, 1], [1, *shape], [1] * 100_000])
    elif kind < 0.75:
        offsets = [[end, begin], [begin, begin], [begin, 2**63], [2**64 - 1, 0], [-1, end], [begin], [begin, end, end]]
        entry["data_offsets"] = rng.choice([*offsets, [begin + 4, end + 4], [0, end], None, [begin, end - 4]])
    elif kind < 0.85:
        return _with_wrong_value(header, rng).encode("utf-8", "surrogatepass")
    elif kind < 0.95:
        new = rng.choice(["extra", "", "a" * 100_000, name + "x"])
        header[new] = header.pop(name) if rng.random() < 0.5 else dict(entry)
    else:
        return json.dumps(header).replace('"dtype"', '"dtype": "F16", "dtype"', 1).encode()
    return json.dumps(header).encode()
