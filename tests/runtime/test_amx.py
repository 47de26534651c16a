"""A llama.cpp whose code for AMX is miscompiled must run without AMX, and a sound one with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgellm.native import amx, cpu_device, library, shared

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for AMX")
_CODE = b"\0ggml_backend_amx_mul_mat\0"


def write_library(folder: Path, content: bytes, name: str = "libggml-cpu.so.0.25") -> Path:
    (folder / name).write_bytes(b"\x7fELF" + bytes(5000) + content + bytes(300))
    return folder


@LINUX
@pytest.mark.parametrize(
    ("content", "is_broken"),
    [
        (_CODE + b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0", True),
        (_CODE + b"GCC: (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0\0", True),
        (_CODE + b"GCC: (GNU) 14.2.1 20240910\0", False),
        (_CODE + b"GCC: (GNU) 14.2.1\0" + b"GCC: (GNU) 12.3.0\0", True),  # parts of it may come from the older one
        (_CODE + b"Debian clang version 16.0.6\0", False),
        (_CODE + b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0Debian clang version 16.0.6\0", False),
        (_CODE + b"libomp.so.5\0", False),
        (_CODE + b"libgomp.so.1\0", True),
        (_CODE, True),  # it doesn't say
        (b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0", False),  # no AMX in it
    ],
)
def test_the_compiler_that_breaks_it_is_known(tmp_path: Path, content: bytes, is_broken: bool) -> None:
    assert amx.is_miscompiled(write_library(tmp_path, content)) is is_broken


@LINUX
def test_one_broken_library_of_several_is_enough(tmp_path: Path) -> None:
    write_library(tmp_path, b"GCC: (GNU) 12.3.0\0", "libggml-cpu-haswell.so")
    assert not amx.is_miscompiled(tmp_path)
    write_library(tmp_path, _CODE + b"GCC: (GNU) 12.3.0\0", "libggml-cpu-sapphirerapids.so")
    assert amx.is_miscompiled(tmp_path)


def buffer_types() -> set[str]:
    bindings = library.load()
    return set(cpu_device.extra_buffer_types(bindings, cpu_device.find(bindings)))


def test_this_build_uses_amx_only_where_it_works() -> None:
    assert library.can_repack()
    assert not ("AMX" in buffer_types() and amx.is_miscompiled(shared.folder(library.load())))


def has_amx() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_int8" in cpuinfo.read_text()


_ASKED_BEFORE = """
import ctypes, sys
from edgellm import LoadParams, SamplingParams, load
if sys.argv[2] == "asked":
    assert ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
with load(sys.argv[1], LoadParams(n_ctx=128)) as model:
    print(model.complete("The sea is", SamplingParams(max_tokens=12, temperature=0)).token_ids)
from edgellm.native import library
print(library.can_repack())
"""


@LINUX
def test_where_another_asked_for_amx_before_weights_stay_as_they_are(model_path: Path) -> None:
    if not (has_amx() and amx.is_miscompiled(shared.folder(library.load()))):
        pytest.skip("this CPU has no AMX, or this build's code for it works")
    said = {}
    for when in ("never", "asked"):
        result = subprocess.run(
            [sys.executable, "-c", _ASKED_BEFORE, model_path, when], capture_output=True, timeout=120, check=False
        )
        assert (result.returncode, result.stderr) == (0, b"")
        said[when] = result.stdout.decode().split("\n")
    assert (said["never"][1], said["asked"][1]) == ("True", "False")
    assert said["asked"][0].startswith("[")


_ASKING = """
import ctypes, os
from edgellm.native import amx

def signal_stack():
    stack = amx._SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack.ss_sp, stack.ss_flags, stack.ss_size

before, n_files = signal_stack(), len(os.listdir("/proc/self/fd"))
with amx._small_signal_stack(), amx._without_stderr():
    assert signal_stack()[2] == amx._TOO_SMALL
    os.write(2, b"AMX is not ready to be used!\\n")
assert signal_stack() == before
assert len(os.listdir("/proc/self/fd")) == n_files
os.write(2, b"heard")
"""


@LINUX
def test_asking_leaves_signals_and_stderr_as_they_were() -> None:
    """In a process of its own: where torch asked for AMX, Linux takes no signal stack that small."""
    result = subprocess.run([sys.executable, "-c", _ASKING], capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, b"heard")


_NO_STDERR = """
import os
os.close(2)
from edgellm.native import library
assert library.can_repack()
os.write(1, b"loaded")
"""


def test_a_program_without_stderr_loads_it_too() -> None:
    result = subprocess.run([sys.executable, "-c", _NO_STDERR], stdout=subprocess.PIPE, timeout=60, check=True)
    assert result.stdout == b"loaded"
