"""`edgellm doctor`: this machine's facts as the system tells them, made-up ones judged, broken installs for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellm.cli.doctor import facts, lines
from edgellm.config import total_memory
from edgellm.engine import doctor, machine
from edgellm.engine.doctor import Advice, Found, advise, examine
from edgellm.engine.machine import Machine, find_machine
from edgellm.engine.memory import Memory
from edgellm.errors import EdgeLLMError
from edgellm.native import build
from edgellm.native.build import Build, find_build, read_features
from tests.runtime.test_cli import EDGELLM

GB = 10**9
WELL = Found(
    python="CPython 3.11.7, python",
    missing=(),
    machine=Machine(
        system="Linux 6.1",
        architecture="x86_64",
        cpu="Some CPU",
        features=("AVX", "AVX2"),
        n_logical=8,
        n_physical=4,
        n_usable=8,
        cpu_quota=None,
        busy_cores=0.1,
        lockable=None,
        address_space=None,
        translated=False,
    ),
    memory=Memory(8 * GB, 16 * GB),
    memory_of_machine=16 * GB,
    build=Build("0.3.36", "0.5", "llama_cpp.py", ("AVX", "AVX2", "REPACK"), False, True, True, False),
    build_problem="",
    default_model=Path("model.gguf"),
    model_problem="",
    default_is_tuned=True,
    n_tuned=1,
    folders=(),
)


def about(**changes: Any) -> Found:
    return replace(WELL, machine=replace(WELL.machine, **changes))


def broken_amx(*features: str) -> Found:
    build = replace(WELL.build, amx_is_broken=True, features=features)
    return replace(about(features=features), build=build)


def test_nothing_is_said_where_all_is_well() -> None:
    assert advise(WELL) == []
    assert advise(broken_amx()) == []  # on a CPU without AMX
    assert list(lines([])) == ["All is well."]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (about(features=("AVX", "AVX2", "AVX512")), "this CPU has AVX512, which llama.cpp was built without"),
        (broken_amx("AMX_INT8"), "built by a GCC that breaks its code for AMX, .* CC=clang CXX=clang"),
        (about(cpu_quota=1.5), "may use 1.5 cores of 8, .* use --threads 1 "),
        (about(busy_cores=3.0), r"other programs keep 3\.0 of 8 cores busy"),
        (about(address_space=4 * GB), r"may map 4\.0 GB only"),
        (about(translated=True), "made for Intel and emulated"),
        (about(system="Darwin 23", architecture="arm64", features=()), "without Metal"),
        (replace(WELL, memory_of_machine=64 * GB), "may use 16.0 of the machine's 64.0 GB"),
        (replace(WELL, default_model=None, default_is_tuned=False), r"pip install \"edgellm\[demo\]\""),
        (replace(WELL, default_is_tuned=False), "`edgellm tune MODEL`"),
    ],
)
def test_what_is_slow_is_a_line_that_says_what_to_do(found: Found, said: str) -> None:
    (advice,) = advise(found)
    assert re.search(said, advice.text)
    assert not advice.fatal
    assert "\n" not in advice.text
    assert list(lines([advice])) == [f"note: {advice.text}"]


def test_too_little_may_be_pinned_for_the_default_model(model_path: Path) -> None:
    model = replace(WELL, default_model=model_path)
    assert advise(model) == []
    (advice,) = advise(replace(model, machine=replace(WELL.machine, lockable=8 << 20)))
    assert "only 8 MB may be pinned" in advice.text
    assert advise(replace(model, machine=replace(WELL.machine, lockable=GB))) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (replace(WELL, build=None, build_problem="an abort"), "llama.cpp doesn't work: an abort; .*pip install"),
        (replace(WELL, missing=("jinja2", "rich")), "packages are missing: pip install jinja2 rich"),
        (replace(WELL, model_problem="it broke"), "the default model doesn't run: it broke"),
    ],
)
def test_what_keeps_edgellm_from_working_is_fatal_and_first(found: Found, said: str) -> None:
    first, *others = advise(replace(found, default_is_tuned=False))
    assert first.fatal
    assert re.search(said, first.text)
    assert not any(one.fatal for one in others)
    assert next(iter(lines([first]))).startswith("BROKEN: ")


def test_facts_are_complete_even_where_nothing_is_known() -> None:
    nothing = about(features=(), n_physical=None, busy_cores=None, lockable=None)
    known = dict(facts(replace(nothing, build=None, default_model=None, default_is_tuned=False)))
    assert known["llama.cpp"] == "doesn't work"
    assert known["it has"] == "unknown"
    assert known["default model"] == "not installed"
    assert "load" not in known


def test_features_are_read_from_llama_cpps_line() -> None:
    line = "CPU : AVX = 1 | AVX2 = 1 | AVX512 = 0 | REPACK = 1 | Metal : EMBED_LIBRARY = 1 | "
    assert read_features(line) == ("AVX", "AVX2", "REPACK", "EMBED_LIBRARY")
    assert read_features("") == ()


def test_the_build_that_is_here() -> None:
    found = find_build()
    assert found.python_package.startswith("0.3.")
    assert found.llama_cpp
    assert found.mmap
    assert "REPACK" in found.features
    assert set(found.features) & {"AVX2", "NEON", "SSE3"}
    assert not [name for name in found.features if name in machine._LINUX and name not in find_machine().features]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys")
def test_this_machine_as_linux_tells() -> None:
    found = find_machine()
    assert found.cpu in Path("/proc/cpuinfo").read_text()
    assert found.n_usable == len(os.sched_getaffinity(0)) <= found.n_logical
    assert found.busy_cores is not None
    assert examine_memory().total <= total_memory()


def examine_memory() -> Memory:
    return doctor.available_memory()


def test_the_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert find_machine().cpu_quota is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert find_machine().cpu_quota is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert find_machine().cpu_quota == 1.5


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "an illegal instruction; it may be built",
        ),
        ("import os; os.abort()", "ended its process with an abort"),
        ("raise SystemExit('llama.cpp can\\'t be loaded (no libgomp)')", r"can't be loaded \(no libgomp\)"),
        ("raise ImportError('cannot find it')", r"can't be loaded \(cannot find it\)"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_library_that_ends_its_process_does_not_end_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "llama_cpp.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(EdgeLLMError, match=said):
        find_build()
    found = examine([])
    assert found.build is None
    assert advise(found)[0].fatal


def test_a_child_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **options: Any) -> None:
        raise subprocess.TimeoutExpired("python", options["timeout"])

    monkeypatch.setattr(build.subprocess, "run", never)
    with pytest.raises(EdgeLLMError, match="could not be tried"):
        find_build()


def command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(
        [*EDGELLM, "doctor", *arguments], env=environment, capture_output=True, timeout=120, check=False
    )


def test_doctor_on_this_machine(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "edgellm").mkdir(parents=True)
    (cache / "edgellm" / "something").write_bytes(bytes(12_345))
    result = command("--json", environment={"XDG_CACHE_HOME": str(cache)})
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["works"]
    assert found["model_problem"] == ""
    assert found["default_model"].endswith(".gguf")
    assert next(f for f in found["folders"] if f["name"] == "edgellm's cache")["n_bytes"] == 12_345
    assert any("tune" in one["text"] for one in found["advice"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_doctor_of_a_broken_install_says_so_and_exits_1(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "llama_cpp.py").write_text("import os; os.abort()")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = command(environment={"PYTHONPATH": path})
    assert result.returncode == 1
    printed = result.stdout.decode()
    assert "BROKEN: llama.cpp doesn't work: loading llama.cpp ended its process with an abort" in printed
    assert "Traceback" not in result.stderr.decode()


def test_advice_sorts_the_worst_first() -> None:
    found = replace(WELL, missing=("rich",), default_is_tuned=False)
    assert [one.fatal for one in advise(found)] == [True, False]
    assert isinstance(advise(found)[0], Advice)
