"""Profile a pass of the U-Net on the CPU: the share of each kind of operation, and its fraction of the machine's limit.

    python benchmarks/profile_pass.py [--network sd21] [--dtype float32] [--batch 8] [--size 32] [--json FILE]

Every operation is timed as PyTorch dispatches it. What the pass takes beyond them is "Python": modules, dispatch and
views; the profiler's own time is left out of the pass. The limits are measured in the same rounds, between passes: for
products a matrix product of torch (the fastest of its dtypes), for all others a copy that no cache holds. Winograd's
convolutions exceed the first, and what the caches hold exceeds the second. The table is of the median round.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from race import json_file, positive, random_network, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gafext.bench.environment import environment, watch_others
from gafext.config import SD21_MULTIVIEW_UNET, SD21_UNET
from gafext.models import int8
from gafext.models.unet import MultiViewUNet

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul")
_NORMS = ("norm", "silu")
_ROUNDING = ("round", "div", "abs", "amax", "clamp", "amin")  # of inputs to 8 bits
_COPIES = ("cat", "clone", "contiguous", "copy", "reshape", "flatten", "to", "pad", "upsample", "repeat")
_VIEWS, _TEXT, _IMAGE = 4, 77, 257


@dataclass
class Row:
    """Calls of one operation at one shape."""

    kind: str
    op: str
    shape: str
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0  # of the formula, 0 if memory is the limit
    bytes: int = 0  # of all inputs and results


class Profiler(TorchDispatchMode):
    """Time every operation; composite ones as a whole, because they are dispatched without autograd."""

    def __init__(self):
        super().__init__()
        self.rows: dict[tuple, Row] = {}
        self.own_seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        end = time.perf_counter()
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if isinstance(out, Tensor) and (name.endswith("_") or not _is_view(out, tensors)):
            kind, shape, flops = classify(name, tensors, out, args)
            row = self.rows.setdefault((kind, name, shape), Row(kind, name, shape))
            row.calls, row.seconds, row.flops = row.calls + 1, row.seconds + end - start, row.flops + flops
            row.bytes += sum(x.nbytes for x in (*tensors, out))
        self.own_seconds += time.perf_counter() - end
        return out


def _is_view(out: Tensor, tensors: list[Tensor]) -> bool:
    storage = out.untyped_storage().data_ptr()
    return any(x.untyped_storage().data_ptr() == storage for x in tensors)


def classify(name: str, tensors: list[Tensor], out: Tensor, args: tuple) -> tuple[str, str, int]:
    """Return an operation's kind, its shape in words, and the FLOPs of its formula: 0 if memory is the limit."""
    name = name.strip("_")
    plain = "x".join(map(str, out.shape))
    if "conv" in name:
        weight = next(x for x in tensors[1:] if x.ndim == 4)
        side, (channels, in_channels) = weight.shape[2], weight.shape[:2]
        shape = f"{len(out)},{in_channels}->{channels},{out.shape[2]}x{out.shape[3]}"
        return f"conv{side}x{side}", shape, 2 * out.numel() * in_channels * side * side
    if name == "cross_view_attention":
        query, views = tensors[0], args[3]
        return "attention across views", f"V={views},{plain}", 4 * query.numel() * views
    if "attention" in name:
        query, key = tensors[:2]
        (batch, heads, length, width), keys = query.shape, key.shape[2]
        kind = {length: "self-attention", _TEXT: "attention to text", _IMAGE: "attention to image"}.get(
            keys, "attention"
        )
        return kind, f"{batch},{heads},{length}x{keys},{width}", 4 * query.numel() * keys
    if name == "geglu_gate":
        return "gate", plain, 0
    if "linear" in name or "geglu" in name or name in _PRODUCTS:
        x = tensors[name in ("addmm", "baddbmm")]
        outputs = (1 + name.startswith("geglu")) * out.shape[-1]
        rows, kind = out.numel() // out.shape[-1], "linear, GEGLU" if "geglu" in name else "linear"
        if kind == "linear" and x.ndim == 4:  # [batch, height, width, channels]
            shape = f"{len(x)},{x.shape[-1]}->{outputs},{x.shape[1]}x{x.shape[2]}"
            return "conv1x1", shape, 2 * rows * outputs * x.shape[-1]
        return kind, f"{rows},{x.shape[-1]}->{outputs}", 2 * rows * outputs * x.shape[-1]
    for kind, words in {"norms, SiLU": _NORMS, "rounding to 8 bits": _ROUNDING, "copies": _COPIES}.items():
        if any(word in name.split("_") or (kind != "copies" and word in name) for word in words):
            return kind, plain, 0
    return ("sums" if name == "add" else "other"), plain, 0


