"""Every command and every Python example of the README is run, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SETUP = [command for command in COMMANDS if command.startswith("pip install")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": path, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_are_two_setup_commands_and_ci_runs_them() -> None:
    """Installing is CI's part: the pip commands stand there word for word."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(SETUP) == 2
    for command in SETUP:
        install, _, then = command.partition(" && ")
        assert install.replace("pip install", "pip install -q") in ci
        assert then in ci


SLOW = [command for command in COMMANDS if "--calibrate" in command]  # minutes of measuring


# the order matters: later commands use what earlier ones made
@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in (*SETUP, *SLOW)])
def test_command(command: str, folder: Path) -> None:
    done = shell(command, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
    if command.startswith("edgellm demo"):
        assert "all equal" in done.stdout
        assert "merged reminders" in done.stdout
        fine_tuned = re.findall(r"^\| fine-tune, Q4_K_M \| `(.+)` \|$", README, re.MULTILINE)
        assert fine_tuned == done.stdout.splitlines()[-1:]
        base = done.stderr.partition("the base:")[2].partition("the fine-tune:")[0]
        assert len(base) > 20
        assert "{" not in base


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_slow_commands(tmp_path: Path) -> None:
    needed = [command for command in COMMANDS if command.startswith("edgellm demo") or "work/text.txt" in command]
    needed.insert(1, next(command for command in COMMANDS if "-o work/model.gguf" in command))
    assert len(SLOW) == 2
    for command in [command for command in needed if command not in SLOW] + SLOW:
        done = shell(command, tmp_path)
        assert done.returncode == 0, done.stderr
    assert "85,000,000 bytes: met with" in done.stdout
    assert (tmp_path / "work" / "better.html").exists()
    assert 0.97 * 85e6 < (tmp_path / "work" / "small.gguf").stat().st_size <= 85e6


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_readme_lists_every_recipe() -> None:
    from converters.quantize.types import FILE_TYPES

    assert [name for name in FILE_TYPES if not re.search(rf"\b{name}\b", README)] == []


def test_readme_names_every_command() -> None:
    help_text = shell("edgellm --help", ROOT).stdout
    commands = re.findall(r"^  (\w+)  ", help_text.partition("Commands:")[2], re.MULTILINE)
    assert len(commands) >= 5
    assert [name for name in commands if f"edgellm {name}" not in README] == []
