"""Who must never import whom, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import gafext

ROOT = Path(gafext.__file__).parent
HEAVY = ("diffusers", "transformers", "huggingface_hub", "tests", "benchmarks", "pytest")


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def offenders(paths, forbidden) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imports(path)
        if any(name == word or name.startswith(word + ".") for word in forbidden)
    ]


def test_layers():
    models = sorted((ROOT / "models").glob("*.py"))
    assert len(models) >= 6
    assert not offenders((ROOT / "ops").glob("*.py"), ["gafext.models", "gafext.pipeline", "gafext.attention"])
    assert not offenders(
        models, ["gafext._C", "gafext.ops", "gafext.pipeline", "gafext.schedulers", "gafext.schedulers"]
    )
    assert not any("torch.ops" in path.read_text() for path in models)
    pure = [ROOT / name for name in ("scheduler.py", "guidance.py", "cameras.py", "noise.py")]
    pure += sorted((ROOT / "schedulers").glob("*.py"))
    assert not offenders(pure, ["gafext.models", "gafext.ops", "gafext.pipeline"])
    assert not offenders([ROOT / "models" / "vae.py"], ["gafext.models.unet"])


def test_no_heavy_import_at_the_top():
    lazy = {ROOT / "hub.py", ROOT / "prompts.py"}  # inside a function, each in a file of its own
    assert not offenders([path for path in ROOT.rglob("*.py") if path not in lazy], HEAVY)
    assert all(offenders([path], HEAVY) for path in lazy)


def test_only_attention_picks_backends():
    users = [p for p in ROOT.rglob("*.py") if "scaled_dot_product_attention" in p.read_text()]
    assert {str(p.relative_to(ROOT)).replace("\\", "/") for p in users} <= {
        "attention.py",
        "ops/flash_attention.py",
        "ops/cross_view_attention.py",
        "bench/cases.py",  # the opponent
    }


def test_cpu_and_cuda_sources_do_not_know_each_other():
    sources = Path(__file__).parent.parent / "csrc"
    for folder, other in (("cpu", "cuda/"), ("cuda", "cpu/")):
        files = [path for path in (sources / folder).iterdir() if path.is_file()]
        assert files
        assert not [
            path for path in files if f'#include "{other}' in path.read_text() or f"../{other}" in path.read_text()
        ]


def test_importing_is_quick_and_pulls_nothing_in():
    code = (
        "import sys, time, torch, numpy, PIL.Image, safetensors.torch, tqdm.auto\n"
        "start = time.perf_counter()\n"
        "import gafext\n"
        "print(time.perf_counter() - start)\n"
        "print([m for m in ('diffusers', 'transformers', 'huggingface_hub') if m in sys.modules])\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds = min(float(run.stdout.splitlines()[0]) for run in runs)
    assert runs[0].stdout.splitlines()[1] == "[]"
    assert seconds < 0.3
