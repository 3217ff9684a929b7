"""Which graphics cards a build is for, by the version of the CUDA compiler: CMake's own answer."""

import shutil
import subprocess

import pytest
from helpers import ROOT

CMAKE = shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")


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
    (tmp_path / "list.cmake").write_text(
        f'include("{ROOT}/csrc/cuda/architectures.cmake")\n'
        f'gafext_cuda_architectures(found "{version}")\nmessage("${{found}}")\n'
    )
    done = subprocess.run([CMAKE, "-P", "list.cmake"], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = done.stderr.strip().split(";")
    assert (found[0], found[-1]) == (first, last)
    assert {"75-real", "80-real", "86-real", "89-real"} <= set(found)
