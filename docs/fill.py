"""Fill the numbers of README.md, docs/ and examples/mini/README.md in from the JSON that was measured.

    python docs/fill.py            # rewrite the pages, and draw docs/speedups.svg
    python docs/fill.py --check    # only say what would change; exit status 1 if anything would

A page has `<!--=NAME-->TEXT<!--/-->`, and TEXT is replaced by what `values()` has for NAME: a number, or a table.
Inside a paragraph a marker may not begin a line, where Markdown takes it for HTML.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "examples/mini/README.md", *sorted((ROOT / "docs").rglob("*.md")))
FIGURE = ROOT / "docs" / "speedups.svg"
MARKER = re.compile(r"<!--=([\w.]+)-->(.*?)<!--/-->", re.DOTALL)

RAPIDS = "cpu-sapphire-rapids-2-cores"
EPYC = "cpu-amd-epyc-avx2-2-cores"
CASCADE_LAKE = "cpu-cascade-lake-2-cores"
ZEN_4, ZEN_5 = "cpu-zen-4-2-cores", "cpu-zen-5-2-cores"
CASCADE = "cpu-cascade-lake-1-thread"
PROFILED = {"AVX2": f"{EPYC}-float32", "AVX-512": f"{CASCADE}-float32", "AVX-512, int8": f"{CASCADE}-int8"}
DROP_IN = {
    "stock": "diffusers",
    "accelerated": "the same, accelerated",
    "gafext": "gafext's own class",
    "compiled": "diffusers, torch.compile",
}


def load(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


def result(name: str) -> dict:
    return load(f"benchmarks/results/{name}.json")


def span(numbers, digits: int = 1) -> str:
    """Write the smallest and the largest number, once if they round to the same."""
    ends = [f"{end:.{digits}f}" for end in (min(numbers), max(numbers))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def table(heads: list[str], rows: list[list[str]]) -> str:
    head, *lines = (f"| {' | '.join(line)} |" for line in [heads, *rows])
    return "\n\n" + "\n".join([head, "|---" * len(heads) + "|", *lines]) + "\n\n"


class Races:
    """Speed-ups of a file of `gafext bench`."""

    def __init__(self, name: str) -> None:
        self.races = result(name)["races"]

    def speedups(self, op: str, *contestants: str, where: str = "", shape: str = "", mode: str = "warm") -> list[float]:
        """Of gafext over the fastest of the contestants, for each race whose description and shape match."""
        found = []
        for race in self.races:
            if (race["op"], race["mode"]) == (op, mode) and re.search(where, race["where"]) and shape in race["shape"]:
                named = {row["name"]: row["speedup"] for row in race["contestants"]}
                found.append(min(named[name] for name in contestants))
        if not found:
            raise ValueError(f"no race of {op} matches where={where!r}, shape={shape!r}, mode={mode!r}")
        return found

    def of_copy(self, shape: str, mode: str) -> list[float]:
        return [r["contestants"][0]["of_copy"] for r in self.races if shape in r["shape"] and r["mode"] == mode]


def operations() -> str:
    """The table of docs/benchmarks.md."""
    ours, epyc = Races(f"ops-{RAPIDS}"), Races(f"ops-{EPYC}-cross-view")

    def flash(*where: str) -> str:
        return "; ".join(span(ours.speedups("flash_attention", "sdpa", where=part)) for part in where)

    def views(races: Races, *contestants: str) -> str:
        rows = (races.speedups("cross_view_attention", *contestants, shape=f"V={count},") for count in (4, 6, 8, 16))
        return "; ".join(map(span, rows))

    def linear(*where: str) -> str:
        return "; ".join(span(ours.speedups("linear", "eager", "packed by MKL", where=part)) for part in where)

    convolutions = ("conv2d channels-last", "conv2d contiguous", "conv2d prepacked")
    geglus = ("eager", "eager compiled", "eager packed by MKL")
    sides = ("32x32", "16x16", r"\b8x8", r"\b4x4")
    rows = [
        ["flash attention against SDPA", "self-attention of 4096; 1024; 256; 64 tokens, heads of 64",
         flash("^self-attention, 64x64", "^self-attention, 4 views", "^self-attention, 16x16", "^self-attention, 8x8")],
        ["", "the autoencoder's head of 512, 4096; 1024 tokens", flash("^autoencoder, 64x64", "^autoencoder, 32x32")],
        ["", "257 image tokens; 77 text tokens; CLIP's 257, heads of 80", flash("^image tokens", "^text", "^CLIP")],
        ["across views against SDPA and its permutes", "V = 4; 6; 8; 16", views(ours, "sdpa")],
        ["against the best compiled form", "V = 4; 6; 8; 16", views(ours, "sdpa compiled", "elementwise compiled")],
        ["against batched products of permuted views, the best eager form (EPYC, AVX2)", "V = 4; 6; 8; 16",
         views(epyc, "matmul")],
        ["GEGLU against linear, chunk, gelu: eager, compiled, weights packed", "4096×320; 1024×640; 256×1280",
         "; ".join(f"{ratio:.1f}" for ratio in ours.speedups("geglu", *geglus))],
        ["linear layers against linear, weights packed or not", "8192 to 512 rows; 128 rows; 257 rows (CLIP)",
         linear(r"(32x32|16x16|\b8x8)$", r"\b4x4$", "^CLIP")],
        ["3×3 convolution against the fastest conv2d, weights packed or not", "32×32; 16×16; 8×8; 4×4",
         "; ".join(span(ours.speedups("conv3x3", *convolutions, where=side)) for side in sides)],
    ]  # fmt: skip
    command = result(f"ops-{RAPIDS}")["environment"]["command"].rsplit(maxsplit=1)[0]  # without its file
    heads = ["operation", "shapes of SD 2.1's U-Net", "times faster"]
    return table(heads, rows) + f"<!-- not run: it takes minutes -->\n```bash\n{command} FILE\n```\n\n"


def five_bars() -> list[tuple[str, float]]:
    """The README's figure: four operations and the whole U-Net, on the Sapphire Rapids."""
    ours = Races(f"ops-{RAPIDS}")
    [flash] = ours.speedups("flash_attention", "sdpa", where="^self-attention, 64x64")
    [views] = ours.speedups("cross_view_attention", "sdpa", where="^4 views, 32x32")
    [geglu] = ours.speedups("geglu", "eager", "eager compiled", "eager packed by MKL", where="^4 views, 32x32")
    forms = ("conv2d channels-last", "conv2d contiguous", "conv2d prepacked")
    [conv] = ours.speedups("conv3x3", *forms, where="^4 views with guidance, 32x32")
    return [
        ("flash attention of 4096 tokens", flash),
        ("attention across 4 views", views),
        ("GEGLU", geglu),
        ("3×3 convolution of 32×32", conv),
        ("the whole U-Net", result(f"unet-{RAPIDS}")["unet"]["sdpa"]["times_auto"]),
    ]


