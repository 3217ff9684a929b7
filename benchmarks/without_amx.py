"""Run a command on a processor with AMX as if it had none, so that both can be measured on one machine.

    python benchmarks/without_amx.py python benchmarks/full_size.py --peers openvino --json FILE

On Linux a process asks for AMX's registers by arch_prctl. A filter refuses that to the command and its children, so
that gafext, PyTorch and OpenVINO alike fall back to what they have for AVX-512. Nothing else changes.
"""

import ctypes
import os
import struct
import sys

_ARCH_PRCTL, _REQUEST_STATE = 158, 0x1023  # system call on x86-64; ARCH_REQ_XCOMP_PERM
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of the filter (linux/bpf_common.h)
_REFUSE, _ALLOW = 0x00050001, 0x7FFF0000  # SECCOMP_RET_ERRNO with EPERM; SECCOMP_RET_ALLOW
_FILTER = (
    (_LOAD, 0, 0, 0),  # the call's number
    (_EQUAL, 0, 3, _ARCH_PRCTL),
    (_LOAD, 0, 0, 16),  # its first argument
    (_EQUAL, 0, 1, _REQUEST_STATE),
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _ALLOW),
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse_amx() -> None:
    """Refuse AMX to this process, for good, and to the programs that it starts or becomes."""
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _FILTER))
    program = _Program(len(_FILTER), ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(seccomp, by_filter, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    refuse_amx()
    os.execvp(sys.argv[1], sys.argv[1:])
