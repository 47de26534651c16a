"""What this machine is: its CPU and what it can do, its limits, and who else is using it. None = it doesn't say."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgellm.config import physical_cpu_count

# ggml's name of a feature → what the system calls it: flags of Linux, sysctls of macOS, numbers of winnt.h's PF_*
_LINUX = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "AVX": "avx",
    "AVX_VNNI": "avx_vnni",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "BMI2": "bmi2",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "NEON": "asimd",
    "FP16_VA": "asimdhp",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
}
_MACOS = {
    "NEON": "hw.optional.AdvSIMD",
    "FP16_VA": "hw.optional.arm.FEAT_FP16",
    "DOTPROD": "hw.optional.arm.FEAT_DotProd",
    "MATMUL_INT8": "hw.optional.arm.FEAT_I8MM",
    "AVX2": "hw.optional.avx2_0",
    "AVX512": "hw.optional.avx512f",
}
_WINDOWS = {"SSE3": 13, "SSSE3": 36, "AVX": 39, "AVX2": 40, "AVX512": 41, "NEON": 19, "DOTPROD": 43}

_LOOK = 0.25  # seconds
_CPUINFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """n_usable: logical cores this process may use. cpu_quota: cores that its container may keep busy.

    busy_cores: that other programs keep busy just now. lockable: bytes that mlock may pin
    (None: all). address_space: bytes a process may map (None: all). translated: the interpreter is emulated (Rosetta).
    """

    system: str
    architecture: str
    cpu: str
    features: tuple[str, ...]
    n_logical: int
    n_physical: int | None
    n_usable: int
    cpu_quota: float | None
    busy_cores: float | None
    lockable: int | None
    address_space: int | None
    translated: bool


def find_machine() -> Machine:
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        cpu=_cpu_name(),
        features=_features(),
        n_logical=os.cpu_count() or 1,
        n_physical=_physical_cores(),
        n_usable=physical_cpu_count(),
        cpu_quota=_cpu_quota(),
        busy_cores=busy_cores(),
        lockable=_limit("RLIMIT_MEMLOCK"),
        address_space=_limit("RLIMIT_AS"),
        translated=sys.platform == "darwin" and _sysctl("sysctl.proc_translated") == 1,
    )


def busy_cores() -> float | None:
    """How many cores others keep busy, seen while this process sleeps; None where the system doesn't tell."""
    try:
        before, started = _busy_ticks(), time.perf_counter()
        time.sleep(_LOOK)
        ticks = _busy_ticks() - before
        return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - started)
    except (AttributeError, OSError, ValueError):
        return None


def _busy_ticks() -> int:
    """Of all cores since the start of the system: all but idle and waiting for disks (Linux's /proc/stat)."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = file.readline().split()
    return sum(map(int, fields[1:9])) - int(fields[4]) - int(fields[5])


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return sysctl_text("machdep.cpu.brand_string")
    fields = _cpuinfo()
    return fields.get("model name") or fields.get("cpu model") or platform.processor() or platform.machine()


def _features() -> tuple[str, ...]:
    if sys.platform == "darwin":
        return tuple(name for name, key in _MACOS.items() if _sysctl(key) == 1)
    if sys.platform == "win32":
        has = ctypes.windll.kernel32.IsProcessorFeaturePresent
        return tuple(name for name, number in _WINDOWS.items() if has(number))
    fields = _cpuinfo()
    flags = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    return tuple(name for name, flag in _LINUX.items() if flag in flags)


def _cpuinfo() -> Mapping[str, str]:
    """Of the first core."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    return fields


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        return _sysctl("hw.physicalcpu")
    cores = set()
    for siblings in _CPUS.glob("cpu[0-9]*/topology/thread_siblings_list"):
        with suppress(OSError):
            cores.add(siblings.read_text().strip())
    return len(cores) or None


def _cpu_quota() -> float | None:
    """Of the control group's root, as a container sees it: microseconds of each period."""
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def _sysctl(name: str) -> int | None:
    """A number of macOS's; None where it has none of that name."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else value.value


def sysctl_text(name: str) -> str:
    """A text of macOS's; "" where it has none of that name."""
    buffer = ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(buffer))
    ctypes.CDLL(None).sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0)
    return buffer.value.decode("utf-8", "replace")
