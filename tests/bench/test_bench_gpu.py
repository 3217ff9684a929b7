"""The GPU's side of `gafext bench`, on the CPU: its arithmetic, and its flow over stand-ins for what needs a GPU."""

import contextlib
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import helpers
import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend

from gafext.bench import cuda
from gafext.bench.cases import Contestant, cases, lengths
from gafext.bench.cases import flash_attention as attention_cases
from gafext.bench.cases.flash_attention import case as attention_case
from gafext.bench.environment import cold_bytes
from gafext.bench.measure import race
from gafext.cli import main


@pytest.mark.parametrize(
    "call_seconds, sets, calls, replays",
    [
        (0.5, 1, 256, 8),  # warm
        (4, 32, 32, 8),  # a turn's calls are a rotation
        (4, 100, 100, 8),  # the rotation takes longer than a turn, but not by much
        (32, 100, 4, 1),  # a whole rotation would take 25 turns
        (512, 3, 1, 1),
    ],
)
def test_a_graph_is_a_rotation_unless_its_calls_are_long(call_seconds, sets, calls, replays):
    assert cuda.graph_calls(call_seconds, 128, sets) == calls
    assert cuda.graph_replays(16, 128, calls, sets) == replays


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


class FakeGraph:
    """Counts its replays; what is captured runs once, at capture."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@contextlib.contextmanager
def fake_capture(graph):
    yield


def on_cpu(make):
    """torch.rand or its like, on the CPU whatever the device."""
    return lambda *sizes, device=None, **kind: make(*sizes, **kind)


@pytest.fixture
def fake_gpu(monkeypatch):
    """torch.cuda as far as the bench uses it, on tensors of the CPU; gives the list of flushes."""
    flushes = []
    properties = SimpleNamespace(name="Fake", major=9, minor=0, total_memory=2**36, L2_cache_size=6000)
    fakes = {
        **{"Event": FakeEvent, "CUDAGraph": FakeGraph, "graph": fake_capture, "synchronize": lambda: None},
        **{"is_available": lambda: True, "get_device_properties": lambda _: properties},
        **{"current_stream": lambda: "stream", "set_stream": lambda _: None},
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda, "flush", lambda: flushes.append(1))
    monkeypatch.setattr(cuda, "MATRIX", 64)
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    return flushes


def doubling(*contestants):
    return helpers.doubling(*contestants, size=1000)


def test_cold_calls_rotate_and_keep_their_results_apart(fake_gpu):
    inputs, outputs = [], []

    def spy(x):
        inputs.append(x.data_ptr())
        outputs.append((2 * x).data_ptr())
        return 2 * x

    sizes = cold_bytes("cuda")
    assert sizes == 12000  # twice the cache: three sets of 4000 bytes beside the first
    race(doubling(Contestant("spy", spy)), "cuda", cold_bytes=sizes, rounds=3, turn_seconds=1e-3)
    assert inputs[-4:] == list(dict.fromkeys(inputs[-4:])), "a rotation has every set once"
    assert len(fake_gpu) == 3 * 4, "before every turn of four contestants"
    fake_gpu.clear()
    race(doubling(), "cuda", cold_bytes=0, rounds=3, turn_seconds=1e-7)
    assert not fake_gpu


def test_results_of_a_cold_rotation_live_at_once_and_of_a_warm_one_do_not(fake_gpu):
    alive, most = set(), 0

    class Result:
        def __init__(self):
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self):
            alive.discard(id(self))

    for sets, calls, kept in ((1, 8, 1), (4, 4, 4)):
        most = 0
        turns = cuda.GraphTurns(lambda _: Result(), [(0,)] * sets, call_seconds=1, turn_seconds=calls)
        assert turns.calls == calls and kept <= most <= kept + 1


def test_what_cannot_be_captured_is_left_out(fake_gpu, monkeypatch):
    restored = []
    monkeypatch.setattr(torch.cuda, "set_stream", restored.append)
    calls = []

    def fails_in_capture(x):
        calls.append(1)
        if len(calls) > 6:  # its result, two to warm up, three to estimate
            raise RuntimeError("operation not permitted when stream is capturing")
        return 2 * x

    contestant = Contestant("shy", fails_in_capture, optional=True)
    result = race(doubling(contestant), "cuda", cold_bytes=0, rounds=3, turn_seconds=1e-7)
    assert result.skipped == {"shy": "operation not permitted when stream is capturing"}
    assert set(result.times) == {"gafext", "gemm", "copy"} and restored == ["stream"]
    calls.clear()
    with pytest.raises(RuntimeError, match="not permitted"):
        race(doubling(replace(contestant, optional=False)), "cuda", cold_bytes=0, rounds=3, turn_seconds=1e-7)


def test_the_whole_command(fake_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda, "ceilings", lambda: {"copy_gbps": 3000.0, "bfloat16_tflops": 790.0})
    monkeypatch.setattr(cuda, "kernels_of", lambda call: [f"kernel of {len(call())}"])
    monkeypatch.setattr(
        "gafext.bench.command.cases", lambda *_, **__: iter([doubling(Contestant("other", lambda x: x + x))])
    )
    path = tmp_path / "bench.json"
    words = ["bench", "--device", "cuda", "--dtype", "bfloat16", "--quick", "--no-compile", "--cold"]
    assert main([*words, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [race["mode"] for race in written["races"]] == ["warm", "cold"]
    assert written["environment"]["ceilings"]["bfloat16_tflops"] == 790
    assert {row["name"]: row["kernels"] for row in written["races"][1]["contestants"]} == {
        "gafext": ["kernel of 1000"],
        "other": ["kernel of 1000"],
    }
    assert "copy_gbps 3000" in capsys.readouterr().out


def test_what_broke_the_gpu_is_written_though_nothing_runs_on_it_any_more(fake_gpu, monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    good, bad = doubling(), replace(doubling(), shape="17", contestants=[Contestant("gafext", broken)])
    made = []

    def inputs():
        made.append(1)
        return (torch.rand(1000),) if len(made) == 1 else broken()

    monkeypatch.setattr(cuda, "ceilings", dict)
    monkeypatch.setattr("gafext.bench.command.cases", lambda *_, **__: iter([replace(good, inputs=inputs), bad]))
    path = tmp_path / "bench.json"
    words = ["bench", "--device", "cuda", "--dtype", "bfloat16", "--quick", "--no-compile"]
    assert main([*words, "--json", str(path)]) == 1
    written = json.loads(path.read_text())
    assert [race["shape"] for race in written["races"]] == ["1000"]
    assert written["failed"]["doubling 17"] == "an illegal memory access was encountered"
    assert "failed: doubling 17: an illegal memory access" in capsys.readouterr().err


def test_only_names_of_the_device_the_longest_first():
    def event(key, device_type, microseconds):
        return SimpleNamespace(key=key, device_type=device_type, self_device_time_total=microseconds)

    events = [
        event("cudaLaunchKernel", DeviceType.CPU, 0),
        event("Memcpy DtoD", DeviceType.CUDA, 3),
        event("flash_fwd", DeviceType.CUDA, 40),
        event("Context Sync", DeviceType.CUDA, 50),
    ]
    assert cuda.device_names(events) == ["flash_fwd", "Memcpy DtoD"]


def test_backends_are_pinned_where_they_run(monkeypatch):
    """Within its context, a contestant of SDPA may use the backend that it is named for and no other."""
    case = attention_case(1, 2, 8, 8, 16, "", compiled=False, device="cuda", dtype=torch.float32)
    flags = {
        "sdpa cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "sdpa flash": torch.backends.cuda.flash_sdp_enabled,
        "sdpa efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "sdpa math": torch.backends.cuda.math_sdp_enabled,
    }
    named = {contestant.name: contestant for contestant in case.contestants}
    assert set(flags) <= set(named)
    for name in flags:
        with named[name].context():
            assert [other for other, enabled in flags.items() if enabled()] == [name]
    with named["sdpa"].context():
        assert all(enabled() for enabled in flags.values())
    assert isinstance(named["sdpa math"].context.args[0], SDPBackend)


def test_gpu_contestants_of_attention_agree_and_count_their_copies(monkeypatch):
    """The forms themselves, on the CPU: all give [B,L,H,D], in that order in memory but for the contiguous one."""
    case = attention_case(2, 3, 33, 17, 16, "", compiled=False, device="cuda", dtype=torch.float32)
    inputs = tuple(torch.randn(2, length, 3, 16).transpose(1, 2) for length in (33, 17, 17))
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs).transpose(1, 2)
    for contestant in case.contestants:
        if contestant.name in ("sdpa cudnn", "sdpa flash", "sdpa efficient"):
            continue  # not on a CPU
        with contestant.context():
            out = contestant.run(*(contestant.prepare(*inputs) if contestant.prepare else inputs))
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous() or contestant.name == "sdpa contiguous"


def test_the_suite_of_lengths_compares_results_of_one_layout_on_gpus(monkeypatch):
    monkeypatch.setattr(lengths, "LENGTHS", [64])
    monkeypatch.setattr(attention_cases, "heads_first", lambda batch, n, heads, d, **_: torch.randn(batch, heads, n, d))
    (case,) = lengths.cases(device="cuda", dtype=torch.float32)
    inputs = case.inputs()
    ours, standard, sdpa = (contestant.run(*inputs) for contestant in case.contestants)
    torch.testing.assert_close(standard, ours)
    torch.testing.assert_close(sdpa, ours)


def test_the_issues_shapes_are_measured():
    shapes = {case.op: set() for case in cases("cuda", torch.bfloat16, compiled=False)}
    for case in cases("cuda", torch.bfloat16, compiled=False):
        shapes[case.op].add(case.shape)
    wanted = {f"8,8,{n}x{n},{width}" for n in (64, 256, 1024, 4096) for width in (40, 80, 160)}
    wanted |= {f"8,8,{n}x{n},128" for n in (1024, 4096)} | {f"1,1,{n}x{n},512" for n in (1024, 4096, 16384)}
    wanted |= {
        f"8,{heads},{n}x{keys},64" for heads, n in ((20, 64), (10, 256), (5, 1024), (5, 4096)) for keys in (77, 257)
    }
    assert wanted | {"4,16,257x257,80"} <= shapes["flash_attention"]
    places = ("(1024,320)", "(256,640)", "(4096,320)")
    assert {f"2xV={views},{place}" for views in (4, 8) for place in places} <= shapes["cross_view_attention"]
