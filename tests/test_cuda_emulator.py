"""The emulator of tests/emulator.py: its instructions, the mistakes it finds, and faults planted in kernels."""

import functools

import pytest
import torch
from emulator import Call, EmulatorError, Library, emulate_call
from emulator_build import KERNELS, MACHINE, needs_compiler

pytestmark = needs_compiler
LANES = torch.arange(32)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@functools.cache
def unit_kernels():
    return Library([MACHINE / "unit_kernels.cu", MACHINE / "matmul.cu"], [MACHINE / "unit_kernels.h"])


def run(operation, out_shape, out_dtype=torch.int32, library=None, device=None, **arguments):
    def make_call():
        out = torch.empty(out_shape, dtype=out_dtype)
        return Call(out, arguments | dict(out=out))

    return emulate_call(library or unit_kernels(), operation, make_call, **(device or {}))


def signed(mask):
    return mask - (mask >> 31 << 32)


def shuffle_source(kind, lane, argument, width):
    """CUDA programming guide, "Warp Shuffle Functions"."""
    first = lane // width * width
    if kind == "index":
        return first + argument % width
    source = {"up": lane - argument, "down": lane + argument, "xor": lane ^ argument}[kind]
    inside = {"up": source >= first, "down": source < first + width, "xor": source < first + width}[kind]
    return source if inside else lane


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("kind", ["index", "up", "down", "xor"])
def test_shuffles(kind, width):
    value = torch.randint(-(2**31), 2**31, (32,)).int()
    for argument in (0, 1, 2, 5, 16, 31):
        sizes = dict(kind=["index", "up", "down", "xor"].index(kind), argument=argument, width=width)
        out = run("shuffle", 32, value=value, mask=-1, **sizes)
        source = [shuffle_source(kind, lane, argument, width) for lane in range(32)]
        assert torch.equal(out, value[source])


def test_a_shuffle_of_some_lanes():
    value = torch.randint(1000, (32,)).int()
    out = run("shuffle", 32, value=value, kind=3, mask=0x00FF, argument=4, width=32)
    assert torch.equal(out, value[[lane ^ 4 if lane < 8 else lane for lane in range(32)]])


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x00000004], ids=hex)
@pytest.mark.parametrize("values", [LANES % 3, LANES * 0, LANES * 0 + 7, (LANES == 31).int()], ids=str)
def test_votes(values, mask):
    out = run("vote", (32, 4), value=values.int(), mask=signed(mask))
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    ballot = sum(1 << lane for lane in lanes if values[lane])
    for lane in range(32):
        same = sum(1 << other for other in lanes if values[other] == values[lane])
        expected = [ballot, int(ballot != 0), int(ballot == mask), same] if lane in lanes else [-1] * 4
        assert out[lane].tolist() == [signed(number) if number >= 0 else number for number in expected]


@pytest.mark.parametrize("threads, live", [(32, 32), (33, 33), (96, 70), (256, 1)])
def test_votes_of_a_block_some_of_whose_threads_have_exited(threads, live):
    value = torch.randint(2, (threads,)).int()
    out = torch.zeros(threads, 3, dtype=torch.int32)
    arguments = dict(value=value, out=out, threads=threads, live=live)
    emulate_call(unit_kernels(), "block_vote", lambda: Call(out, arguments, scratch=("out",)))
    voters = value[:live]
    assert (out[:live] == torch.tensor([voters.sum(), voters.any(), voters.all()])).all()


