"""The command line in processes of its own, as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ENTRY = "from edgellm.cli.main import main; main()"


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str


def start(
    *arguments: str | Path, cwd: Path | None = None, prepare: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    """`edgellm ARGUMENTS` as a child process. prepare runs in the child before Python does.

    Conversions aren't measured unless --receipt says so, as in tests/conftest.py.
    """
    if arguments[0] == "convert" and "--receipt" not in arguments:
        arguments = (*arguments, "--receipt", "fast")
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        preexec_fn=prepare,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )


def run(*arguments: str | Path, cwd: Path | None = None, prepare: Callable[[], None] | None = None) -> Ended:
    """`edgellm ARGUMENTS` to its end."""
    child = start(*arguments, cwd=cwd, prepare=prepare)
    stdout, stderr = child.communicate(timeout=120)
    return Ended(child.returncode, stdout.decode(), stderr.decode())


def refused(ended: Ended, code: int, *said: str) -> None:
    """Assert a refusal as documented: the exit code, exactly one line on stderr that says it all, nothing else."""
    assert ended.code == code, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("edgellm: ")
    assert "unexpected" not in lines[0]
    assert ended.stdout == ""
    for text in said:
        assert text in lines[0], lines[0]
