"""Everything that `gafext doctor` finds out, as a JSON object."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from gafext.doctor.cards import verification, verified_cards
from gafext.doctor.known import known_problems
from gafext.versions import has_code_for, oldest_architecture

_PACKAGES = ("gafext", "torch", "numpy", "Pillow", "safetensors", "diffusers", "transformers")
_PARTS = {"torch": "PyTorch", "gafext.ops": "gafext's extension", "gafext.cli": "gafext"}
_ADVICE = {
    "GAFEXT_INSTRUCTION_SET": "unset GAFEXT_INSTRUCTION_SET, or name a set that this machine has",
    "cannot import name '_C'": "it is not built for this Python: `pip install .` in the clone (CONTRIBUTING.md)",
    "is not built": "build it with the command named",
    "GLIBC": "this build needs a newer system: build it here, `pip install --no-binary gafext gafext`",
    "undefined symbol": "it was built for another torch: `pip install -U 'torch>=2.11'`, then install gafext again",
    "No module named": "install the missing package, or `pip install gafext` with its dependencies",
}
# What the advice of the same words would be wrong about where it is PyTorch itself that does not load.
_ADVICE_ON_TORCH = {
    "GLIBC": "this PyTorch needs a newer system: install an older one",
    "undefined symbol": "its libraries do not go together: install PyTorch again, and look at LD_LIBRARY_PATH",
}
_NEEDS = {"avx2": "avx2", "avx512": "avx512f", "amx": "amx_bf16"}


def examine(model: str | None = None) -> dict[str, Any]:
    """Find out what a run would use on this machine, and what is broken.

    Args:
        model: checkpoint folder or hub id whose need of memory is estimated; None: the built-in model.

    Returns:
        `works`; `problems`, what keeps a run from working and what to do; `notes`; `system`: what a bug report needs;
        `verified_cards`; and where the extension loads `instruction_set`, `threads`, `memory` and `devices`.
    """
    problems, notes = [], []
    found: dict[str, Any] = {"works": True, "problems": problems, "notes": notes, "system": _system()}
    for breaks, reason in known_problems(found["system"]["versions"]):
        (problems if breaks else notes).append(reason)
    found["verified_cards"] = verified_cards()
    problem = loading_problem()
    if problem is None:
        _examine_loaded(found, model)
    else:
        problems.append(problem)
    found["works"] = not problems
    return found


def loading_problem() -> str | None:
    """Say what cannot be imported, why, and what to do; None if all can."""
    for module, part in _PARTS.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a library raises while it is loaded
            reason = str(error).strip() or type(error).__name__
            known = _ADVICE | _ADVICE_ON_TORCH if module == "torch" else _ADVICE
            advice = next((advice for words, advice in known.items() if words in reason), f"install {part} again")
            return f"{part} does not load: {reason}: {advice}"
    return None


def _system() -> dict[str, Any]:
    """Describe the machine without importing torch, which may be broken."""
    names = (n for n in sorted(os.environ) if n.startswith(("GAFEXT_", "OMP_", "KMP_", "CUDA_VISIBLE", "PYTORCH_")))
    return {
        "versions": {**{name: _version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "environment": {name: os.environ[name] for name in names},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _examine_loaded(found: dict[str, Any], model: str | None) -> None:
    import torch

    from gafext import _C
    from gafext.bench.environment import cpu

    build, processor, notes = _C.build_info(), cpu(), found["notes"]
    found["system"] |= {"cpu": processor, "build": build, "cuda": torch.version.cuda}
    found["instruction_set"] = {"uses": build["instruction_set"], "why": _slower_sets(build, processor["flags"])}
    found["threads"] = {"uses": torch.get_num_threads(), "cores": os.cpu_count()}
    if not build["openmp"]:
        notes.append("the build has no OpenMP: the CPU kernels run on one thread")
    found["devices"] = [{"device": "cpu", "name": processor["model"]}, *_gpus(found)]
    _examine_operations(found)
    _examine_memory(found, model)


def _slower_sets(build: dict[str, Any], flags: list[str]) -> dict[str, str]:
    """Return why each faster instruction set is not in use."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}
    sets, wanted = list(_NEEDS), os.environ.get("GAFEXT_INSTRUCTION_SET")
    reasons = {}
    for name in sets[sets.index(build["instruction_set"]) + 1 if build["instruction_set"] in sets else 0 :]:
        if name not in build["instruction_sets"]:
            reasons[name] = "the compiler of this build has none of it"
        elif _NEEDS[name] not in flags:
            reasons[name] = f"this processor has no {_NEEDS[name]}"
        else:
            reasons[name] = f"GAFEXT_INSTRUCTION_SET={wanted}" if wanted else "the operating system does not permit it"
    return reasons


