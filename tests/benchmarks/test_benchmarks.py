"""The scripts of benchmarks/ on made results and small networks; what needs a GPU runs over stand-ins."""

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, script

from gafext import MultiViewDiffusionPipeline
from gafext.config import SD21_MULTIVIEW_UNET, SD_VAE, UNetConfig
from gafext.models.unet import MultiViewUNet

diffusers = pytest.importorskip("diffusers")  # not on every machine with a GPU


def contestant(name, *milliseconds, kernels=()):
    median = sorted(milliseconds)[len(milliseconds) // 2]
    rates = {"gflops": 1.0 / median, "of_gemm": 0.1, "gbps": 2000 / median, "of_copy": 0.9}
    return {"name": name, "median_ms": median, "speedup": median, "times_ms": milliseconds, "kernels": kernels, **rates}


def made_results(gpu="NVIDIA H100"):
    """Ours takes 1 ms, so that speedups are medians."""
    races = []
    for op, shape, bound in (("flash_attention", "1,1,4x4,64", "compute"), ("group_norm_silu", "2x3", "memory")):
        for mode, slow in (("warm", 2.0), ("cold", 3.0)):
            rows = [
                contestant("gafext", 1.0, kernels=["gafext::kernel<2>(Arguments)"]),
                contestant("gafext kernel", 0.5),
                contestant("sdpa flash", slow, kernels=["void pytorch_flash::flash_fwd_kernel<64, 128>(int)"]),
                contestant("sdpa", 1.5 * slow, kernels=["void (anonymous namespace)::softmax<float>(int)", "Memcpy"]),
            ]
            race = {"op": op, "shape": shape, "where": "", "mode": mode, "allocator": "default", "bound": bound}
            races.append({**race, "ours": "gafext", "contestants": rows, "skipped": {}})
    return {
        "environment": {
            **{"gpu": {"name": gpu} if gpu else None, "cpu": {"model": "Xeon"}, "threads": 2, "machine": "here"},
            **{"versions": {"torch": "2.11"}, "dtype": "bfloat16", "build": {"instruction_set": "avx512"}},
            **({"ceilings": {"copy_gbps": 4000.0, "bfloat16_tflops": 0.002}} if gpu else {}),
        },
        "failed": {"geglu 1x1": "differs"} if gpu else {},
        "left_out": [],
        "races": races,
    }


def test_the_short_table(tmp_path, capsys):
    (tmp_path / "made.json").write_text(json.dumps(made_results()))
    script("summary").main([str(tmp_path / "made.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA H100, torch 2.11, bfloat16, copy_gbps 4000, bfloat16_tflops 0"
    # the best opponent is none of ours; cold, then warm
    assert lines[2].split() == ["1,1,4x4,64", "1000.0", "1000.0", "0.001", "50%", "sdpa", "flash", "3.00x", "2.00x"]
    assert lines[4].split() == ["2x3", "1000.0", "1000.0", "2e+03", "50%", "sdpa", "flash", "3.00x", "2.00x"]
    assert "FAILED geglu 1x1: differs" in lines
    assert "flash_attention, sdpa flash ran pytorch_flash::flash_fwd_kernel (1)" in lines
    assert "flash_attention, sdpa ran softmax (1)" in lines


def test_the_short_table_of_a_cpu_shares_what_raced_along(tmp_path, capsys):
    results = made_results(gpu=None)
    results["races"] = [race for race in results["races"] if race["mode"] == "warm"]
    (tmp_path / "made.json").write_text(json.dumps(results))
    script("summary").main([str(tmp_path / "made.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["1,1,4x4,64", "1000.0", "0.001", "10%", "sdpa", "flash", "2.00x"]
    assert lines[4].split()[3] == "90%"


def test_the_table_of_a_whole_checklist_is_short_enough(tmp_path, capsys):
    """A device's reply carries the last 12,000 characters."""
    from gafext.bench.cases import cases

    results = made_results()
    template = results["races"]
    results["races"] = [
        {**race, "op": case.op, "shape": case.shape, "bound": case.bound}
        for case in cases("cuda", torch.bfloat16, compiled=False)
        for race in template[:2]
    ]
    (tmp_path / "made.json").write_text(json.dumps(results))
    script("summary").main([str(tmp_path / "made.json")])
    assert len(capsys.readouterr().out) < 10_000


@pytest.mark.parametrize("mode", ["warm", "cold"])
def test_the_figure_of_a_gpu(tmp_path, monkeypatch, mode):
    pytest.importorskip("matplotlib")
    first, second = made_results(), made_results()
    first["races"], second["races"] = first["races"][:2], second["races"][2:]
    for name, results in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    plot, figure = script("plot"), tmp_path / "figure.svg"
    monkeypatch.setattr(sys, "argv", ["plot.py", *(str(tmp_path / f"{n}.json") for n in "ab"), str(figure)])
    sys.argv += ["--mode", mode]
    drawn = []
    monkeypatch.setattr(
        plot, "draw", lambda axes, races, limits, draw=plot.draw: drawn.append(races) or draw(axes, races, limits)
    )
    plot.main()
    assert [races[0]["op"] for races in drawn] == ["flash_attention", "group_norm_silu"]
    assert "NVIDIA H100" in plot.subtitle(first["environment"], mode, "default") and figure.stat().st_size > 5000


def test_the_figure_over_the_length(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    results = made_results(gpu=None)
    results["races"] = [
        {**results["races"][0], "shape": f"1,1,{n}x{n},64", "where": f"{n} tokens", "contestants": rows}
        for n in (64, 128, 256)
        for rows in [[{**contestant(name, n / 64), "peak_mib": n**p} for name, p in (("gafext", 1), ("standard", 2))]]
    ]
    (tmp_path / "made.json").write_text(json.dumps(results))
    plot, figure = script("plot"), tmp_path / "figure.svg"
    assert [row["peak_mib"] for row in plot.lengths(results["races"])["standard"]] == [64**2, 128**2, 256**2]
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "made.json"), str(figure)])
    plot.main()
    text = figure.read_text()
    assert "<!-- standard -->" in text and "<!-- N² -->" in text and "peak memory" in text


def tiny_unet():
    config = replace(
        SD21_MULTIVIEW_UNET, block_out_channels=(32, 32, 32, 32), attention_head_dim=(2, 2, 2, 2), norm_num_groups=8
    )
    return script("race").random_network(MultiViewUNet, config, torch.device("cpu"), torch.float32)


def test_the_race_of_the_unet():
    found = script("full_size").race_unet(tiny_unet(), ["auto", "reference"], views=2, rounds=2)
    assert {"auto", "reference"} <= set(found)
    assert found["auto"]["times_auto"] == 1 and found["auto"]["largest_difference"] == 0
    assert len(found["reference"]["seconds"]) == 2
    assert 0 < found["reference"]["largest_difference"] < 1e-3


def test_a_backend_that_fails_loses_only_itself(monkeypatch, capsys):
    full_size = script("full_size")
    unet = tiny_unet()

    def contestants(unet, backends, views):
        def fail():
            raise ValueError("cannot serve this\nat length")

        one = full_size.Contestant("auto", lambda: torch.ones(3))
        return [one, full_size.Contestant("kernel", fail, unet)]

    monkeypatch.setattr(full_size, "unet_contestants", contestants)
    found = full_size.race_unet(unet, ["auto", "kernel"], views=1, rounds=2)
    assert found["kernel"] == {"failed": "cannot serve this"} and found["auto"]["times_auto"] == 1
    results = {"device": "H100", "peak_gib": 1, "unet": found, "seconds_a_step": {"auto": 0.02}}
    lines = script("summary").full_size(results)
    assert any("FAILED kernel: cannot serve this" in line for line in lines)
    assert any("passes/s, 1.000 times auto" in line for line in lines) and "0.02 s a step" in lines[-1]


def test_a_pass_in_a_graph_is_warmed_up_before_and_replayed_after(monkeypatch):
    order = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def capture(graph):
        order.append("begin")
        yield
        order.append("end")

    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "graph": capture}
    fakes |= {"stream": lambda _: contextlib.nullcontext()}
    fakes |= {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: order.append("replay"))}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    full_size = script("full_size")
    eager = full_size.Contestant("auto", lambda: order.append("pass") or torch.ones(2))
    graph = full_size.graphed(eager)
    assert order == ["pass", "pass", "begin", "pass", "end", "replay"]
    assert graph.name == "auto, CUDA graph" and torch.equal(graph.result, torch.ones(2))
    graph.prepare()
    assert torch.equal(graph.run(), torch.ones(2)) and order[-1] == "replay"


def test_diffusers_network_is_that_of_stable_diffusion_2():
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = script("race").diffusers_sd21(None)
        out = network(torch.randn(8, 4, 32, 32), torch.tensor([500]), encoder_hidden_states=torch.randn(8, 77, 1024))
    assert out.sample.shape == (8, 4, 32, 32)
    assert 865e6 < sum(weight.numel() for weight in network.parameters()) < 867e6  # 865.9 million are published


def test_every_kernel_is_sanitized():
    """The driver on the CPU: its results are right there, too."""
    sanitize = script("sanitize")
    assert sanitize.main("cpu") == 0
    ran = {name.split()[0] for name, _, _ in sanitize.results("cpu", torch.float32)}
    assert ran == {"flash_attention", "cross_view_attention", "geglu_gate", "group_norm_silu"}


SIZES = {"block_out_channels": (32, 64), "attention_head_dim": (2, 4), "cross_attention_dim": 1024}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL = {**SIZES, **BLOCKS, "layers_per_block": 1, "use_linear_projection": True}


def with_small_networks(module, monkeypatch):
    monkeypatch.setattr(module, "diffusers_sd21", lambda _: diffusers.UNet2DConditionModel(**SMALL))
    monkeypatch.setattr(module, "SD21_UNET", UNetConfig(**SMALL))
    return module


def test_the_drop_in_race_compares_networks_that_agree(tmp_path, monkeypatch, capsys):
    race = with_small_networks(script("drop_in"), monkeypatch)
    arguments = ["drop_in.py", "--batch", "1", "--rounds", "2", "--no-compile", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    race.main()
    found = json.loads((tmp_path / "a.json").read_text())["unet"]
    assert list(found) == ["stock", "accelerated", "gafext"]
    assert all(row["largest_difference"] <= 1e-4 and len(row["seconds"]) == 2 for row in found.values())


def test_training_steps_are_those_of_the_same_gradients(tmp_path, monkeypatch, capsys):
    steps = script("train_step")
    small = steps.operation(steps.ops.conv3x3, [(1, 128, 5, 6), (128, 128, 3, 3), (128,)], last=True)
    resnet = steps.block(
        steps.ResnetBlock2D(32, 32, time_channels=8, groups=4, eps=1e-5),
        *(torch.randn(shape) for shape in ((2, 32, 4, 4), (2, 8))),
    )
    monkeypatch.setattr(steps, "CASES", {"small": lambda: small, "resnet": lambda: resnet})
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--rounds", "2", "--json", str(tmp_path / "a.json")])
    steps.main()
    found = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert list(found) == ["small", "resnet"]
    for rows in found.values():
        assert rows["pytorch"]["times_pytorch"] == 1 and len(rows["gafext"]["seconds"]) == 2
        assert rows["gafext"]["relative_difference"] <= 1e-4


def test_the_race_of_peers_compares_networks_that_agree(monkeypatch):
    peers = with_small_networks(script("peers"), monkeypatch)
    monkeypatch.setattr(peers.int8, "unsupported_reasons", lambda device: ["made up"])
    found = peers.race_peers(["diffusers"], ["float32", "bfloat16", "int8"], batch=2, size=16, rounds=2)
    rows = found["unet"]
    precisions = ["float32", "bfloat16"]
    assert set(rows) == {f"{name} {p}" for name in ("gafext", "diffusers") for p in precisions} | {"gafext int8"}
    assert rows["gafext float32"]["times_gafext float32"] == 1
    assert 0 < rows["diffusers float32"]["relative_difference"] < 1e-5
    assert 1e-4 < rows["gafext bfloat16"]["relative_difference"] < 0.1
    assert "made up" in rows["gafext int8"]["failed"]
    assert found["environment"]["build"]["instruction_set"] and "diffusers" in found["peers"]


def precision_script(monkeypatch):
    precision = script("precision")
    monkeypatch.setattr(precision, "SD21_UNET", UNetConfig(**SMALL))
    return precision


def test_precisions_are_measured_and_added_to_earlier_ones(tmp_path, monkeypatch, capsys):
    precision, file = precision_script(monkeypatch), tmp_path / "a.json"
    monkeypatch.setattr(precision, "race", lambda makers, rounds, *args, **options: race(makers, 2, *args, **options))
    race = script("race").race

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["precision.py", "--size", "16", "--json", str(file), *arguments])
        precision.main()
        return json.loads(file.read_text())

    first = run("--choices", "linear,linear+3x3,int8-inner,int8", "--steps", "0")
    errors = {name: row["relative_difference"] for name, row in first["unet"].items()}
    assert errors.pop("float32") == 0 and all(1e-4 < error < 0.1 for error in errors.values())
    assert errors["linear"] < errors["linear+3x3"] < errors["int8"] and errors["int8-inner"] < errors["int8"]
    both = run("--choices", "bfloat16", "--steps", "1")
    assert both["unet"].keys() == {"float32", *errors, "bfloat16"} and both["views_psnr"].keys() == {"bfloat16"}
    assert both["unet"]["int8"] == first["unet"]["int8"] and both["views_psnr"]["bfloat16"] > 20
    assert "| `bfloat16` |" in capsys.readouterr().out


def test_the_table_of_precisions_is_that_of_the_results(monkeypatch):
    precision, page = script("precision"), (ROOT / "docs" / "precision.md").read_text()
    files = sorted((ROOT / "benchmarks/results").glob("precision-*.json"))
    assert files
    for path in files:
        rows = precision.table(json.loads(path.read_text()))
        assert len(rows) > 2 and "\n".join(rows) in page and path.name in page


def test_openvino_has_the_same_weights(monkeypatch):
    pytest.importorskip("nncf", reason="pip install openvino nncf")
    peers = with_small_networks(script("peers"), monkeypatch)
    rows = peers.race_peers(["openvino"], ["float32", "int8"], batch=2, size=16, rounds=2)["unet"]
    assert 0 < rows["openvino float32"]["relative_difference"] < 1e-5
    assert 1e-3 < rows["openvino int8"]["relative_difference"] < 0.5


def test_openvino_without_bfloat16_loses_its_row(monkeypatch):
    peers = with_small_networks(script("peers"), monkeypatch)
    core = SimpleNamespace(get_property=lambda *_: ["FP32", "INT8"])
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    with pytest.raises(ValueError, match="no bfloat16 on this processor, only FP32, INT8"):
        peers.Field(batch=2, size=16).openvino("bfloat16")


def test_the_whole_pipeline_by_stages(monkeypatch):
    full_size = script("full_size")
    given = ["full_size.py", "--views", "1", "--steps", "2", "--backend", "auto", "sdpa"]
    monkeypatch.setattr(sys, "argv", given)
    found = full_size.time_pipeline(MultiViewDiffusionPipeline.from_pretrained(), full_size.arguments())
    for backend in ("auto", "sdpa"):
        stages = found["seconds_of_stages"][backend]
        assert list(stages) == ["prepare", "denoise", "finish"] and min(stages.values()) > 0
        assert found["seconds_in_all"][backend] == pytest.approx(sum(stages.values()))
        assert 0 < found["seconds_a_step"][backend] < stages["denoise"]


def test_the_pipeline_against_diffusers(monkeypatch, tmp_path, capsys):
    race, file, figure = script("bench_pipeline"), tmp_path / "pipeline.json", tmp_path / "pipeline.svg"
    words = ["--model", "built-in", "--against", "stock", "--views", "2", "--steps", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench_pipeline.py", *words])
    race.main()
    assert "1.00x" in capsys.readouterr().out
    found = json.loads(file.read_text())["contestants"]
    assert list(found) == ["gafext", "stock"] and found["gafext"]["pictures_largest_difference"] == 0
    assert 0 < found["stock"]["latents_relative_difference"] < 1e-5
    assert found["stock"]["pictures_largest_difference"] < 1e-4
    for row in found.values():
        stages = row["stages"]
        assert list(stages) == ["encode", "denoise", "upsample", "decode", "all"]
        assert all(len(stage["seconds"]) == 7 and min(stage["seconds"]) > 0 for stage in stages.values())
        whole = [sum(stages[stage]["seconds"][turn] for stage in race.STAGES) for turn in range(7)]
        assert stages["all"]["seconds"] == pytest.approx(whole)
        ratios = sorted(a / b for a, b in zip(whole, found["gafext"]["stages"]["all"]["seconds"], strict=True))
        assert stages["all"]["times_gafext"] == pytest.approx(ratios[3])
    script("summary").main([str(file)])
    assert "2 views, 2 steps" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra dev")
    monkeypatch.setattr(sys, "argv", ["plot_pipeline.py", str(file), str(figure)])
    script("plot_pipeline").main()
    assert "seconds" in figure.read_text()


def test_a_contestant_that_cannot_run_is_named(capsys):
    race = script("bench_pipeline")
    given, makers = race.contestants(
        MultiViewDiffusionPipeline.from_pretrained(device="cpu"), [], views=1, steps=1, guidance=2.0
    )
    makers["other"] = lambda: math.sqrt(-1.0)
    found = race.race_pipelines(given, makers, rounds=2, device=torch.device("cpu"))
    assert found["other"] == {"failed": "math domain error"} and "stages" in found["gafext"]
    assert "math domain error" in race.table(found)


def test_the_shares_of_a_profile_are_the_whole_pass(monkeypatch, tmp_path, capsys):
    profile = script("profile_pass")
    sizes = {"block_out_channels": (32, 32, 32, 32), "attention_head_dim": (2, 2, 2, 2), "norm_num_groups": 8}
    monkeypatch.setattr(profile, "SD21_MULTIVIEW_UNET", replace(SD21_MULTIVIEW_UNET, **sizes))
    file = tmp_path / "profile.json"
    given = ["--network", "multiview", "--size", "16", "--rounds", "3", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["profile_pass.py", *given])
    profile.main()
    found = json.loads(file.read_text())
    kinds = {row["kind"]: row for row in found["kinds"]}
    attentions = {"self-attention", "attention to image", "attention across views"}
    assert {"conv3x3", "conv1x1", "linear", "linear, GEGLU", "norms, SiLU", "Python", *attentions} <= set(kinds)
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    assert sum(row["seconds"] for row in kinds.values()) == pytest.approx(found["seconds"])
    assert sorted(found["seconds_of_rounds"])[1] == found["seconds"]
    assert sum(row["calls"] for row in found["shapes"]) == sum(row["calls"] for row in kinds.values())
    first = next(row for row in found["shapes"] if row["shape"] == "8,8->32,16x16")  # conv_in
    assert first["flops"] == 2 * 8 * 32 * 16 * 16 * 8 * 9 and first["kind"] == "conv3x3"
    limit = found["limits"]["float32 product"]
    assert first["of_limit"] == pytest.approx(first["flops"] / first["seconds"] / limit)
    printed = capsys.readouterr().out
    assert "attention across views" in printed and "Python" in printed


def test_a_profile_knows_what_limits_an_operation():
    classify = script("profile_pass").classify
    x = torch.empty(2, 7, 16)
    kind, shape, flops = classify("linear", [x, torch.empty(5, 16)], torch.empty(2, 7, 5), ())
    assert (kind, shape, flops) == ("linear", "14,16->5", 2 * 14 * 16 * 5)
    pointwise = classify("linear", [torch.empty(2, 7, 3, 16), torch.empty(5, 16)], torch.empty(2, 7, 3, 5), ())
    assert pointwise == ("conv1x1", "2,16->5,7x3", 2 * 42 * 16 * 5)
    assert classify("geglu", [x], torch.empty(2, 7, 5), ())[1:] == ("14,16->10", 2 * 14 * 16 * 10)
    query, key = torch.empty(1, 3, 9, 8), torch.empty(1, 3, 77, 8)
    assert classify("flash_attention", [query, key], query, ())[::2] == ("attention to text", 4 * 3 * 9 * 77 * 8)
    rows = [torch.empty(4, 3, 9, 8)] * 3
    assert classify("cross_view_attention", rows, rows[0], (*rows, 4))[2] == 4 * 4 * 3 * 9 * 8 * 4
    for name, kind in {"add_": "sums", "silu_": "norms, SiLU", "cat": "copies", "round_": "rounding to 8 bits"}.items():
        assert classify(name, [x], x, ()) == (kind, "2x7x16", 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peaks_of_small_networks(monkeypatch):
    memory = script("memory")
    sizes = {"block_out_channels": (32, 32, 32, 32), "attention_head_dim": (2, 2, 2, 2), "norm_num_groups": 8}
    monkeypatch.setattr(memory, "SD21_MULTIVIEW_UNET", replace(SD21_MULTIVIEW_UNET, **sizes))
    monkeypatch.setattr(memory, "SD_VAE", replace(SD_VAE, block_out_channels=(32, 32, 32, 32)))
    for part, size in (("unet", 16), ("decoder", 16)):
        found = memory.measure(part, 2, size, "float32")
        assert 2**16 < found["bytes"] < 2**30 and found["weights"] > 2**25
    grown = [memory.measure("decoder", 1, size, "float32")["bytes"] for size in (16, 48)]
    assert grown[1] > 3 * grown[0]


def test_presets_are_measured_and_drawn(monkeypatch, tmp_path, capsys):
    presets, file, figure = script("presets"), tmp_path / "presets.json", tmp_path / "presets.svg"
    fast = {"num_inference_steps": 2, "guidance_interval": (0.28, math.inf)}
    options = {"quality": {"num_inference_steps": 6}, "again": {"num_inference_steps": 6}, "fast": fast}
    monkeypatch.setattr(presets.measure, "__kwdefaults__", {"first": 0, "options": options})
    monkeypatch.setattr(sys, "argv", ["presets.py", "--heads", "2", "--json", str(file)])
    presets.main()
    quality, again, fast = json.loads(file.read_text())["options"]
    assert again["psnr_to_quality"] > 99 > fast["psnr_to_quality"] > 20 and quality["psnr"] == again["psnr"] > 15
    for row in (quality, again, fast):
        pairs = zip(row["seconds_in_all"], row["seconds"], strict=True)
        assert len(row["seconds"]) == 2 and all(whole > loop > 0 for whole, loop in pairs)
    assert fast["options"]["guidance_interval"] == [0.28, "inf"] and quality["times_as_fast"] == 1
    assert "fast" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra dev")
    monkeypatch.setattr(sys, "argv", ["plot_presets.py", str(file), str(figure)])
    script("plot_presets").main()
    assert "PSNR to the truth" in figure.read_text()


def test_builds_of_the_extension_take_turns(monkeypatch, capfd):
    from gafext import _C

    small = ["conv(1,3,4,5)", "linear(3, 8, 5)", "geglu(2,8,4)", "attention(1, 2, 9, 5, 8)"]
    cases = [word for case in small for word in ("--case", case)]
    monkeypatch.setattr(sys, "argv", ["duel.py", _C.__file__, _C.__file__, *cases, "--seconds", "0"])
    script("duel").main()
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(")")[0] + ")" for line in lines] == small
    assert all(float(line.split()[-1]) > 0 and float(line.split()[-3]) > 0 for line in lines)
    monkeypatch.setattr(sys, "argv", ["duel.py", _C.__file__, _C.__file__, "--case", "linear(3)"])
    with pytest.raises(SystemExit, match=r"ended at linear\(3\)"):
        script("duel").main()