def fragment(matrix, in_group, group, values):
    """[32, values]: what the lanes hold of a matrix, by CuTe's layouts (mma_traits_sm80.hpp of CUTLASS): the stride of
    lane % 4, of lane // 4, and of each bit of the value's number, over the column-major matrix.
    """
    numbers = torch.arange(2 ** len(values))
    offset = sum((numbers >> i & 1) * stride for i, stride in enumerate(values))
    index = (LANES % 4 * in_group + LANES // 4 * group)[:, None] + offset
    return matrix.T.reshape(-1)[index]  # column-major: the columns one after the other


A_LAYOUT, B_LAYOUT, C_LAYOUT = (32, 1, (16, 8, 128)), (16, 1, (8, 64)), (32, 1, (16, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_is_a_matrix_product(dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    registers = dict(
        a=fragment(a, *A_LAYOUT).contiguous().view(torch.int32),
        b=fragment(b.T, *B_LAYOUT).contiguous().view(torch.int32),  # CuTe counts B as (columns, depth)
        c=fragment(c, *C_LAYOUT),
    )
    out = run("mma", (32, 4), torch.float32, dtype=dtype, **registers)
    expected = (a.double() @ b.double() + c).float()
    assert torch.equal(out, fragment(expected, *C_LAYOUT))


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(transposed):
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8)).short()
    out = run("load_matrices", (32, 4), matrices=matrices.view(torch.int32), transposed=transposed)
    held = matrices.mT.contiguous() if transposed else matrices
    # Word w of row r of matrix i belongs to lane 4 r + w (TVM's documentation, "ldmatrix / stmatrix").
    assert torch.equal(out, held.view(torch.int32).permute(1, 2, 0).reshape(32, 4))


def test_rounding_to_half_precision():
    halves = torch.arange(-(2**15), 2**15).short()
    numbers = [halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()]
    numbers += [torch.nextafter(number, torch.tensor(sign * float("inf"))) for number in numbers for sign in (-1, 1)]
    numbers += [(number[:-1] + number[1:]) / 2 for number in numbers[:2]]  # ties
    numbers = torch.cat([*numbers, torch.randn(1000) * torch.logspace(-45, 38, 1000)])
    numbers = numbers[~numbers.isnan()]
    bits, out = (torch.empty(len(numbers), 2, dtype=dtype) for dtype in (torch.int32, torch.float32))
    arguments = dict(value=numbers, bits=bits, out=out, count=len(numbers))
    emulate_call(unit_kernels(), "round", lambda: Call(out, arguments))
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        expected = numbers.to(dtype)
        assert torch.equal(bits[:, i].short(), expected.view(torch.int16))
        assert torch.equal(out[:, i], expected.float())


@pytest.mark.parametrize("count", [1, 256, 1000])
def test_two_kernels_and_a_workspace(count):
    value = torch.randn(count)
    out = run("sum", 1, torch.float32, value=value, count=count, workspace="sum_workspace")
    torch.testing.assert_close(out, value.sum(0, keepdim=True), atol=1e-4, rtol=0)


def test_a_workspace_has_no_byte_more_than_it_says():
    text = (MACHINE / "unit_kernels.cu").read_text().replace("(args.count + 255) / 256 * 256 / kWarp", "1")
    library = unit_kernels().with_changes({"unit_kernels.cu": text})
    with pytest.raises(EmulatorError, match="write of 4 bytes: out of bounds .* after the end of workspace"):
        run("sum", 1, torch.float32, library, value=torch.randn(33), count=33, workspace="sum_workspace")


def test_a_changed_header_reaches_the_files_that_include_it():
    text = (KERNELS / "common.cuh").read_text()
    text = text.replace("x += __shfl_xor_sync(kAllLanes, x, offset)", "x += __shfl_xor_sync(kAllLanes, x, offset ^ 1)")
    library, value = unit_kernels().with_changes({"common.cuh": text}), torch.randn(64)
    assert not run("sum", 1, torch.float32, library, value=value, count=64, workspace="sum_workspace").allclose(
        value.sum()
    )


MISTAKES = {
    "a read after the end": "read of 4 bytes: out of bounds .* after the end of in",
    "a read before the begin": "read of 4 bytes: out of bounds .4 bytes before in",
    "a read in a gap": r"read of 4 bytes: out of bounds .in \+ 128",
    "a copy after the end": "read of 4 bytes: out of bounds .0 bytes after the end of in",
    "a write to an input": "write of 4 bytes: an input is not to be written",
    "a read of unwritten output": r"read of 4 bytes: nothing has been written there .out \+ ",
    "a read after shared memory": r"read of 4 bytes: (out of bounds|nothing has been written)",
    "a read of unwritten shared memory": r"nothing has been written there .shared memory \+ ",
    "a race of writes": r"race: write of shared memory \+ 0, and no barrier since thread \d+'s write",
    "a race of read and write": r"race: (read|write) of .*, and no barrier since thread \d+'s (write|read)",
    "a race of lanes": "race: (read|write) of .*, and no barrier since",
    "a misaligned vector": "not a multiple of 8|not aligned",
    "a misaligned copy": "copy_16_async, from: .* is not a multiple of 16",
    "a copy touched early": "an asynchronous copy is still under way there",
    "a copy without a barrier": "race: read of|nothing has been written there",
    "a copy left behind": "exits with 1 asynchronous copies under way",
    "a lane left out": "mask 7fffffff of a warp instruction leaves out its own lane",
    "a lane that reads one left out": r"__shfl_sync: lane \d+ reads lane 16, which does not take part",
    "two instructions": "where thread .* of the same lanes is at __",
    "an exited lane": "load_matrices: lane 31 of warp . has exited",
    "two barriers": "__syncthreads.* where others are at __syncthreads",
    "a wait for ever": r"nobody can go on: threads 0..15 wait at __shfl_xor_sync .mask ffffffff., 16..63 wait",
    "a loop without end": "1000001 steps and no end",
    "a wild pointer": "access to 0x1000, which is no device memory",
    "a stack without end": "the stack of 128 KiB is full",
    "a division by zero": "division of an integer by zero",
    "a trap": "__trap",
    "the order of blocks": "the result hangs on the order",
}


def make_mistake(kind, threads=64):
    values = torch.arange(threads).int()
    if kind == MISTAKE_IN_GAP:
        threads, values = 32, torch.arange(80).int().view(2, 40)[:, :32]
    return run("mistake", threads, kind=kind, threads=threads, device=dict(most_steps=1_000_000), **{"in": values})


MISTAKE_IN_GAP = 1 + list(MISTAKES).index("a read in a gap")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    with pytest.raises(EmulatorError, match=MISTAKES[mistake]) as raised:
        make_mistake(1 + list(MISTAKES).index(mistake))
    if mistake not in ("the order of blocks", "a copy left behind"):  # no line of the source does these
        assert "[mistake_kernel, block " in str(raised.value)
        assert "unit_kernels.cu:" in str(raised.value)


def test_no_mistake_and_the_machine_goes_on():
    with pytest.raises(EmulatorError):
        make_mistake(1)
    assert torch.equal(make_mistake(0), torch.arange(64).int().roll(-1))


def test_uninitialised_locals_are_not_zero():
    assert (make_mistake(1 + len(MISTAKES)) == 0).all()


def product(a, b, b_transposed, library=None, **device):
    columns = b.shape[0] if b_transposed else b.shape[1]
    sizes = dict(rows=a.shape[0], columns=columns, depth=a.shape[1], b_transposed=b_transposed, dtype=a.dtype)
    strides = dict(a_stride=a.stride(0), b_stride=b.stride(0), out_stride=columns)
    return run("matmul", (a.shape[0], columns), torch.float32, library, device, a=a, b=b, **sizes, **strides)


def assert_right_product(rows, columns, depth, dtype, b_transposed, library=None):
    a = torch.randn(rows, depth + 8).to(dtype)[:, :depth]
    b = torch.randn(columns, depth + 8).to(dtype)[:, :depth]
    b = b if b_transposed else b.T.contiguous()
    expected = a.double() @ (b.T if b_transposed else b).double()
    out = product(a, b, b_transposed, library)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_of_matrices(dtype, b_transposed):
    for sizes in ((1, 8, 8), (32, 32, 32), (33, 40, 72), (7, 72, 128)):
        assert_right_product(*sizes, dtype, b_transposed)


def test_shared_memory_is_limited_as_on_the_device():
    """By a faulty kernel: two stages of 50 KiB each want cudaFuncSetAttribute, which grants 64 KiB on Turing."""
    text = (MACHINE / "matmul.cu").read_text().replace("2 * kStage * sizeof(T)", "100 * 1024")
    library = unit_kernels().with_changes({"matmul.cu": text})
    a = torch.randn(8, 8).half()
    product(a, a, True, library, capability=80)
    with pytest.raises(EmulatorError, match="matmul: cudaErrorInvalidValue"):
        product(a, a, True, library, capability=75)
