"""csrc/cuda/flash_attention_sm90.cu under the emulator of tests/emulator.py: right results, planted faults.

TMA, wgmma and barriers are what the PTX ISA documents: see cuda_emulator/include/emulated_hopper.h. And what the
compiler reports of the kernel.
"""

import functools
import random
import re
import shutil
import subprocess

import pytest
import torch
from emulator import KERNELS, ROOT, EmulatorError, cache_folder, emulate_call, flash_attention, kernels
from helpers import heads_in_layout as heads

import gafext.ops  # noqa: F401 - registers torch.ops.gafext

SOURCE, PARTS = KERNELS / "flash_attention_sm90.cu", KERNELS / "flash_attention_sm90.cuh"
HALVES = [torch.float16, torch.bfloat16]


def emulate(query, key, value, library=None, multiprocessors=2, **options):
    """Without the dispatch, which takes the kernel for long sequences alone; in every order, bit-equal."""
    return emulate_call(
        library or kernels(),
        "flash_attention_sm90",
        lambda: flash_attention(query, key, value, **options),
        capability=90,
        multiprocessors=multiprocessors,
    )


def assert_as_on_cpu(query, key, value, library=None, multiprocessors=2, **options):
    expected = torch.ops.gafext.flash_attention(query, key, value, **options)
    out = emulate(query, key, value, library, multiprocessors, **options)
    assert out.shape == expected.shape and out.dtype == expected.dtype and out.stride() == expected.stride()
    # Weights rounded to half precision cost a unit in the last place.
    largest = expected.nan_to_num(0, 0, 0).abs().max().item()
    tolerance = 2 * torch.finfo(out.dtype).eps * max(1.0, largest)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0, equal_nan=True)
    return out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (64, 128), (65, 129), (193, 257), (130, 520)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_edges_of_tiles(head_dim, lengths, is_causal):
    query = heads("projection", 1, 1, 1, lengths[0], head_dim, torch.bfloat16)[0]
    key, value = heads("packed", 2, 1, 1, lengths[1], head_dim, torch.bfloat16)
    assert_as_on_cpu(query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, dtype = choose.choice([64, 64, 80, 128]), choose.choice(HALVES)
    batch, num_heads, layout = choose.randint(1, 2), choose.randint(1, 2), choose.choice(["contiguous", "projection"])
    query_length, key_length = choose.randint(1, 400), choose.randint(1, 400)
    query = heads(layout, 1, batch, num_heads, query_length, head_dim, dtype)[0]
    key, value = heads("packed", 2, batch, num_heads, key_length, head_dim, dtype)
    options = dict(is_causal=choose.random() < 0.5, scale=choose.choice([None, 0.3]))
    assert_as_on_cpu(query, key, value, multiprocessors=choose.choice([1, 2, 3, 7]), **options)


def test_the_number_of_multiprocessors_changes_no_bit():
    """It changes which block does what, and at head size 64 how many warpgroups share a block."""
    query, key, value = heads("packed", 3, 1, 3, 260, 64, torch.float16)
    first, *others = [emulate(query, key, value, multiprocessors=n, is_causal=True) for n in (1, 2, 5, 100)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_and_infinity_spread_as_on_the_cpu(where, poison):
    for is_causal in (False, True):
        query, key, value = heads("contiguous", 3, 1, 1, 200, 64, torch.bfloat16)
        (query if where == "query" else key)[0, 0, 130, 2] = poison
        assert_as_on_cpu(query, key, value, is_causal=is_causal)


def test_scores_that_are_huge_or_all_minus_infinity():
    query, key, value = heads("contiguous", 3, 1, 1, 200, 64, torch.bfloat16)
    assert_as_on_cpu(query * 1e15, key * 1e15, value)
    query[..., 0], key[..., 0] = 1.0, float("-inf")
    assert not assert_as_on_cpu(query, key, value).any()
    key[:, :, 150:, 0] = -1e4  # the first tile has no finite score, the second has small ones
    assert_as_on_cpu(query, key, value)


def test_what_it_does_not_run():
    query, key, value = heads("contiguous", 3, 1, 2, 10, 64, torch.float16)
    shifted = heads("anywhere", 1, 1, 2, 10, 64, torch.float16)[0]
    refused = [
        (shifted, key, value),
        (query, shifted, value),
        (query, key, shifted),
        (query, key, value[:, :1].expand_as(value)),
    ]
    refused += [tuple(t.float() for t in (query, key, value)), tuple(t[..., :40] for t in (query, key, value))]
    for tensors in refused:
        with pytest.raises(EmulatorError, match="cudaErrorInvalidValue"):
            emulate(*tensors)
    with pytest.raises(EmulatorError, match="cudaErrorInvalidValue"):
        emulate(query, key, value, scale=-1.0)


# Planted faults: file, text, what it becomes, and what the emulator says; None where only the result is wrong.

KEYS_WAIT = "      barrier_wait(shared.key_full[keys.stage], keys.parity);\n"
VALUES_WAIT = "barrier_wait(shared.value_full[values.stage], values.parity);\n      start_values"
SCORES_WAIT, SCORES_RELEASE = "      products_wait<1>(scores);\n", "      release(shared.key_empty[keys.stage]);\n"
VALUES_DONE = "      products_wait<0>(out, weights);\n"
VALUES_RELEASE = "      release(shared.value_empty[values.stage]);\n      values.advance();\n      scale_rows"
PACK = "      pack_weights<T>(weights, scores);\n"
FIRST_TURN = "  if (consumer == S::kConsumers - 1) pass_turn<S>(consumer);"
STUCK, EARLY = "nobody can go on", "race|under way"
FAULTS = {
    "a wrong parity": (SOURCE, VALUES_WAIT, VALUES_WAIT.replace("parity)", "parity ^ 1)"), f"{STUCK}|{EARLY}"),
    "keys not waited for": (SOURCE, KEYS_WAIT + "      await", "      await", EARLY),
    "keys released before they are read": (SOURCE, SCORES_WAIT + SCORES_RELEASE, SCORES_RELEASE + SCORES_WAIT, "race"),
    "values never released": (SOURCE, VALUES_RELEASE, VALUES_RELEASE.split("\n", 1)[1], STUCK),
    "results taken too early": (SOURCE, SCORES_WAIT, "", "not given|in use"),
    "weights overwritten while in use": (SOURCE, VALUES_DONE, PACK + VALUES_DONE, "A register of lane 0 was written"),
    "no fence before a product": (SOURCE, "products_begin(out, weights);", "products_begin(out);", "no products_begin"),
    "a wrong stride in a descriptor": (PARTS, "(start, 16, 8 * S", "(start, 16, 16 * S", None),
    "a wrong distance of panels": (PARTS, "S::kKeys * S::kPanelRowBytes, 8", "kGroupRows * S::kPanelRowBytes, 8", None),
    "fewer bytes expected than come": (PARTS, "full, rows * S::kHead *", "full, rows *", f"{STUCK}|{EARLY}|expect"),
    "an arrival too few": (SOURCE, "key_empty[i], S::kConsumers *", "key_empty[i], ", f"{STUCK}|race|more arrivals"),
    "barriers not made visible": (SOURCE, "    barriers_visible();\n", "", "barriers_visible"),
    "the first turn not given": (SOURCE, FIRST_TURN, "", STUCK),
    "a mask off by one": (PARTS, ">= limit[", "> limit[", None),
    "a row stored past the end": (PARTS, "row + 8 * h < problem.query_", "row < problem.query_", "out of bounds"),
}

# What exercise() does without compiles in a third of the time without.
UNUSED = (
    "if (args.dtype == DType::kFloat16) return sm90::launch_element<__half>(args, stream);",
    "if (fits_96(args.key_length)) return launch_shape<Shape<kHead, 2, 96>, T>(args, multiprocessors, stream);",
    "case 80:\n      return launch_head<80, T>(args, multiprocessors, stream);",
)


def with_fault(path, text, replacement):
    texts = {p.name: p.read_text() for p in (SOURCE, PARTS)}
    assert texts[path.name].count(text) == 1, f"{path.name} has no longer one {text!r}, where a fault was planted"
    texts[path.name] = texts[path.name].replace(text, replacement)
    for unused in UNUSED:
        assert unused in texts[SOURCE.name]
        texts[SOURCE.name] = texts[SOURCE.name].replace(unused, "")
    return kernels().with_changes(texts)


def exercise(library):
    for head_dim in (64, 128):
        query = heads("contiguous", 1, 1, 2, 260, head_dim, torch.bfloat16)[0]
        key, value = heads("contiguous", 2, 1, 2, 600, head_dim, torch.bfloat16)
        assert_as_on_cpu(query, key, value, library, is_causal=head_dim == 64)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    *place, message = FAULTS[fault]
    with pytest.raises((EmulatorError, AssertionError) if message is None else EmulatorError, match=message):
        exercise(with_fault(*place))


def test_without_a_fault_nothing_is_found():
    exercise(with_fault(PARTS, "constexpr int kDepth = 16;", "constexpr int kDepth = 4 * 4;"))


@functools.cache
def compiled():
    """Object and ptxas's report."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    target = cache_folder() / "flash_attention_sm90.o"
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-DGAFEXT_WITH_CUDA", "-DGAFEXT_WITH_SM90A"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-c", SOURCE, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, done.stdout + done.stderr


def test_no_spills_and_no_serialized_products():
    report = compiled()[1]
    kernels = len(re.findall(r"Compiling entry function '\w*flash_attention_sm90_kernel\w*' for 'sm_90a'", report))
    assert kernels == report.count("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 14, report
    # C7508: setmaxnreg ignored; C7510, C7514 and their like: wgmma serialized.
    assert not re.search(r"\(C75\d\d\)|Potential Performance Loss", report), report


@pytest.mark.skipif(not shutil.which("cuobjdump"), reason="needs cuobjdump")
def test_the_instructions_are_hoppers():
    code = subprocess.run(["cuobjdump", "-sass", compiled()[0]], capture_output=True, text=True, check=True).stdout
    bodies = re.split(r"Function : ", code)[1:]
    assert len(bodies) == 14
    for body in bodies:
        for instruction in ("HGMMA", "UTMALDG.4D", "USETMAXREG", "SYNCS"):
            assert instruction in body, body.splitlines()[0]
        assert not re.search(r"\b(HMMA|LDL|STL)\b", body)