def unet_pass(network: str, dtype: str, batch: int, size: int) -> Callable[[], Tensor]:
    """Build a U-Net of SD 2.1's size with random weights, and return its pass of [batch,C,size,size] latents."""
    config = {"sd21": SD21_UNET, "multiview": SD21_MULTIVIEW_UNET}[network]
    in_8_bits = dtype.startswith("int8")
    if in_8_bits:
        int8.require_supported(torch.device("cpu"))
    float_dtype = getattr(torch, {"int8": "float32", "int8-bfloat16": "bfloat16"}.get(dtype, dtype))
    unet = random_network(MultiViewUNet, config, torch.device("cpu"), float_dtype)
    if in_8_bits:
        int8.quantize(unet)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(float_dtype)

    latents, timestep = random(batch, config.in_channels, size, size), torch.tensor(500.0)
    if network == "sd21":
        text = random(batch, _TEXT, config.cross_attention_dim)
        return lambda: unet(latents, timestep, text)
    # As the pipeline does: what does not change over the steps is computed once, and half of the batch has no image.
    conditioning = unet.precompute(
        pose=random(batch, config.pose_dim),
        image_embeds=random(batch // (2 * _VIEWS), _IMAGE, config.cross_attention_dim),
    )
    return lambda: unet(latents, timestep, conditioning=conditioning, num_views=_VIEWS)


def per_second(work: int, run: Callable[[], object]) -> float:
    """Return the speed of the fastest of some calls: a limit is what the machine can do undisturbed."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return work / min(seconds() for _ in range(10))


def limits(dtype: str) -> Callable[[], dict[str, float]]:
    """Return what measures the machine: FLOP/s of torch's matrix product, by dtype, and bytes/s of a copy."""
    dtypes = ["float32", *(["bfloat16"] if "bfloat16" in dtype else [])]
    matrices = {name: torch.randn(1024, 1024).to(getattr(torch, name)) for name in dtypes}
    source = torch.rand(16 << 20)
    target = source.clone()

    def measure() -> dict[str, float]:
        found = {f"{name} product": per_second(2 * 1024**3, lambda x=x: x @ x) for name, x in matrices.items()}
        return found | {"copy": per_second(2 * source.nbytes, lambda: target.copy_(source))}

    return measure


def profiled(run: Callable[[], Tensor], measure: Callable[[], dict[str, float]]) -> dict:
    """Measure the limits, a pass as it is, and a pass by operation."""
    found = {"limits": measure()}
    start = time.perf_counter()
    run()
    found["seconds_unprofiled"] = time.perf_counter() - start
    with Profiler() as profiler:
        start = time.perf_counter()
        run()
        found["seconds"] = time.perf_counter() - start - profiler.own_seconds
    return found | {"rows": list(profiler.rows.values())}


def fraction(rows: list[Row], found: dict) -> float:
    """Return the fraction of the limit that some operations of one kind reach together."""
    seconds, flops = sum(row.seconds for row in rows), sum(row.flops for row in rows)
    product = max(speed for name, speed in found["limits"].items() if name != "copy")
    return flops / seconds / product if flops else sum(row.bytes for row in rows) / seconds / found["limits"]["copy"]


def summarized(found: dict) -> dict:
    """Sum a profiled pass by kind, the largest share first; the shares add up to the pass."""
    rows, total = found.pop("rows"), found["seconds"]
    kinds = []
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [row for row in rows if row.kind == kind]
        sums = {name: sum(getattr(row, name) for row in own) for name in ("calls", "seconds", "flops", "bytes")}
        kinds.append({"kind": kind, "share": sums["seconds"] / total, **sums, "of_limit": fraction(own, found)})
    python = total - sum(row.seconds for row in rows)
    kinds.append({"kind": "Python", "share": python / total, "calls": 0, "seconds": python})
    shapes = [{**asdict(row), "share": row.seconds / total, "of_limit": fraction([row], found)} for row in rows]
    by_share = {"key": lambda row: row["share"], "reverse": True}
    return found | {"kinds": sorted(kinds, **by_share), "shapes": sorted(shapes, **by_share)}


def table(result: dict, most: int) -> list[str]:
    """Format a profile: the kinds, and the shapes of the largest shares."""
    speeds = ", ".join(f"{name} {speed * 1e-9:.1f} G/s" for name, speed in result["limits"].items())
    lines = [f"{result['seconds']:.3f} s (unprofiled {result['seconds_unprofiled']:.3f}); {speeds}"]
    for title, rows in ((f"{'kind':60}", result["kinds"]), (f"{'shape':60}", result["shapes"][:most])):
        lines.append(f"\n{title}{'calls':>6}{'seconds':>9}{'share':>7}{'of limit':>10}")
        for row in rows:
            name = f"{row['kind']:22} {row['op']:20} {row['shape']}" if "op" in row else row["kind"]
            reached = f"{row['of_limit']:7.0%} {'flop' if row['flops'] else 'copy'}" if "of_limit" in row else ""
            lines.append(f"{name:60}{row['calls']:6}{row['seconds']:9.3f}{row['share']:7.1%}{reached:>13}")
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("sd21", "multiview"), default="sd21")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8", "int8-bfloat16"), default="float32")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--size", type=positive, default=32, help="of the latents")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--shapes", type=int, default=25, help="printed, those of the largest shares")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    args = parser.parse_args()
    if args.network == "multiview" and args.batch % (2 * _VIEWS):
        parser.error(f"--batch: expected a multiple of {2 * _VIEWS}, two passes of {_VIEWS} views, got {args.batch}")
    try:
        run = unet_pass(args.network, args.dtype, args.batch, args.size)
    except ValueError as error:  # 8 bits, on a processor without
        parser.error(str(error))
    measure = limits(args.dtype)
    run()
    share_of_others = watch_others()
    rounds = sorted((profiled(run, measure) for _ in range(args.rounds)), key=lambda found: found["seconds"])
    result = {
        "environment": environment("cpu"),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("json", "shapes")},
        "others_busy": share_of_others(),
        "load": os.getloadavg(),
        "seconds_of_rounds": [found["seconds"] for found in rounds],
        **summarized(rounds[(len(rounds) - 1) // 2]),
    }
    write(result, args.json)
    print(*table(result, args.shapes), sep="\n")


if __name__ == "__main__":
    main()
