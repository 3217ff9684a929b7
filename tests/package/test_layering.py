"""Who must never import whom, where names are compared, and what an import pulls in."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "gafext"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name, parsed."""
    return {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(module: str, tree: ast.AST | None = None) -> set[str]:
    """Every module that a module names in an import, at any depth; of the package's own names, modules alone."""
    found = set()
    for node in ast.walk(tree or modules()[module]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if name in modules() or name == "gafext._C"}
            found |= submodules
            if len(submodules) < len(names):
                found.add(node.module)
    return found


def executed(module: str) -> set[str]:
    """The package's modules that run when a module is imported: those named, and the packages they lie in.

    A package that the module itself lies in is running already.
    """
    found = set()
    for name in imports(module):
        parts = name.split(".")
        parents = {".".join(parts[:count]) for count in range(1, len(parts))}
        found |= {name} | {parent for parent in parents if not below(module, parent)}
    return (found & modules().keys()) - {module}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    @functools.cache
    def reached(start: str) -> frozenset[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        return frozenset(seen)

    return sorted({tuple(sorted(b for b in reached(a) if a in reached(b))) for a in edges if a in reached(a)})


def test_no_circle_of_imports():
    edges = {module: executed(module) for module in modules()}
    assert sum(map(len, edges.values())) > 200
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [("b", "c")]
    assert circles(edges) == []


def offenders(importers: list[str], forbidden: list[str]) -> list[str]:
    """Imports of `forbidden` by modules in `importers`, both packages or modules."""
    found = [module for module in modules() if any(below(module, importer) for importer in importers)]
    assert found
    return [
        f"{module} imports {name}"
        for module in found
        for name in sorted(imports(module))
        if any(below(name, other) for other in forbidden)
    ]


HEAVY = ["diffusers", "transformers", "huggingface_hub", "tests", "benchmarks", "pytest"]
LAZY = ["gafext.weights.hub", "gafext.checkpoints.prompts"]
# Imported lazily themselves.
ON_TOP_OF_THEM = [f"gafext.integrations.{name}" for name in ("diffusers", "dispatch", "transformers")]
NEVER = {
    "ops": (["ops"], ["models", "pipeline", "checkpoints", "schedulers", "upsampler", "families"]),
    "models": (["models"], ["pipeline", "checkpoints", "schedulers", "upsampler"]),
    "pure": (["schedulers", "guidance", "cameras", "noise"], ["models", "ops", "pipeline", "_C"]),
    "the autoencoder": (["models.vae"], ["models.unet"]),
    "families": (["families"], ["models", "pipeline", "checkpoints"]),
    "weights": (["weights", "config"], ["models", "pipeline", "checkpoints", "families"]),
    "integrations": (["integrations"], ["pipeline", "checkpoints", "families", "schedulers", "weights"]),
    "networks and kernels": (["models", "families", "checkpoints", "pipeline"], ["_C"]),
}


@pytest.mark.parametrize("layer", NEVER)
def test_layers(layer):
    importers, forbidden = ([f"gafext.{name}" for name in names] for names in NEVER[layer])
    assert not offenders(importers, forbidden)


def test_heavy_packages_are_imported_lazily_and_in_few_modules():
    assert not [line for line in offenders(["gafext"], HEAVY) if line.split()[0] not in LAZY + ON_TOP_OF_THEM]
    for module in LAZY:
        assert offenders([module], HEAVY)
        top = ast.Module([node for node in modules()[module].body if not isinstance(node, ast.FunctionDef)], [])
        assert not {name.split(".")[0] for name in imports(module, top)} & set(HEAVY)


def test_only_operations_call_pytorchs_attention():
    users = [name_of(p) for p in PACKAGE.rglob("*.py") if "scaled_dot_product_attention" in p.read_text()]
    assert "gafext.ops.flash_attention" in users
    assert not [name for name in users if not (below(name, "gafext.ops") or below(name, "gafext.bench"))]
    assert not [
        name
        for name in modules()
        if below(name, "gafext.models") and "torch.ops.gafext" in ast.unparse(modules()[name])
    ]


FAMILIES_AND_MODES = {
    *("dense", "position", "front", "row"),
    *("gaf", "imagedream", "mvdream", "facelift", "mv_adapter"),
}


def test_families_and_their_attentions_are_compared_in_few_places():
    """Elsewhere `family_of` and its methods decide."""
    found = set()
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                constants = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
            elif isinstance(node, ast.Match):
                constants = (part.value for part in ast.walk(node) if isinstance(part, ast.MatchValue))
            else:
                continue
            if any(str(constant.value).lower() in FAMILIES_AND_MODES for constant in constants):
                found.add(module)
    assert found
    allowed = ("gafext.families", "gafext.config", "gafext.models.blocks")
    assert not [module for module in found if not any(below(module, place) for place in allowed)]


def test_the_package_lies_at_the_top_and_has_few_modules_there():
    assert len(list(PACKAGE.glob("*.py"))) <= 15
    assert not (ROOT / "src").exists()


def test_cpu_and_cuda_sources_do_not_know_each_other():
    for folder, other in (("cpu", "cuda"), ("cuda", "cpu")):
        files = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()]
        assert files
        included = {path: re.findall(r'#include\s*["<]([^">]+)[">]', path.read_text()) for path in files}
        assert any(included.values())
        assert not [(path.name, name) for path, names in included.items() for name in names if other in name.split("/")]


def test_importing_pulls_in_no_heavy_package():
    heavy = ("diffusers", "transformers", "huggingface_hub")
    code = f"import sys, gafext; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_a_model_does_not_import_pytorchs_compiler():
    """So it would with initial values on the meta device, and take ten times as long."""
    load = "import sys, gafext; gafext.MultiViewDiffusionPipeline.from_pretrained()"
    code = f"{load}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
