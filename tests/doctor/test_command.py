"""`gafext doctor` on a machine that works, and on broken ones."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import gafext
from gafext import ops
from gafext.cli import main
from gafext.doctor.findings import examine, loading_problem
from gafext.doctor.text import screen, without_names
from gafext.versions import has_code_for, oldest_architecture


def examined(capsys, *arguments):
    """(exit code, findings)"""
    code = main(["doctor", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def started(folder, *flags, **environment):
    """`python -m gafext doctor` in a fresh process; (exit code, stdout)."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "GAFEXT_"))}
    command = [sys.executable, *flags, "-m", "gafext", "doctor"]
    done = subprocess.run(
        command, cwd=folder, env={**variables, **environment}, capture_output=True, text=True, timeout=180
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("GAFEXT_KEEP_MEMORY", "1")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("a run works here\n") and len(text.splitlines()) < 50
    top, report = text.split("for a bug report:\n")
    assert all(op in top for op in set(ops.__all__) - {"geglu_gate"})
    assert all(word in top for word in ("instruction set: ", "threads: ", "memory: the built-in model needs", "GB"))
    for word in ("gafext ", f"torch {torch.__version__}", "python ", "build: ", "GAFEXT_KEEP_MEMORY=1"):
        assert word in report


def test_an_apple_gpu_is_a_gpu():
    found = examine()
    found["devices"] = found["devices"][:1]
    assert "GPU: none that PyTorch can use" in screen(found)
    found["devices"].append({"device": "mps", "name": "Apple GPU", "operations": {}})
    assert "none that PyTorch can use" not in screen(found)


def test_advice_is_on_the_part_that_does_not_load(monkeypatch):
    def broken(module):
        if module == part:
            raise ImportError("libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4")

    monkeypatch.setattr("gafext.doctor.findings.importlib.import_module", broken)
    part = "torch"
    assert loading_problem().endswith("install PyTorch again, and look at LD_LIBRARY_PATH")
    part = "gafext.ops"
    assert loading_problem().endswith("then install gafext again")


def test_json(capsys):
    code, found = examined(capsys)
    assert code == 0 and found["works"] and not found["problems"]
    assert found["memory"]["needed"] > 0 and found["memory"]["views"] == 4
    assert found["devices"][0]["device"] == "cpu" and found["system"]["build"]["instruction_set"]
    assert found["verified_cards"] == json.loads((ROOT / "gafext/doctor/verified_cards.json").read_text())


def test_a_slower_instruction_set_has_its_reason(monkeypatch, capsys):
    _, found = examined(capsys)
    chosen = found["instruction_set"]
    assert chosen["uses"] not in chosen["why"]
    monkeypatch.setattr(gafext._C, "build_info", lambda: {**found["system"]["build"], "instruction_set": "portable"})
    monkeypatch.setattr("gafext.bench.environment.cpu", lambda: {"model": "", "cores": 1, "flags": ["avx2"]})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("GAFEXT_INSTRUCTION_SET", "portable")
    why = examined(capsys)[1]["instruction_set"]["why"]
    assert why["avx2"] == "GAFEXT_INSTRUCTION_SET=portable" and why["avx512"] == "this processor has no avx512f"


def test_a_model_that_is_refused(capsys, tmp_path):
    code, found = examined(capsys, "--model", tmp_path)
    assert code == 1 and not found["works"]
    assert found["problems"][0].startswith("the model is refused: ")


def test_a_checkpoint_and_too_little_memory(checkpoint, capsys, monkeypatch):
    code, found = examined(capsys, "--model", checkpoint)
    assert code == 0 and found["memory"]["model"] == str(checkpoint)
    monkeypatch.setattr("gafext.checkpoints.estimate.free_bytes", lambda device: found["memory"]["needed"] / 2)
    code, found = examined(capsys, "--model", checkpoint)
    assert code == 1 and "memory: a run needs about" in found["problems"][0]


def test_a_kernel_that_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(ops, "geglu", lambda x, *_, backend="auto": x * (backend == "reference"))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("a run does not work here\n  broken: geglu fails on cpu: its result is off")
    assert "broken: geglu" in text.split("for a bug report:")[1]


def test_a_torch_that_is_too_old(monkeypatch, capsys):
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.10.0" if name == "torch" else version(name))
    code, found = examined(capsys)
    assert code == 1 and found["problems"][0].startswith("torch 2.10.0: ") and "pip install -U" in found["problems"][0]


@pytest.fixture
def volta(monkeypatch):
    """A GPU of compute capability 7.0, which PyTorch only says that it has."""
    card = SimpleNamespace(name="Tesla V100", major=7, minor=0)
    for name, answer in (("is_available", True), ("device_count", 1), ("get_device_properties", card)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)

    def built(*architectures):
        build = {**info, "cuda": True, "cuda_compiler": "nvcc 13.0.88", "cuda_architectures": list(architectures)}
        monkeypatch.setattr(gafext._C, "build_info", lambda: build)

    info = gafext._C.build_info()
    return built


def test_a_card_below_the_compiled_architectures(volta, capsys):
    volta("75-real", "80-real")
    code, found = examined(capsys)
    [note] = [note for note in found["notes"] if "7.0" in note]
    assert "this build (nvcc 13.0.88) has kernels for 7.5 and later" in note and "CUDA 12" in note
    assert "never verified on a card of compute capability 7.0" in found["devices"][1]["verified"]
    text = screen(found)
    assert "cuda:0 (Tesla V100): the CUDA kernels were never verified" in text
    assert code == 1 and any("cuda" in problem.lower() for problem in found["problems"])  # nothing runs on it here


def test_a_build_for_other_cards(volta, capsys, monkeypatch):
    volta("90")
    ada = SimpleNamespace(name="L4", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: ada)
    [note] = [note for note in examined(capsys)[1]["notes"] if "8.9" in note]
    assert "has kernels for 9.0 and later" in note and "A build on this machine has kernels for 8.9" in note


def test_a_build_with_neither_machine_code_nor_ptx_for_the_card(volta, capsys, monkeypatch):
    thor = SimpleNamespace(name="Thor", major=11, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: thor)
    volta("75-real", "90-real", "120")
    [note] = [note for note in examined(capsys)[1]["notes"] if "11.0" in note]
    assert "this build (75-real 90-real 120) has neither machine code nor PTX" in note
    for built in (["75-real", "90"], ["native"], ["all-major"]):
        volta(*built)
        assert not [note for note in examined(capsys)[1]["notes"] if "11.0" in note]


@pytest.mark.parametrize(
    "architectures, runs, does_not",
    [
        (["75-real", "80-real", "90"], [75, 80, 86, 89, 90, 100, 120], [70, 72]),
        (["80-real", "120"], [80, 87, 120, 121], [75, 90, 100, 110]),
        (["80-virtual"], [80, 86, 90], [75]),
        (["90a"], [90], [80, 100]),
        (["native"], [70, 120], []),
        ([], [], [70, 120]),
    ],
)
def test_which_cards_run_what_was_compiled(architectures, runs, does_not):
    assert [capability for capability in runs + does_not if has_code_for(architectures, capability)] == runs
    assert oldest_architecture(architectures) == (runs[0] if architectures != ["native"] and runs else 0)


def test_a_build_for_the_card_needs_no_excuse(volta, capsys):
    volta("70-real", "75-real")
    assert not [note for note in examined(capsys)[1]["notes"] if "7.0" in note]


def test_no_home_and_no_user(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("GAFEXT_TORCH_DIR", "/home/ada/venv/torch")
    monkeypatch.setenv("PYTORCH_KERNEL_CACHE_PATH", "/scratch/ada/kernels")
    main(["doctor", "--model", "/home/ada/checkpoint"])
    text = capsys.readouterr().out
    assert "~/venv/torch" in text and "~/checkpoint" in text and "ada" not in text
    assert without_names("/home/adam/x") == "/home/adam/x"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("_C.*.so", "__pycache__", "model")
    shutil.copytree(ROOT / "gafext", folder / "gafext", ignore=ignored)
    return folder


def test_without_torch(copy):
    code, text = started(copy, "-S")  # no site-packages
    assert code == 1 and "PyTorch does not load: No module named 'torch'" in text
    assert "install the missing package" in text and "torch not installed" in text


def test_an_extension_that_is_not_built(copy, tmp_path):
    for path in Path(torch.__file__).parents[1].iterdir():
        if "gafext" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    code, text = started(copy, "-S", PYTHONPATH=str(tmp_path))
    assert code == 1 and "gafext's extension does not load: cannot import name '_C'" in text
    assert "`pip install .`" in text and f"torch {torch.__version__}" in text


def test_a_damaged_extension(copy):
    damaged = copy / "gafext" / f"_C{EXTENSION_SUFFIXES[0]}"
    damaged.write_bytes(b"\x7fELF")
    try:
        code, text = started(copy)
    finally:
        damaged.unlink()
    assert code == 1 and text.startswith("a run does not work here\n  broken: gafext's extension does not load: ")
    assert "install gafext's extension again" in text and "for a bug report:" in text


def test_an_instruction_set_that_is_not_there():
    code, text = started(ROOT, GAFEXT_INSTRUCTION_SET="sse9", PYTHONPATH=str(ROOT))
    assert code == 1 and "GAFEXT_INSTRUCTION_SET=sse9: must be portable" in text
    assert "unset GAFEXT_INSTRUCTION_SET" in text


def test_a_reader_that_stops_early(copy):
    command = f"{sys.executable} -S -m gafext doctor | head -n 0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=copy, capture_output=True, text=True, timeout=60, env={})
    assert done.returncode in (0, 1) and done.stderr == ""


def test_other_commands_still_raise(copy):
    """The doctor alone goes on without the extension."""
    command = [sys.executable, "-S", "-m", "gafext", "info"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=60, env={})
    assert done.returncode == 1 and "ImportError" in done.stderr and "pip install" in done.stderr