def figure() -> str:
    """Draw `five_bars` as SVG."""
    bars = five_bars()
    scale, left, step, width = 340 / max(ratio for _, ratio in bars), 200, 26, 640
    height = step * len(bars) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row, (name, ratio) in enumerate(bars):
        top = 8 + step * row
        parts += [
            f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{name}</text>',
            f'<rect x="{left}" y="{top}" width="{ratio * scale:.1f}" height="18" fill="#1f77b4"/>',
            f'<text x="{left + ratio * scale + 6:.1f}" y="{top + 14}">{ratio:.1f} times</text>',
        ]
    line, bottom = left + scale, 8 + step * len(bars)
    parts += [
        f'<line x1="{line:.1f}" y1="4" x2="{line:.1f}" y2="{bottom}" stroke="#000000" stroke-dasharray="3 3"/>',
        f'<text x="{line:.1f}" y="{bottom + 16}" text-anchor="middle">1: PyTorch</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def compared(rows: dict, baseline: str, names: dict[str, str]) -> str:
    """Tabulate a race of networks: time relative to the baseline, and difference."""
    lines = []
    for key, name in names.items():
        row, times = rows[key], f"times_{baseline}"
        low, high = row["quartiles"]
        difference = "" if key == baseline else f"{row['relative_difference']:.1g}"
        lines.append([name, f"{row['median']:.1f}", f"{row[times]:.2f}", f"{low:.2f} to {high:.2f}", difference])
    return table(["", "seconds of a pass", "relative", "quartiles", "difference"], lines)


def peers(*files: str) -> str:
    """Tabulate the races of full_size.py --peers, run by run, each relative to its own float32 of gafext."""
    lines = []
    for run, file in enumerate(files, 1):
        for name, row in result(f"peers-{file}")["unet"].items():
            if "median" not in row:  # what the machine does not offer
                continue
            low, high = row["quartiles"]
            times = f"{row['median']:.1f}", f"{row['times_gafext float32']:.2f}", f"{low:.2f} to {high:.2f}"
            difference = "" if name == "gafext float32" else f"{row['relative_difference']:.1g}"
            lines.append([*([str(run)] if len(files) > 1 else []), name, *times, difference])
    heads = ["", "seconds of a pass", "relative", "quartiles", "difference"]
    return table(["run", *heads] if len(files) > 1 else heads, lines)


def train_step() -> str:
    lines = []
    for name, rows in result("train-step-cpu-zen-4-1-thread")["cases"].items():
        ours, theirs = rows["gafext"], rows["pytorch"]
        low, high = ours["quartiles"]
        ratio = [f"{1 / ours['times_pytorch']:.2f}", f"{1 / high:.2f} to {1 / low:.2f}"]
        seconds = [f"{1000 * row['median']:.0f}" for row in (theirs, ours)]
        lines.append([name, *seconds, *ratio, f"{ours['relative_difference']:.0e}"])
    heads = ["forward and backward", "PyTorch, ms", "gafext, ms", "times faster", "quartiles", "difference"]
    return table(heads, lines)


def train_memory() -> dict[str, str]:
    peaks = result("train-memory-cpu-zen-4-1-thread")["peak_bytes"]
    return {f"memory.{name}": f"{peaks[f'{name} checkpointing'] / 2**30:.1f}" for name in ("without", "with")}


def presets() -> str:
    columns = {
        "PSNR dB": "psnr:.2f",
        "SSIM": "ssim:.3f",
        "consistency dB": "consistency:.2f",
        "to quality's views dB": "psnr_to_quality:.1f",
        "times as fast: steps": "times_as_fast:.1f",
        "in all": "times_as_fast_in_all:.1f",
    }
    lines = []
    for number, row in enumerate(result("presets-cpu-sapphire-rapids-1-thread")["options"], 1):
        shown = [f"{{{column}}}".format(**row) for column in columns.values()]
        if row["name"] == "quality":
            shown[3] = ""
        lines.append([str(number), row["name"], *shown])
    return table(["", "option", *columns], lines)


def precision(machine: str) -> str:
    tabulate = runpy.run_path(str(ROOT / "benchmarks/precision_table.py"))["table"]
    return "\n\n" + "\n".join(tabulate(result(f"precision-{machine}"))) + "\n\n"


def peaks() -> dict[tuple, dict]:
    return {(row["part"], row["rows"], row["size"]): row for row in result(f"memory-{EPYC}")["peaks"]}


def whole_run(name: str) -> str:
    run = result(f"whole-runs-{EPYC}")["runs"][name]
    return f"{run['peak'] / 2**30:.1f} GiB in all, {run['before'] / 2**30:.1f} GiB of them weights"


def memory() -> str:
    found = peaks()

    def gib(part: str, rows: int, *sizes: int) -> str:
        return "; ".join(f"{found[part, rows, size]['bytes'] / 2**30:.2f} GiB" for size in sizes)

    return table(
        ["stage, at the published sizes", "peak"],
        [
            ["U-Net, 4 views with guidance, 32×32 latents; 64×64", gib("unet", 8, 32, 64)],
            ["latent upsampler, to 64×64; to 128×128", gib("upsampler", 1, 64, 128)],
            ["autoencoder, a view of 256×256; 512×512; 1024×1024", gib("decoder", 1, 32, 64, 128)],
        ],
    )


def pipeline(file: str) -> str:
    names = {"gafext": "gafext", "stock": "diffusers", "compile": "torch.compile", "openvino": "OpenVINO"}
    rows = result(f"pipeline-{file}")["contestants"]
    stages = ["encode", "denoise", "upsample", "decode"]
    lines = []
    for key, name in ((key, name) for key, name in names.items() if key in rows):
        row = rows[key]["stages"]
        medians = [f"{row[stage]['median']:.2f}" for stage in (*stages, "all")]
        lines.append([name, *medians, f"{row['all']['times_gafext']:.2f}"])
    return table(["seconds", *stages, "in all", "relative"], lines)


def profile(machines: dict[str, str]) -> str:
    """Tabulate share and fraction of the limit of the first machine's kinds, machine by machine."""
    passes = [{kind["kind"]: kind for kind in result(f"profile-{name}")["kinds"]} for name in machines.values()]
    lines = []
    for name, first in passes[0].items():
        if first["share"] > 0.001:
            kinds = [kinds.get(name, {"share": 0.0}) for kinds in passes]
            shares = [f"{100 * kind['share']:.1f} %" for kind in kinds]
            limits = [f"{kind['of_limit']:.2f}" if "of_limit" in kind else "" for kind in kinds]
            lines.append([name, *(cell for pair in zip(shares, limits, strict=True) for cell in pair)])
    return table(["", *(cell for name in machines for cell in (f"{name}: of the time", "of the limit"))], lines)


def samplers() -> str:
    lines = []
    for race in result("samplers-cpu-amd-epyc-avx2-1-thread")["races"]:
        ours, theirs = race["contestants"]
        views = race["shape"].partition(",")[0].removeprefix("V=")
        lines.append([race["op"].removesuffix(" step"), views, f"{ours['median_ms']:.2f}", f"{theirs['speedup']:.1f}"])
    return table(["sampler", "views", "ms", "times faster"], lines)


def scores(lines: list[dict], *columns: str) -> str:
    """Tabulate lines of `gafext eval`."""
    named = {
        "psnr": ("PSNR dB", 1),
        "ssim": ("SSIM", 3),
        "face": ("face dB", 1),
        "sharpness": ("sharpness", 2),
        "consistency": ("consistency dB", 1),
    }
    rows = [[line["name"], *(f"{line[column]:.{named[column][1]}f}" for column in columns)] for line in lines]
    return table(["", *(named[column][0] for column in columns)], rows)


def built_in() -> dict[str, str]:
    """What is said of the built-in model, from its card and from three JSON files of examples/mini."""
    [card] = re.findall(r"```\n(.*?)```", (ROOT / "gafext/assets/model/README.md").read_text(), re.DOTALL)
    ablations = load("examples/mini/ablations.json")["lines"]
    blurs = {line["name"]: line for line in load("examples/mini/what_blurs.json")}
    held_out = [line | {"name": name[10:]} for name, line in blurs.items() if name.startswith("held out: ")]
    [generated] = [line for line in ablations if line["name"] == "generated"]
    changed = {re.sub(r"\W+", "_", line["name"]): line for line in ablations}

    def less(than: str, name: str) -> str:
        return f"{blurs[f'held out: {than}']['psnr'] - blurs[f'held out: {name}']['psnr']:.1f}"

    return {
        "card": f"\n\n```\n{card}```\n\n",
        "ablations": scores([line for line in ablations if line["name"] != "the truth"], "psnr", "ssim", "consistency"),
        "what_blurs": scores(held_out, "psnr", "face", "sharpness", "consistency"),
        "photographs": scores(load("examples/mini/photographs.json")["lines"], "psnr", "face", "consistency"),
        "blurs.unet": less("codec", "one step from t=100"),
        "blurs.upsampler": less("codec, large", "upsampler of true latents, large"),
        "blurs.face": f"{blurs['held out: codec']['face']:.0f}",
        "blurs.trained": f"{blurs['trained: run, guidance_scale 1.5']['psnr']:.1f}",
        "blurs.held_out": f"{blurs['held out: run, guidance_scale 1.5']['psnr']:.1f}",
        "lost.consistency": f"{generated['consistency'] - changed['attn_cv_off']['consistency']:.1f}",
    } | {f"lost.{name}": f"{generated['psnr'] - line['psnr']:.1f}" for name, line in changed.items()}


def trained() -> str:
    """What `gafext train` makes of the small parent of examples/train in ten minutes."""
    [before] = [line for line in load("examples/train/parent.json")["lines"] if line["name"] == "generated"]
    after = load("examples/train/trained.json")["lines"]
    wanted = ("copy of the portrait", "mean picture", "generated", "generated, no normal maps given")
    wanted += ("no image tokens", "attn_cv off", "zero normals", "wrong cameras")
    lines = [before | {"name": "the untrained parent"}, *(line for line in after if line["name"] in wanted)]
    return scores(lines, "psnr", "ssim", "face", "consistency")


def values() -> dict[str, str]:
    """Everything that pages may name."""
    unet = result(f"unet-{RAPIDS}")["unet"]["sdpa"]
    whole = result(f"full-size-{RAPIDS}")["seconds_in_all"]
    drop_in, in_8_bits = result(f"drop-in-{EPYC}")["unet"], result(f"peers-{RAPIDS}-int8")["unet"]
    cold, epyc = Races(f"ops-{RAPIDS}-cold"), Races(f"ops-{EPYC}-cross-view")
    longest = result("lengths-cpu-amd-epyc-avx2-1-thread")["races"][-1]["contestants"]
    mib = {row["name"]: row["peak_mib"] for row in longest}
    [compiled] = Races(f"ops-{RAPIDS}").speedups(
        "cross_view_attention", "sdpa compiled", "elementwise compiled", where="^4 views, 32x32"
    )
    small = result(f"pipeline-built-in-{RAPIDS}")["contestants"]
    found, four = peaks(), {"shape": "V=4,", "mode": "cold"}
    known = {
        "five": "; ".join(f"{name} {ratio:.1f}" for name, ratio in five_bars()),
        "five.compiled": f"{compiled:.1f}",
        "small.diffusers": f"{small['stock']['stages']['all']['times_gafext']:.2f}",
        "small.openvino": f"{small['openvino']['stages']['all']['times_gafext']:.2f}",
        "operations": operations(),
        "cold.copy": span(cold.of_copy(**four)),
        "cold.sdpa": span(cold.speedups("cross_view_attention", "sdpa", **four)),
        "cold.epyc": span(epyc.speedups("cross_view_attention", "matmul", **four)),
        "unet.times": f"{unet['times_auto']:.1f}",
        "unet.quartiles": " and ".join(f"{end:.1f}" for end in unet["quartiles"]),
        "unet.difference": f"{unet['largest_difference']:.0e}",
        "whole.ours": f"{whole['auto']:.0f}",
        "whole.theirs": f"{whole['sdpa']:.0f}",
        "peers": peers(EPYC),
        "peers.amx": peers(RAPIDS, f"{RAPIDS}-int8"),
        "peers.avx512": peers(f"{RAPIDS}-without-amx", f"{RAPIDS}-without-amx-int8"),
        "peers.cascade_lake": peers(CASCADE_LAKE, f"{CASCADE_LAKE}-int8"),
        "peers.zen_4": peers(ZEN_4, f"{ZEN_4}-int8"),
        "peers.zen_5": peers(ZEN_5, f"{ZEN_5}-int8"),
        "amx.int8": f"{100 * in_8_bits['gafext int8']['relative_difference']:.1f} %",
        "amx.int8_bfloat16": f"{100 * in_8_bits['gafext int8-bfloat16']['relative_difference']:.1f} %",
        "drop_in": f"{drop_in['accelerated']['times_stock']:.2f}",
        "drop_in_table": compared(drop_in, "stock", DROP_IN),
        "profile": profile(PROFILED),
        "profile.zen_4": profile({dtype: f"{ZEN_4}-{dtype}" for dtype in ("float32", "bfloat16", "int8-bfloat16")}),
        "train_step": train_step(),
        **train_memory(),
        "samplers": samplers(),
        "trained": trained(),
        "pipeline": pipeline(f"built-in-{RAPIDS}"),
        "pipeline.sd21": pipeline(f"sd21-{ZEN_4}"),
        "presets": presets(),
        "precision": precision("cpu-zen-4-1-thread"),
        "precision.avx2": precision(EPYC),
        "memory": memory(),
        "memory.512": f"{found['unet', 8, 64]['bytes'] / 2**30:.2f}",
        "memory.whole_32": whole_run("32 views, 256x256"),
        "memory.whole_1024": whole_run("4 views, 1024x1024"),
        "memory.1024": f"{found['decoder', 1, 128]['bytes'] / 2**30:.2f}",
        "lengths.ours": f"{mib['gafext']:.0f} MiB",
        "lengths.standard": f"{mib['standard'] / 1024:.0f} GiB",
    }
    for dtype in ("bfloat16", "float16"):
        races = Races(f"ops-{RAPIDS}-{dtype}")
        known[f"attention.{dtype}"] = span(races.speedups("flash_attention", "sdpa", where="^(?!autoencoder)"))
    return known | built_in()


def filled(text: str, known: dict[str, str]) -> str:
    """Replace what stands between the markers of a page."""
    return MARKER.sub(lambda match: f"<!--={match[1]}-->{known[match[1]]}<!--/-->", text)


def main() -> int:
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        print("usage: python docs/fill.py [--check]", file=sys.stderr)
        return 2
    known = values()
    expected = {path: filled(path.read_text(), known) for path in PAGES} | {FIGURE: figure()}
    stale = [path for path, text in expected.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(path.relative_to(ROOT))
        if not arguments:
            path.write_text(expected[path])
    if stale and arguments:
        print("differ from the JSON behind them: run `python docs/fill.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
