"""What an isolated model asks of its host: hardly an import, a main that may be frozen, a process that may fork."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm import Model
from tests.runtime.isolated import GREEDY, PROMPT, isolated, pid_of, tiny_path

__all__ = ["isolated", "tiny_path"]  # fixtures

LIGHT = """
import sys
print("main")
import edgellm
with edgellm.load(sys.argv[1], edgellm.LoadParams(n_ctx=64, n_threads=1), isolated=True) as model:
    text = "".join(r.text for r in model.chat([{"role": "user", "content": "x"}], edgellm.SamplingParams(max_tokens=4)))
    model.complete("Hello", edgellm.SamplingParams(max_tokens=4))
heavy = {"llama_cpp", "numpy", "jinja2", "torch", "llguidance", "asyncio", "multiprocessing"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_host_imports_nothing_heavy_and_its_main_runs_once(tiny_path: Path, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(LIGHT)
    child = subprocess.run([sys.executable, str(script), str(tiny_path)], capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (0, "main\n", "")


FROZEN = """
import sys
import edgellm
edgellm.freeze_support()
sys.frozen, sys.executable = True, sys.argv[1]
with edgellm.load(sys.argv[2], edgellm.LoadParams(n_ctx=64, n_threads=1), isolated=True) as model:
    print(model.n_vocab)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for a frozen executable is a shell script")
def test_a_frozen_app_is_its_own_engine(tiny_path: Path, tmp_path: Path) -> None:
    script, executable = tmp_path / "app.py", tmp_path / "app"
    script.write_text(FROZEN)
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    child = subprocess.run([executable, executable, tiny_path], capture_output=True, text=True)
    assert (child.stdout, child.stderr) == ("1000\n", "")


def test_a_fork_has_a_child_of_its_own(isolated: Model) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    expected, pid = isolated.complete(PROMPT, GREEDY).token_ids, pid_of(isolated)
    forked = os.fork()
    if not forked:
        try:
            same = isolated.complete(PROMPT, GREEDY).token_ids == expected
            other = pid_of(isolated) != pid
            isolated.close()
            os._exit(0 if same and other else 1)
        finally:
            os._exit(2)
    assert os.waitpid(forked, 0)[1] == 0
    assert pid_of(isolated) == pid
    assert isolated.complete(PROMPT, GREEDY).token_ids == expected