def _gpus(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Describe the accelerators that PyTorch can use; notes say why there is none where one could be."""
    import torch

    notes, build = found["notes"], found["system"]["build"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # of a driver that is too old
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    notes += [str(warning.message).splitlines()[0] for warning in caught]
    if not count and Path("/proc/driver/nvidia/version").is_file():
        kind = f"is for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
        notes.append(f"there is an NVIDIA driver, but PyTorch finds no GPU: torch {torch.__version__} {kind}")
    gpus = []
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        known = verification(gpu.name, capability, found["verified_cards"])
        gpus.append({"device": f"cuda:{index}", "name": gpu.name, "capability": capability, "verified": known})
        architectures, number = build["cuda_architectures"], 10 * gpu.major + gpu.minor
        oldest = oldest_architecture(architectures)
        if number >= oldest and build["cuda"] and not has_code_for(architectures, number):
            names = " ".join(architectures)
            notes.append(
                f"cuda:{index} has compute capability {capability}, for which this build ({names}) has neither machine "
                "code nor PTX: PyTorch's operations run. A build on this machine has its own kernels"
            )
        if number < oldest:
            again = "on this machine" if (gpu.major, gpu.minor) >= (7, 5) else "with CUDA 12"
            advice = f". A build {again} has kernels for {capability}" if gpu.major >= 7 else ""
            notes.append(
                f"cuda:{index} has compute capability {capability}, and this build ({build['cuda_compiler']}) has "
                f"kernels for {oldest / 10} and later: PyTorch's operations run{advice}"
            )
    return gpus + ([{"device": "mps", "name": "Apple GPU"}] if torch.backends.mps.is_available() else [])


def _examine_operations(found: dict[str, Any]) -> None:
    import torch

    from gafext.doctor.operations import SIZES, choices, failures, slow_int8

    found["sizes"] = SIZES
    for entry in found["devices"]:
        device = torch.device(entry["device"])
        try:
            entry["operations"] = choices(device)
            failed = failures(device)
        except (RuntimeError, AssertionError) as error:  # of the driver, or of a torch without it
            failed = {"every operation": str(error).splitlines()[0]}
        found["problems"] += [f"{op} fails on {device}: {reason}" for op, reason in failed.items()]
    found["notes"] += slow_int8()


def _examine_memory(found: dict[str, Any], model: str | None) -> None:
    """Compare the need of a run with default options and what is free."""
    import torch

    from gafext.checkpoints.estimate import free_bytes
    from gafext.checkpoints.memory import CERTAIN, default_device
    from gafext.conditions import latent_size, resolve_cameras
    from gafext.families import family_of
    from gafext.guidance import needs_unconditional
    from gafext.pipeline import MultiViewDiffusionPipeline

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run warns of the same
            pipe = MultiViewDiffusionPipeline.from_pretrained(model, device=torch.device("meta"))
    except (ValueError, OSError) as error:
        found["problems"].append(f"the model is refused: {error}")
        return
    device, family = default_device(), family_of(pipe.unet.config)
    try:
        free = free_bytes(device)
    except (RuntimeError, AssertionError) as error:  # as above
        found["problems"].append(f"memory of {device}: {str(error).splitlines()[0]}")
        return
    views = len(resolve_cameras(None, None, family))
    needed = pipe.estimate_bytes(
        portraits=1,
        views=views,
        passes=1 + needs_unconditional(pipe.guidance_scale),
        size=latent_size(None, rows=views, channels=pipe.vae.config.latent_channels, config=pipe.unet.config),
        doubled=pipe.upsampler is not None or family.doubles_latents,
    )
    found["memory"] = {"model": model, "views": views, "device": str(device), "needed": needed, "free": free}
    if free is not None and needed >= CERTAIN * free:
        found["problems"].append(
            f"memory: a run needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free on {device}: docs/memory.md"
        )
