"""What the scripts of benchmarks/ refuse before they measure anything."""

import importlib.util
import sys

import pytest
from helpers import script

pytest.importorskip("diffusers")  # not on every machine with a GPU


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--peers", "openvino"], "pip install openvino nncf"),
        (["--peers", "tensorrt"], "expected some of openvino,diffusers,compile, got tensorrt"),
        (["--peers", "diffusers", "--precisions", "float16"], "got float16"),
        (["--unet-rounds", "3"], "a median of fewer says little"),
    ],
)
def test_a_race_that_cannot_be_says_why(given, message, monkeypatch, capsys):
    full_size = script("full_size")
    monkeypatch.setattr(sys, "argv", ["full_size.py", *given])
    find_spec = importlib.util.find_spec
    missing = ("openvino", "nncf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(SystemExit):
        full_size.arguments()
    assert message in capsys.readouterr().err


COUNTS = {
    "bench_pipeline": "--steps",
    "drop_in": "--batch",
    "full_size": "--views",
    "precision": "--size",
    "presets": "--heads",
    "profile_pass": "--rounds",
    "train_step": "--rounds",
}


@pytest.mark.parametrize("count", ["0", "-1", "2.5", "two"])
@pytest.mark.parametrize("name", COUNTS)
def test_how_many_is_at_least_one(name, count, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", f"{COUNTS[name]}={count}"])
    with pytest.raises(SystemExit) as error:
        script(name).main()
    said = f"argument {COUNTS[name]}: expected a whole number of at least 1, got {count}"
    assert error.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench_pipeline", "full_size"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--device=tpu", "argument --device: expected a device of this machine, got tpu: not usable here"),
        ("--dtype=half", "argument --dtype: invalid choice: 'half'"),
    ],
)
def test_device_and_dtype_are_looked_at_first(name, given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", given])
    with pytest.raises(SystemExit) as error:
        script(name).main()
    assert error.value.code == 2 and message in capsys.readouterr().err
