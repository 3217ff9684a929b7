"""Runs the CUDA kernels of csrc/cuda on the processor: the very sources, compiled by g++ over tests/cuda_emulator.

    out = emulate("flash_attention", query, key, value, is_causal=True)

runs the kernel once in each of `ORDERS` and raises EmulatorError with kernel, block, thread and source line for
  - an access outside of a tensor (to the byte, gaps between rows included) or of shared memory, or not aligned,
  - a read of what nobody has written, a write to an input, an element of the output that stays unwritten,
  - a race in shared memory: two accesses by different threads, one of them a write, and no barrier in between,
  - an asynchronous copy that is used before copies_wait,
  - lanes that don't meet at an instruction of their warp, and threads that wait for ever,
  - results that hang on the order of threads and blocks, or on what memory held before.

A new kernel needs
  1. nothing for its .cu file, its argument struct and its prototype: they are found in csrc/cuda and csrc/ops/*.h,
     where the prototype is `cudaError_t NAME_cuda(const SomeArgs& args, cudaStream_t stream);`,
  2. a function here that fills in the arguments as csrc/ops/*.cpp do: see `flash_attention` below. Tensors go to
     pointer fields: those to const are inputs, the others outputs. For a workspace give the name of the function in
     csrc/ops that tells its bytes: `int64_t f(const SomeArgs& args)`, or the same by reference and with an error,
  3. for a PTX instruction without an emulation: its twin in tests/cuda_emulator/include/emulated_device.h.
emulate(..., capability=90, multiprocessors=3) is what the kernel's host code sees of the device.
"""

import ctypes
import dataclasses
import functools
import re
import subprocess

import torch
from emulator_build import KERNELS, ROOT, EmulatorError, cache_folder, hash_of, link, once

NAN, LARGE = 0xFFFFFFFF, 0x7BFF7BFF  # LARGE: finite in each dtype, 65504 in float16
_FORWARD, _REVERSE, _RANDOM = range(3)


class Options(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_int),
        ("warps", ctypes.c_int),
        ("lanes", ctypes.c_int),
        ("warp_by_warp", ctypes.c_int),
        ("seed", ctypes.c_uint32),
        ("poison", ctypes.c_uint32),
        ("capability", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("most_steps", ctypes.c_uint64),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("message", ctypes.c_char * 1024),
        ("kernel", ctypes.c_void_p),
        ("frames", ctypes.c_void_p * 32),
        ("frame_count", ctypes.c_int),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_int),
    )


ORDERS = {
    "forward": dict(blocks=_FORWARD, warps=_FORWARD, lanes=_FORWARD, warp_by_warp=1, poison=NAN),
    "reverse": dict(blocks=_REVERSE, warps=_REVERSE, lanes=_REVERSE, warp_by_warp=1, poison=LARGE),
    "random warps": dict(blocks=_RANDOM, warps=_RANDOM, lanes=_FORWARD, warp_by_warp=1, seed=1, poison=LARGE ^ 1 << 31),
    "random lanes": dict(blocks=_RANDOM, warps=_RANDOM, lanes=_RANDOM, warp_by_warp=0, seed=2, poison=0),
}


# The arguments of the operations, as csrc/ops/*.cpp fill them in.


@dataclasses.dataclass
class Call:
    out: torch.Tensor
    arguments: dict  # fields of the struct: tensors, numbers, tuples for strides, a function's name for a workspace
    scratch: tuple[str, ...] = ()  # outputs that need not be written whole


def _empty_heads(query):
    batch, heads, length, head_dim = query.shape
    return torch.empty(batch, length, heads, head_dim, dtype=query.dtype).transpose(1, 2)


def _attention(query, key, value, scale, **more):
    out = _empty_heads(query)
    tensors = dict(query=query, key=key, value=value, out=out)
    return Call(
        out,
        tensors
        | {f"{name}_stride": tensor.stride()[:3] for name, tensor in tensors.items()}
        | dict(heads=query.shape[1], head_dim=query.shape[3], dtype=query.dtype)
        | dict(scale=query.shape[3] ** -0.5 if scale is None else scale)
        | more,
    )


def flash_attention(query, key, value, *, scale=None, is_causal=False):
    sizes = dict(batch=query.shape[0], query_length=query.shape[2], key_length=key.shape[2])
    workspace = "flash_attention_cuda_workspace"
    return _attention(query, key, value, scale, is_causal=is_causal, workspace=workspace, **sizes)


