"""Which graphics cards a build is for, by the version of the CUDA compiler: CMake's own answer."""

import os
import shutil
import subprocess

import pytest
from helpers import ROOT

CMAKE = shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")


def answer(folder, call, **environment):
    script = f'include("{ROOT}/csrc/cuda/architectures.cmake")\n{call}\nmessage("${{found}}")\n'
    (folder / "list.cmake").write_text(script)
    command, environment = [CMAKE, "-P", "list.cmake"], os.environ | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stderr.strip().split(";")


@pytest.mark.parametrize(
    "version, first, last",
    [
        ("11.8.89", "70-real", "90"),
        ("12.4.131", "70-real", "90"),
        ("12.9.86", "70-real", "120"),
        ("13.0.88", "75-real", "120"),
    ],
)
def test_the_architectures(version, first, last, tmp_path):
    found = answer(tmp_path, f'gafext_cuda_architectures(found "{version}")')
    assert (found[0], found[-1]) == (first, last)
    assert {"75-real", "80-real", "86-real", "89-real"} <= set(found)


@pytest.mark.parametrize(
    "cards, expected",
    [
        ("9.0\n9.0\n", ["90"]),
        ("7.5\n8.7\n", ["75", "86"]),  # the newest that runs on 8.7
        ("12.1\n", ["120"]),
        ("7.0\n", ["75-real", "86-real", "90-real", "120"]),  # no kernel would run: as where there is no card
        ("Failed to initialize NVML: Driver/library version mismatch\n", ["75-real", "86-real", "90-real", "120"]),
    ],
)
def test_the_architectures_of_this_machines_cards(cards, expected, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{cards}'\n")
    program.chmod(0o755)
    call = 'gafext_cuda_architectures_here(found "75-real;86-real;90-real;120")'
    assert answer(tmp_path, call, PATH=f"{tmp_path}:{os.environ['PATH']}") == expected
