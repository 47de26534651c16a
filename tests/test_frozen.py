"""A frozen app finds the native libraries, in its own process and in a child."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgellm
from edgellm._pyinstaller import get_hook_dirs

ROOT = Path(__file__).parent.parent
APP = """\
import json, sys
import edgellm

edgellm.freeze_support()
with edgellm.load(sys.argv[1], isolated=sys.argv[2:] == ["isolated"]) as model:
    answer = model.complete("The capital of France is", edgellm.SamplingParams(max_tokens=8))
    print(json.dumps([model.engine_pid if sys.argv[2:] else 0, answer.token_ids]))
"""


def test_pyinstaller_is_told_of_the_hooks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pyinstaller40"]["hook-dirs"] == "edgellm._pyinstaller:get_hook_dirs"
    (folder,) = get_hook_dirs()
    assert {path.name for path in Path(folder).glob("hook-*.py")} == {"hook-edgellm.py", "hook-llama_cpp.py"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_frozen_app_answers(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    left_out = [f"--exclude-module={name}" for name in ("torch", "transformers", "matplotlib", "PIL", "converters")]
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level=WARN", *left_out]
    command += [f"--additional-hooks-dir={get_hook_dirs()[0]}", f"--paths={ROOT}", "app.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=800)
    app = tmp_path / "dist" / "app" / ("app.exe" if sys.platform == "win32" else "app")
    with edgellm.load(model_path) as model:
        expected = model.complete("The capital of France is", edgellm.SamplingParams(max_tokens=8)).token_ids
    for mode in ([], ["isolated"]):
        done = subprocess.run([app, model_path, *mode], capture_output=True, timeout=120, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        pid, token_ids = json.loads(done.stdout)
        assert (token_ids, pid > 0) == (expected, bool(mode))