def cross_view_attention(query, key, value, num_views, *, scale=None):
    sizes = dict(batch=query.shape[0] // num_views, views=num_views, length=query.shape[2])
    return _attention(query, key, value, scale, **sizes)


def cross_view_attention_backward(grad, query, key, value, num_views, *, scale=None):
    """The three gradients, [3, batch * views, heads, length, head_dim]."""
    batch, heads, length, head_dim = query.shape
    out = torch.empty(3, batch, length, heads, head_dim, dtype=query.dtype).transpose(2, 3)
    inputs = dict(grad=grad, query=query, key=key, value=value)
    strides = {f"{name}_stride": tensor.stride()[:3] for name, tensor in inputs.items()}
    return Call(
        out,
        inputs
        | dict(zip(("grad_query", "grad_key", "grad_value"), out, strict=True))
        | strides
        | dict(out_stride=out.stride()[1:4], batch=batch // num_views, views=num_views, heads=heads, length=length)
        | dict(head_dim=head_dim, scale=head_dim**-0.5 if scale is None else scale, dtype=query.dtype),
    )


def geglu_gate(projected):
    """`projected` [rows, 2 * inner], with any stride from row to row."""
    rows, inner = projected.shape[0], projected.shape[1] // 2
    out = torch.empty(rows, inner, dtype=projected.dtype)
    sizes = dict(rows=rows, inner=inner, projected_stride=projected.stride(0), dtype=projected.dtype)
    return Call(out, dict(projected=projected, out=out, **sizes))


def geglu_gate_backward(grad, projected):
    """`grad` [rows, inner] and `projected` [rows, 2 * inner], with any stride from row to row."""
    rows, inner = grad.shape
    out = torch.empty(rows, 2 * inner, dtype=grad.dtype)
    sizes = dict(rows=rows, inner=inner, projected_stride=projected.stride(0), grad_stride=grad.stride(0))
    return Call(out, dict(grad=grad, projected=projected, out=out, dtype=grad.dtype, **sizes))


def group_norm_silu(x, num_groups, weight=None, bias=None, eps=1e-5, *, silu=True):
    """`x` [batch, channels, positions], with channels next to each other."""
    batch, channels, positions = x.shape
    out = torch.empty(batch, positions, channels, dtype=x.dtype).transpose(1, 2)
    sizes = dict(batch=batch, channels=channels, positions=positions, groups=num_groups)
    strides = dict(image_stride=x.stride(0), position_stride=x.stride(2))
    return Call(
        out,
        dict(x=x, weight=weight, bias=bias, out=out, scratch="group_norm_silu_scratch", eps=eps, silu=silu)
        | dict(dtype=x.dtype)
        | sizes
        | strides,
    )


_FORWARD_PASSES = (flash_attention, cross_view_attention, geglu_gate, group_norm_silu)
OPERATIONS = {f.__name__: f for f in (*_FORWARD_PASSES, cross_view_attention_backward, geglu_gate_backward)}


def emulate(operation, *args, library=None, orders=ORDERS, capability=80, multiprocessors=3, **kwargs):
    """The result of the CUDA kernel; the same in every order, or EmulatorError."""
    device = dict(capability=capability, multiprocessors=multiprocessors)
    return emulate_call(
        library or kernels(), operation, lambda: OPERATIONS[operation](*args, **kwargs), orders, **device
    )


def emulate_call(library, operation, make_call, orders=ORDERS, **device):
    """The same for a library of one's own; make_call() gives a Call with outputs of its own."""
    device = dict(capability=80, multiprocessors=3, most_steps=2_000_000_000) | device
    results = {
        order: library.run(operation, make_call(), Options(**options, **device), order)
        for order, options in orders.items()
    }
    (first, expected), *others = results.items()
    for order, result in others:
        different = (_bits(result) != _bits(expected)).nonzero()
        if len(different):
            where, count = tuple(different[0].tolist()), len(different)
            raise EmulatorError(
                f"{operation}: the result hangs on the order of threads or on old memory: {count} elements differ "
                f"between the orders {first!r} and {order!r}, first {where}: {expected[where]} and {result[where]}"
            )
    return expected


def _bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


# The library.


@functools.cache
def kernels():
    """Every kernel of csrc/cuda."""
    headers = [ROOT / "csrc/types.h", *sorted((ROOT / "csrc/ops").glob("*.h"))]
    return Library(sorted(KERNELS.glob("*.cu")), headers)


class Library:
    """Kernels compiled for the processor.

    sources: .cu files. headers: the files with their argument structs and prototypes.
    """

    def __init__(self, sources, headers):
        self.sources, self.headers = {source.name: source for source in sources}, headers
        text = re.sub(r"//.*", "", "\n".join(header.read_text() for header in headers))
        code = "\n".join(source.read_text() for source in sources)
        self.structs = _structs(text)
        self._prototypes = [
            (name, struct, more)
            for name, struct, more in re.findall(
                r"(?:cudaError_t|int64_t) (\w+)\(const (\w+)& args(, cudaStream_t stream|, int64_t& bytes|)\);",
                re.sub(r"\s+", " ", text),
            )
            if f"{name}(" in code
        ]
        self._struct_of = {name: struct for name, struct, _ in self._prototypes}
        self.path = link(sources, self._entries())
        self._dll = ctypes.PyDLL(str(self.path))  # that keeps Python's lock: the machine is one for all threads
        for name in ("emulator_place", "emulator_error_name", "emulator_fault"):
            getattr(self._dll, name).restype = ctypes.c_void_p
        self._dll.emulator_error_name.restype = ctypes.c_char_p
        for struct in set(self._struct_of.values()):
            expected, found = self._dll[f"size_of_{struct}"](), ctypes.sizeof(self.structs[struct])
            assert expected == found, f"{struct}: {expected} bytes in C++, {found} as read from the headers"

    def with_changes(self, texts):
        """The same with other texts for some of its files, .cu or .cuh, which are searched beside the sources."""
        folders = {source.parent for source in self.sources.values()}
        files = {path.name: path for folder in folders for path in folder.glob("*.cu*")}
        changed = set(texts)
        while more := _includers(files, changed) - changed:
            changed |= more
        folder = cache_folder() / hash_of(*texts, *texts.values())
        folder.mkdir(exist_ok=True)
        for name in changed:
            text = texts.get(name) or files[name].read_text()
            once(folder / name, lambda out, text=text: out.write_text(text))
        sources = [folder / name if name in changed else source for name, source in self.sources.items()]
        return Library(sources, self.headers)

    def _entries(self):
        """C functions, whose names ctypes can find, for the prototypes of the headers."""
        lines = [
            *(f'#include "{header}"' for header in self.headers),
            '#define EXPORT extern "C" __attribute__((visibility("default")))',
        ]
        for name, struct, more in self._prototypes:
            argument = {"": "", ", cudaStream_t stream": ", nullptr", ", int64_t& bytes": ", *bytes"}[more]
            lines += [
                f"EXPORT int64_t entry_{name}(const gafext::{struct}& args, int64_t* bytes) {{",
                f"  return gafext::{name}(args{argument});",
                "}",
            ]
        for struct in sorted(set(self._struct_of.values())):
            lines.append(f"EXPORT int size_of_{struct}() {{ return sizeof(gafext::{struct}); }}")
        return "\n".join(lines) + "\n"

    def _enter(self, name, struct):
        """What the function returns, and what it says of bytes."""
        entry, number = self._dll[f"entry_{name}"], ctypes.c_int64()
        entry.restype = ctypes.c_int64
        return entry(ctypes.byref(struct), ctypes.byref(number)), number.value

    def _workspace(self, function, struct):
        """A tensor of as many bytes as the function says."""
        result, number = self._enter(function, struct)
        by_reference = any(name == function and more for name, _, more in self._prototypes)
        if by_reference and result:
            raise EmulatorError(f"{function}: {self._dll.emulator_error_name(ctypes.c_int(result)).decode()}")
        return torch.empty((number if by_reference else result) // 2, dtype=torch.int16)

    def run(self, operation, call, options, order):
        """One run in one order."""
        self._dll.emulator_reset(ctypes.byref(options))
        function = operation if operation in self._struct_of else f"{operation}_cuda"
        struct = self.structs[self._struct_of[function]]()
        outputs = []
        # Workspaces last, whose sizes take the other fields.
        for name, kind in sorted(struct._fields_, key=lambda field: isinstance(call.arguments.get(field[0]), str)):
            value = call.arguments.get(name)
            if isinstance(value, str):
                value = self._workspace(value, struct)
            if isinstance(value, torch.Tensor):
                placed = _Placed(self._dll, name, value, not kind.is_const, options.poison)
                if not kind.is_const and not isinstance(call.arguments[name], str):
                    outputs.append(placed)
                is_absent = isinstance(call.arguments[name], str) and value.numel() == 0  # as csrc/ops has it
                value = None if is_absent else placed.address
            elif isinstance(value, torch.dtype):
                value = (torch.float32, torch.float16, torch.bfloat16).index(value)
            elif isinstance(value, tuple):
                value = kind(*value)
            elif name not in call.arguments:
                raise KeyError(f"{operation}: the emulator's arguments lack {name}")
            setattr(struct, name, value)
        error, _ = self._enter(function, struct)
        fault = self._dll.emulator_fault()
        if fault:
            raise EmulatorError(self._describe(operation, _Fault.from_address(fault), order))
        if error:
            raise EmulatorError(f"{operation}: {self._dll.emulator_error_name(ctypes.c_int(error)).decode()}")
        for placed in outputs:
            placed.fetch(operation, must_be_written=placed.name not in call.scratch)
        return call.out

    def _describe(self, operation, fault, order):
        lines = subprocess.run(["nm", "-C", self.path], capture_output=True, text=True).stdout.splitlines()
        base = ctypes.cast(self._dll.emulator_reset, ctypes.c_void_p).value
        base -= next(int(line.split()[0], 16) for line in lines if line.endswith(" T emulator_reset"))
        name = next((line.split(None, 2)[2] for line in lines if line.startswith(f"{fault.kernel - base:016x}")), "")
        name = name.replace("emulated_halves::Narrow<emulated_halves::Float16>", "__half")
        name = name.replace("emulated_halves::Narrow<emulated_halves::BFloat16>", "__nv_bfloat16")
        name = re.sub(r"\(anonymous namespace\)::|gafext::|cuda::|void |\(.*\)$", "", name)
        addresses = [f"{frame - base - 1:x}" for frame in fault.frames[: fault.frame_count] if frame > base]
        command = ["addr2line", "-i", "-e", self.path, *addresses]
        places = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        places = [place.split(" ")[0] for place in places if re.search(r"\.cuh?:", place)]
        where = ", ".join(re.sub(r".*/", "", place) for place in places[:3])
        block = tuple(fault.block)
        block = block[0] if block[1:] == (0, 0) else block
        return (
            f"{operation}: {fault.message.decode()} [{name}, block {block}, thread {fault.thread}, "
            f"order {order!r}, at {where}]"
        )


class _Placed:
    """A tensor in the emulated memory; what lies between its elements is out of bounds."""

    def __init__(self, dll, name, tensor, is_output, poison):
        self.dll, self.name, self.tensor = dll, name, tensor
        whole = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
        count = 1 + sum((n - 1) * stride for n, stride in zip(whole.shape, whole.stride(), strict=True))
        count = count if whole.numel() else 0
        self.memory = torch.full((count * tensor.element_size() // 2,), 0, dtype=torch.int16)
        self.memory[:] = (poison & 0xFFFF) - (poison & 0x8000) * 2 if is_output else -1  # -1: NaN in each dtype
        self.memory = self.memory.view(tensor.dtype)
        accessible = torch.zeros(count, dtype=torch.bool)
        if count:
            accessible.as_strided(whole.shape, whole.stride()).fill_(True)
            if not is_output:
                self.memory.as_strided(whole.shape, whole.stride()).copy_(whole)
        self.accessible = accessible.repeat_interleave(tensor.element_size())
        # PyTorch's CUDA memory is aligned at least so.
        residue = tensor.storage_offset() * tensor.element_size() % 512
        self.address = dll.emulator_place(
            name.encode(), *_pointers(self.memory, self.accessible), *_sizes(self.memory.nbytes, residue), is_output
        )
        if not self.address:
            raise EmulatorError(f"{name}: the emulator's memory is full")

    def fetch(self, operation, must_be_written):
        """Back to the tensor."""
        if not self.tensor.numel():
            return
        written = torch.empty_like(self.accessible)
        self.dll.emulator_fetch(
            ctypes.c_void_p(self.address), *_pointers(self.memory, written), *_sizes(self.memory.nbytes)
        )
        shape = self.tensor.shape, self.tensor.stride()
        self.tensor.copy_(self.memory.as_strided(*shape))
        missing = ~written.view(-1, self.tensor.element_size()).all(1).as_strided(*shape)
        if must_be_written and missing.any():
            where = tuple(missing.nonzero()[0].tolist())
            raise EmulatorError(
                f"{operation}: {int(missing.sum())} elements of {self.name} were never written, first {where}"
            )


def _pointers(*tensors):
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sizes(*numbers):
    return [ctypes.c_size_t(number) for number in numbers]


class _Input(ctypes.c_void_p):
    is_const = True


class _Output(ctypes.c_void_p):
    is_const = False


def _structs(text):
    """The structs of a header as ctypes has them."""
    kinds = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float, "bool": ctypes.c_bool}
    kinds["DType"] = ctypes.c_int
    for struct, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for const, kind, names in re.findall(r"(const )?(\w+)\s*([^;]*);", body):
            for name in names.split(","):
                pointer = _Input if const else _Output
                fields.append((name.strip(" *\n"), pointer if "*" in names else kinds[kind]))
        kinds[struct] = type(struct, (ctypes.Structure,), {"_fields_": fields})
    return kinds


def _includers(files, names):
    """Those of the files, {name: path}, that include one of the names."""
    lines = {f'#include "{name}"' for name in names}
    return {name for name, path in files.items() if lines & set(path.read_text().splitlines())}
