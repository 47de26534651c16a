"""Keeps ggml from the CPU's AMX unit where its code for it is miscompiled: the first product would end the process.

GCC drops most of the stores of a tile configuration before it is loaded (its bug 114098, llama.cpp's issue 20824).
The mend is in every release from 14 on. A build of another compiler, or of such a GCC, uses AMX as it should.

ggml asks Linux for AMX once in a process, when the list of the CPU's buffer types is first wanted, and does without
where Linux refuses. Linux does so (ENOSPC) while some thread has an alternate signal stack too small for the state of
AMX (Documentation/arch/x86/elf_auxvec.rst, `validate_sigaltstack`). So the list is made under such a stack, and
whatever else in the process uses these libraries is safe too.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgellm.native import cpu_device, shared

_AMX = "AMX"  # ggml's name of the buffer type
_CODE = b"ggml_backend_amx_mul_mat"  # a symbol of builds that can use it
_GCC = re.compile(rb"GCC: \([^)]*\) (\d+)\.\d")  # what GCC writes into the section .comment
_CLANG = b"clang version ", b"libomp"  # llvm-strip takes the first away; the second is LLVM's OpenMP
_MENDED = 14
_TOO_SMALL = 8192  # bytes; the state of AMX alone is as many


class _SignalStack(ctypes.Structure):
    """signal.h's stack_t."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def keep_out(bindings: Any) -> bool:
    """Make ggml's list of buffer types, without AMX where that crashes. bindings: with their backend initialised.

    Returns whether the buffer types beside plain memory may be used: not where AMX crashes and is among them all the
    same, because something else in this process asked Linux for it before.
    """
    if not is_miscompiled(shared.folder(bindings)):
        return True
    with _small_signal_stack(), _without_stderr():
        return _AMX not in cpu_device.extra_buffer_types(bindings, cpu_device.find(bindings))


def is_miscompiled(folder: Path) -> bool:
    """Whether the CPU's code in this folder has AMX in it and was made by a GCC that breaks it, or doesn't say."""
    if sys.platform != "linux":
        return False
    return any(_is_miscompiled(path) for path in {path.resolve() for path in folder.glob("libggml-cpu*.so*")})


def _is_miscompiled(path: Path) -> bool:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_CODE) < 0:
            return False
        if any(data.find(sign) >= 0 for sign in _CLANG):  # GCC's name may stand there too, from the C library's parts
            return False
        return min((int(major) for major in _GCC.findall(data)), default=0) < _MENDED


@contextlib.contextmanager
def _small_signal_stack() -> Iterator[None]:
    """This thread's signals have a stack too small for AMX meanwhile, unless one of them is being handled on it."""
    sigaltstack = ctypes.CDLL(None).sigaltstack
    memory = ctypes.create_string_buffer(_TOO_SMALL)
    before = _SignalStack()
    sigaltstack(ctypes.byref(_SignalStack(ctypes.addressof(memory), 0, _TOO_SMALL)), ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """ggml prints that it has no AMX, past every log callback."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a desktop app may have no stderr
            kept = os.dup(2)
            stack.callback(os.close, kept)
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            os.dup2(null, 2)
            stack.callback(os.dup2, kept, 2)
        yield
