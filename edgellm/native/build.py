"""What the installed llama.cpp is and can do, asked in a process of its own: `python -m edgellm.native.build`.

A library built for another CPU ends the process that loads it with an illegal instruction, which must not be ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from edgellm.errors import EdgeLLMError


@dataclass(frozen=True)
class Build:
    """features: what it was compiled with for the CPU, and its own options, by ggml's names (AVX2, REPACK …).

    amx_is_broken: its code for AMX would crash, so edgellm does without (see `native.amx`).
    """

    python_package: str
    llama_cpp: str
    library: str
    features: tuple[str, ...]
    gpu_offload: bool
    mmap: bool
    mlock: bool
    amx_is_broken: bool


def find_build(timeout: float = 60) -> Build:
    """Ask a child process. EdgeLLMError, with what is wrong, where llama.cpp can't be loaded there."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "edgellm.native.build"],
            capture_output=True,
            timeout=timeout,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as exc:
        raise EdgeLLMError(f"llama.cpp could not be tried: {exc}") from exc
    if child.returncode != 0:
        lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EdgeLLMError(lines[-1] if lines and child.returncode > 0 else _ending(child.returncode))
    found = json.loads(child.stdout)
    return Build(**{**found, "features": tuple(found["features"])})


def _ending(code: int) -> str:
    """Of a process that didn't end itself; Windows' codes are those of ntstatus.h."""
    illegal = "an illegal instruction"
    how = {-4: illegal, 0xC000001D: illegal, -6: "an abort", -11: "a segmentation fault"}.get(code, f"code {code}")
    return f"loading llama.cpp ended its process with {how}; it may be built for another CPU"


def read_features(system_info: str) -> tuple[str, ...]:
    """The names that are on in llama.cpp's line, such as `CPU : AVX = 1 | AVX2 = 1 | REPACK = 1 | `."""
    parts = (part.rpartition(":")[2].partition("=") for part in system_info.split("|"))
    return tuple(name.strip() for name, sign, value in parts if sign and value.strip() not in ("", "0"))


def _this_build() -> Build:
    from edgellm.native import amx, library, shared

    lib = library.load()
    return Build(
        python_package=library.version(),
        llama_cpp=_text(lib, "llama_version"),
        library=str(lib.__file__),
        features=read_features(lib.llama_print_system_info().decode("utf-8", "replace")),
        gpu_offload=bool(lib.llama_supports_gpu_offload()),
        mmap=bool(lib.llama_supports_mmap()),
        mlock=bool(lib.llama_supports_mlock()),
        amx_is_broken=amx.is_miscompiled(shared.folder(lib)),
    )


def _text(lib: Any, name: str) -> str:
    function = getattr(lib, name, None)
    return function().decode("utf-8", "replace") if function else ""


def _main() -> None:
    try:
        print(json.dumps(asdict(_this_build())))
    except EdgeLLMError as exc:
        raise SystemExit(str(exc)) from exc


if __name__ == "__main__":
    _main()
