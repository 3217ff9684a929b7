"""What the doctor says of an operation is what a call does."""

import pytest
import torch
from helpers import called
from torch._subclasses.fake_tensor import FakeTensorMode

from gafext import ops
from gafext.doctor.operations import OPERATIONS, choices, failures

CPU = torch.device("cpu")


def uses(found, op, dtype):
    [entry] = [entry for entry in found[op] if dtype in entry["dtypes"]]
    assert bool(entry["why"]) == (entry["uses"] == "PyTorch")
    return entry["uses"]


def test_every_operation_and_dtype_has_an_answer():
    found = choices(CPU)
    assert set(found) == set(OPERATIONS) == set(ops.__all__) - {"geglu_gate"}
    for op in OPERATIONS:
        dtypes = sorted(dtype for entry in found[op] for dtype in entry["dtypes"])
        assert dtypes == (["float32"] if op.endswith("int8") else ["bfloat16", "float16", "float32"])


@pytest.mark.parametrize("processor", ["portable", "avx2", "amx"])
def test_the_answers_follow_the_processor(processor, pretend_cpu):
    pretend_cpu(processor, multiplies_bfloat16=processor == "amx")
    found = choices(CPU)
    assert uses(found, "linear", "float32") == ("kernel" if processor == "amx" else "PyTorch")
    assert uses(found, "linear", "bfloat16") == ("PyTorch" if processor == "amx" else "kernel")
    assert uses(found, "conv3x3_int8", "float32") == ("PyTorch" if processor == "portable" else "kernel")
    assert uses(found, "cross_view_attention", "float16") == "kernel"


def test_a_call_does_what_was_said(pretend_cpu):
    pretend_cpu("avx2", multiplies_bfloat16=False)
    found, x, weight = choices(CPU), torch.rand(8, 1024, 320), torch.rand(320, 320)
    for dtype, kind in ((torch.float32, "float32"), (torch.float16, "float16")):
        ran = "gafext::linear" in called(ops.linear, x.to(dtype), weight.to(dtype))
        assert ran == (uses(found, "linear", kind) == "kernel")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_accelerators_have_reasons(device):
    with FakeTensorMode():  # there is none here
        found = choices(torch.device(device))
    assert uses(found, "linear", "float32") == uses(found, "conv3x3_int8", "float32") == "PyTorch"
    words = "there is no kernel for MPS" if device == "mps" else "the kernel is for CPUs"
    assert any(words in reason for reason in found["linear_int8"][0]["why"])


def test_operations_that_fail_or_are_wrong_are_named(monkeypatch):
    assert failures(CPU) == {}
    geglu = ops.geglu

    def broken(*_, **__):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(ops, "linear", broken)
    monkeypatch.setattr(
        ops, "geglu", lambda *inputs, backend="auto": (1.0 if backend == "reference" else 1.1) * geglu(*inputs)
    )
    assert failures(CPU) == {"geglu": "its result is off the formula's by 10 %", "linear": "no kernel image"}
    monkeypatch.setattr(ops, "geglu", lambda *inputs, backend="auto": torch.full((2,), float("nan")))
    assert "nan" in failures(CPU)["geglu"]
