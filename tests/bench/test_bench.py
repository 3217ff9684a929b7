"""`gafext bench`: what it writes follows from what it measured, and its contestants do the same work."""

import argparse
import json
import platform
import shlex
import statistics
import sys
import types
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import doubling

from gafext import ops
from gafext.bench import command
from gafext.bench.cases import Case, Contestant, cases, cross_view_attention
from gafext.bench.measure import Race, race
from gafext.bench.report import rows, summary
from gafext.cli import main

QUICK = ["bench", "--quick", "--no-compile"]


def measured(tmp_path, *arguments) -> dict:
    path = tmp_path / "bench.json"
    assert main([*QUICK, *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def quick_race(case: Case, *, cold_bytes: int = 0):
    return race(case, "cpu", cold_bytes=cold_bytes, rounds=3, turn_seconds=0)


def test_the_json_follows_from_its_times(tmp_path, capsys):
    shapes = {
        "flash_attention": "4,20,64x64,64",
        "cross_view_attention": "V=4,(64,1280)",
        "geglu": "256x1280",
        "geglu_gate": "256,10240->5120",
        "geglu_int8": "256x1280",
        "conv3x3": "8,1280->1280,4x4",
        "conv3x3_int8": "8,1280->1280,4x4",
        "linear": "128,1280->1280",
        "linear_int8": "128,1280->1280",
    }
    written = measured(tmp_path, *(word for shape in shapes.values() for word in ("--shape", shape)))
    assert {race["op"]: race["shape"] for race in written["races"]} == shapes
    table = capsys.readouterr().out
    for result in written["races"]:
        ceilings, contestants = result["ceilings"], {row["name"]: row for row in result["contestants"]}
        ours = contestants[result["ours"]]
        assert ours["speedup"] == 1 and len(contestants) >= 2 and not result["skipped"]
        for name, row in contestants.items():
            times = row["times_ms"]
            assert len(times) == 3 and min(times) > 0
            assert row["median_ms"] == statistics.median(times)
            assert row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
            over_ours = statistics.median(t / o for t, o in zip(times, ours["times_ms"], strict=True))
            of_copy = statistics.median(c / t for c, t in zip(ceilings["copy_times_ms"], times, strict=True))
            of_gemm = statistics.median(g / t for g, t in zip(ceilings["gemm_times_ms"], times, strict=True))
            assert row["speedup"] == pytest.approx(over_ours, rel=1e-3)
            assert row["of_copy"] == pytest.approx(of_copy, rel=1e-3)
            assert row["of_gemm"] == pytest.approx(of_gemm * result["flops"] / ceilings["gemm_flops"], rel=1e-3)
            assert row["gflops"] == pytest.approx(1e-6 * result["flops"] / row["median_ms"], rel=1e-3)
            assert row["gbps"] == pytest.approx(1e-6 * result["bytes"] / row["median_ms"], rel=1e-3)
            assert f"  {name:22}{row['median_ms']:10.3f}" in table


def test_memory_over_the_length_of_the_sequence(tmp_path, capsys):
    """Of flash attention it doubles with the length, of standard attention it quadruples.

    Standard attention has two or three matrices of scores at once, as malloc happens to give them back.
    """
    written = measured(tmp_path, "--suite", "lengths", "--shape", "1024x1024", "--shape", "4096x4096")
    if "peak_mib" not in written["races"][0]["contestants"][0]:
        pytest.skip("this system does not say how much memory a process has had")
    short, long = ({row["name"]: row["peak_mib"] for row in race["contestants"]} for race in written["races"])
    assert list(long) == ["gafext", "standard", "sdpa"]
    scores = 4096**2 * 4 / 2**20
    assert scores < long["standard"] < 4 * scores and long["standard"] > 3**2 * short["standard"]
    assert long["gafext"] < scores / 4
    assert f"{long['standard']:.1f} MiB" in capsys.readouterr().out


def test_the_lengths_are_those_promised():
    shapes = [case.shape for case in cases("cpu", torch.float32, compiled=False, suite="lengths")]
    assert shapes[0] == "1,1,64x64,64" and shapes[-1] == "1,1,16384x16384,64" and len(shapes) == 9


def test_a_step_of_every_sampler_is_that_of_diffusers(tmp_path):
    races = measured(tmp_path, "--suite", "samplers")["races"]  # fails if one differs
    assert {(race["op"], race["shape"].split(",")[0]) for race in races} == {
        (f"{name} step", f"V={views}") for name in ("ddim", "dpm++", "euler") for views in (4, 32)
    }
    assert all([row["name"] for row in race["contestants"]] == ["gafext", "diffusers"] for race in races)
    for case in cases("cpu", torch.float32, compiled=False, suite="samplers"):
        step, inputs = case.contestants[0].run, case.inputs()
        first = step(*inputs)
        assert torch.equal(step(*inputs), first)  # from the same state
        other = step(*inputs[:2], -inputs[2])  # the step before is taken once, at the first call
        assert torch.equal(other, first)


def test_flops_and_bytes(tmp_path):
    shapes = ("4,20,64x77", "256x1280", "256,10240", "8,1280->1280,4x4")
    races = measured(tmp_path, *(word for shape in shapes for word in ("--shape", shape)))["races"]
    races = {race["op"]: race for race in races}
    conv, attention, geglu, gate = (races[op] for op in ("conv3x3", "flash_attention", "geglu", "geglu_gate"))
    assert gate["bytes"] == 4 * 256 * (10240 + 5120)
    assert conv["flops"] == 2 * 8 * 4 * 4 * 1280 * 1280 * 9
    assert conv["bytes"] == 4 * (2 * 8 * 4 * 4 * 1280 + 1280 * 1280 * 9 + 1280)
    assert attention["flops"] == 2 * 2 * (4 * 20) * 64 * 77 * 64
    assert attention["bytes"] == 4 * (4 * 20) * (64 + 77 + 77 + 64) * 64
    assert geglu["flops"] == 2 * 256 * 1280 * (2 * 5120)
    assert geglu["bytes"] == 4 * (256 * 1280 + 10240 * 1280 + 10240 + 256 * 5120)


def test_the_forms_of_attention_across_views_agree_for_two_portraits():
    measured = quick_race(cross_view_attention.case(3, 16, 2, "", 2, compiled=False))  # raises if one differs
    assert {"gafext", "sdpa", "elementwise", "matmul"} <= set(measured.times) and not measured.skipped


def test_the_environment_and_the_command(tmp_path):
    environment = measured(tmp_path, "--shape", "V=4,(64", "--threads", "1")["environment"]
    assert environment["threads"] == 1 and environment["dtype"] == "float32" and environment["rounds"] == 3
    assert torch.__version__.startswith(environment["versions"]["torch"])  # wheels with CUDA say "+cu130" here alone
    assert environment["build"]["instruction_set"] in environment["build"]["instruction_sets"]
    assert environment["cpu"]["model"] and environment["gpu"] is None
    program, *arguments = shlex.split(environment["command"])
    assert program == "gafext"
    (tmp_path / "bench.json").unlink()
    assert main(arguments) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["environment"]["command"] == environment["command"]


def test_torch_compile_takes_part(tmp_path):
    path = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--shape", "V=4,(64,1280)", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["races"]
    assert {"sdpa compiled", "elementwise compiled"} <= {row["name"] for row in result["contestants"]}


def test_patience_takes_the_least_disturbed(monkeypatch, tmp_path):
    shares = [0.5, 0.2, 0.3, 0.01, 0.0]
    monkeypatch.setattr("gafext.bench.measure.watch_others", lambda: lambda: shares.pop(0))
    (result,) = measured(tmp_path, "--shape", "V=4,(64", "--patience", "100")["races"]
    assert result["others_busy"] == 0.01 and shares == [0.0]
    shares[:] = [0.5, 0.2]
    (result,) = measured(tmp_path, "--shape", "V=4,(64")["races"]
    assert result["others_busy"] == 0.5 and shares == [0.2]


def test_a_repeated_race_keeps_the_time_of_the_first_compilation(monkeypatch):
    races = [
        Race(None, 0, 0, first_seconds={"sdpa": seconds}, others=share) for seconds, share in ((9.0, 0.5), (0.1, 0))
    ]
    monkeypatch.setattr(command, "race", lambda *_, **__: races.pop(0))
    args = argparse.Namespace(patience=100, quick=True, device="cpu", rounds=None)
    chosen = command._least_disturbed(args, None, 0)
    assert chosen.others == 0 and chosen.first_seconds == {"sdpa": 9.0}


def test_8_bit_layers_read_only_what_they_compute_with():
    for case in cases("cpu", torch.float32, compiled=False):
        if case.op in ("linear_int8", "geglu_int8", "conv3x3_int8"):
            assert [x.dtype for x in case.inputs()] == [torch.float32, torch.int8, torch.float32, torch.float32]


def test_half_precision_agrees(tmp_path):
    shapes = ("4,20,64x64", "V=4,(64", "256x1280", "256,10240", "128,1280->1280", "8,1280->1280,4x4")
    options = [option for shape in shapes for option in ("--shape", shape)]
    assert len(measured(tmp_path, "--dtype", "bfloat16", *options)["races"]) == len(shapes)


@pytest.mark.parametrize("shape", ["128,1280->1280", "8,1280->1280,4x4", "128,1280"])
def test_inputs_have_the_dtype_of_the_race(shape):
    found = [case for case in cases("cpu", torch.bfloat16, compiled=False) if case.shape.startswith(shape)]
    assert found and all(tensor.dtype == torch.bfloat16 for case in found for tensor in case.inputs())


@pytest.mark.parametrize("device, count", [("cpu", 77), ("cuda", 83)])
def test_every_shape_once(device, count):
    listed = list(cases(device, torch.float32, compiled=False))
    assert len({(case.op, case.shape) for case in listed}) == len(listed) == count
    assert all(case.contestants[0].name == case.ours for case in listed)
    assert not [c.name for case in listed for c in case.contestants if c.compiled]


def test_a_convolution_races_only_where_there_is_a_kernel():
    assert "conv3x3" not in {case.op for case in cases("cuda", torch.float32, compiled=False)}
    for dtype in (torch.float32, torch.bfloat16):
        assert "conv3x3" in {case.op for case in cases("cpu", dtype, compiled=False)}


def test_a_wrong_result_is_no_opponent():
    with pytest.raises(RuntimeError, match=r"doubling 16: sloppy differs from gafext by 0\.01"):
        quick_race(doubling(Contestant("sloppy", lambda x: 2.01 * x)))
    with pytest.raises(RuntimeError, match="sloppy differs"):
        quick_race(doubling(Contestant("sloppy", lambda x: 2 * x * float("nan"), optional=True)))
    with pytest.raises(RuntimeError, match="sloppy differs"):
        quick_race(doubling(Contestant("sloppy", lambda x: 2 * x[:8])))


def test_what_cannot_run_is_left_out_with_its_reason():
    def absent(x):
        raise RuntimeError("no such backend\nand a long story")

    result = quick_race(doubling(Contestant("absent", absent, optional=True)))
    assert result.skipped == {"absent": "no such backend"} and set(result.times) == {"gafext", "gemm", "copy"}
    assert any("absent" in line and "no such backend" in line for line in rows(summary(result, mode="", allocator="")))
    with pytest.raises(RuntimeError, match="no such backend"):
        quick_race(doubling(Contestant("absent", absent)))


def test_a_loss_is_shown_as_one():
    result = quick_race(doubling(Contestant("faster", lambda x: 2 * x)))
    result.times = {**result.times, "gafext": [0.4, 0.4, 0.4], "faster": [0.1, 0.2, 0.3]}
    lines = rows(summary(result, mode="warm", allocator="default"))
    assert " 0.50x " in next(line for line in lines if "faster" in line)
    packed = replace(result.case, ours="faster")
    lines = rows(summary(replace(result, case=packed), mode="warm", allocator="default"))
    assert " 2.00x " in next(line for line in lines if "gafext" in line)


@pytest.mark.parametrize(("cold_bytes", "sets", "expected"), [(0, 1, 5 + 2 * 3), (1000, 17, 5 + 3)])
def test_cold_inputs_rotate(cold_bytes, sets, expected):
    seen = []
    spy = Contestant("spy", lambda x: seen.append(x.data_ptr()) or 2 * x)
    quick_race(doubling(spy), cold_bytes=cold_bytes)
    calls = seen[1:]  # the first one was for its result
    assert len(calls) == expected and len(set(calls)) == min(sets, expected)  # 5 to calibrate; warm calls before turns
    prepared = []
    quick_race(
        doubling(Contestant("spy", lambda x: 2 * x, prepare=lambda x: (prepared.append(x) or x,))), cold_bytes=64
    )
    assert len(prepared) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_both_allocators(tmp_path, capsys, monkeypatch):
    """The setting itself is not made here, as there is no way back; tests/ops/test_memory.py counts its page faults."""
    happened, race = [], command.race
    monkeypatch.setattr(command._C, "keep_freed_memory", lambda: happened.append("keep"))
    monkeypatch.setattr(command, "race", lambda *args, **options: happened.append("race") or race(*args, **options))
    results = measured(tmp_path, "--op", "geglu_gate", "--shape", "1024,", "--cold", "--allocator", "both")
    assert [(race["allocator"], race["mode"]) for race in results["races"]] == [
        (allocator, mode) for allocator in ("default", "keep") for mode in ("warm", "cold")
    ]
    assert happened == ["race", "race", "keep", "race", "race"]
    assert "malloc keeps big blocks" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys):
    for words, message in (
        (["--shape", "9,9"], "no shape contains 9,9"),
        (["--rounds", "6"], "--rounds: expected at least 7"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--json", str(tmp_path / "no" / "file.json")], "there is no such folder"),
        (["--device", "cuda", "--allocator", "keep"], "--device cuda|the CPU's allocator"),
    ):
        assert main([*QUICK, *words]) == 1
        text = capsys.readouterr().err
        assert text.startswith("gafext: error: ") and text.count("\n") == 1
        assert any(part in text for part in message.split("|"))


def test_what_is_over_the_time_is_left_out_and_named(tmp_path, capsys):
    written = measured(tmp_path, "--shape", "V=4,(64", "--seconds", "0")
    assert written["races"] == [] and written["left_out"] == ["cross_view_attention V=4,(64,1280)"]
    assert "left out, as 0 s were up: 1 shapes" in capsys.readouterr().out
    path = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--shape", "V=4,(64", "--compile-seconds", "-1", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["races"]
    assert result["skipped"]["elementwise compiled"] == "the time for compiling is up"


def test_one_failure_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    wrong = doubling(Contestant("sloppy", lambda x: 3 * x))
    right = replace(doubling(Contestant("other", lambda x: 2 * x)), shape="17")
    monkeypatch.setattr("gafext.bench.command.cases", lambda *_, **__: iter([wrong, right]))
    path = tmp_path / "bench.json"
    assert main([*QUICK, "--json", str(path)]) == 1
    written = json.loads(path.read_text())
    assert [race["shape"] for race in written["races"]] == ["17"]
    assert written["failed"] == {"doubling 16": "doubling 16: sloppy differs from gafext by 1"}
    assert "sloppy differs" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu(tmp_path, dtype):
    shapes = ("--shape", "4,20,64x77", "--shape", "V=4,(64", "--shape", "256x1280", "--cold")
    written = measured(tmp_path, "--device", "cuda", "--dtype", dtype, *shapes)
    assert not written["failed"] and len(written["races"]) == 6 and written["environment"]["gpu"]["name"]
    assert written["environment"]["ceilings"]["copy_gbps"] > 0
    attention = written["races"][0]
    named = {row["name"] for row in attention["contestants"]} | set(attention["skipped"])
    assert {"sdpa cudnn", "sdpa flash", "sdpa efficient", "sdpa math"} <= named
    assert all(row["kernels"] for race in written["races"] for row in race["contestants"])


def test_the_order_of_turns_changes():
    turns = []
    names = ("second", "third", "fourth")
    spies = [Contestant(name, lambda x, name=name: turns.append(name) or 2 * x) for name in names]
    quick_race(doubling(*spies), cold_bytes=1000)
    raced = turns[-9:]
    assert {tuple(raced[i : i + 3]) for i in (0, 3, 6)} != {names} and Counter(raced) == dict.fromkeys(names, 3)


def test_an_operation_without_a_file_of_cases_races_its_formula(monkeypatch):
    def scale_add(x, y, scale):
        return torch.add(y, x, alpha=scale)

    module = types.ModuleType("scale_add")
    module.reference_scale_add = lambda x, y, scale: scale * x + y
    module.example_scale_add = lambda device, dtype: (*torch.randn(2, 3, 5, device=device, dtype=dtype), 0.5)
    scale_add.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ops, "scale_add", scale_add, raising=False)
    monkeypatch.setattr(ops, "__all__", ["scale_add"])
    (case,) = cases("cpu", torch.float32, compiled=False)
    assert (case.op, case.shape) == ("scale_add", "3x5,3x5")
    x, y = case.inputs()
    for contestant in case.contestants:
        torch.testing.assert_close(contestant.run(x, y), 0.5 * x + y)
