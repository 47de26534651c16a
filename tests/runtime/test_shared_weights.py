"""Mapped weights are held once, however many processes use them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HOLD = """
import sys, edgellm
with edgellm.load(sys.argv[1], edgellm.LoadParams(n_ctx=64, load_mode=sys.argv[2])) as model:
    model.complete("Hello", edgellm.SamplingParams(max_tokens=2))
    print("ready", flush=True)
    sys.stdin.read()
"""


def mapped(pid: int, name: str) -> tuple[int, int]:
    """(resident, proportional) kilobytes of a process's mappings of a file: a page that n share counts as 1/n there."""
    text = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8")
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    ours = [part for part in parts if part.partition("\n")[0].endswith(name)]
    rss, pss = (
        sum(int(re.search(rf"^{key}: +(\d+)", part, re.MULTILINE)[1]) for part in ours) for key in ("Rss", "Pss")
    )  # type: ignore[index]
    return rss, pss


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says what is shared")
def test_two_processes_share_one_copy(model_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(model_path), "mmap"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        rss, pss = mapped(processes[0].pid, model_path.name)
    finally:
        for process in processes:
            process.communicate()
    size = model_path.stat().st_size / 1024
    assert rss > 0.9 * size
    assert pss < 0.55 * rss
