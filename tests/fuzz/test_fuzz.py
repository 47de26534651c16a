"""Ten thousand damaged inputs: each is refused in one line, or works. No traceback, abort, hang or flood of memory.

A failing case is run again by its number: `python -m tests.fuzz.worker ROOT WORK SEED NUMBER 1 NUMBER+1`, with ROOT
made by tests.fuzz.targets.build.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.targets import build

SECONDS_PER_CASE = 5.0
START_SECONDS = 60.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    build(folder)
    return folder


def outcomes(root: Path, work: Path, seed: int, first: int, step: int, end: int) -> dict[int, str]:
    """Number → outcome, of the cases first, first + step …; a worker that hangs or dies is replaced."""
    found: dict[int, str] = {}
    while first < end:
        arguments = [root, work, seed, first, step, end]
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", *map(str, arguments)], stdout=subprocess.PIPE, cwd=ROOT,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        errors: list[bytes] = []
        assert worker.stderr is not None
        drain = threading.Thread(target=lambda stream, into: into.append(stream.read()), args=(worker.stderr, errors))
        drain.start()
        running = _watch(worker, found)
        worker.kill()
        drain.join()
        if running is None:
            break
        found[running] = f"hung or died: {errors[0][-800:].decode(errors='replace') if errors else ''}"
        first = running + step
    return found


def _watch(worker: subprocess.Popen[bytes], found: dict[int, str]) -> int | None:
    """Fills `found`; the case that was running when the worker hung or died, None if it came to its end."""
    assert worker.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(worker.stdout, selectors.EVENT_READ)
    running: int | None = None
    patience, rest = START_SECONDS, b""
    while selector.select(patience):
        chunk = os.read(worker.stdout.fileno(), 1 << 16)
        if not chunk:
            return running
        *lines, rest = (rest + chunk).split(b"\n")
        for line in map(json.loads, lines):
            if "begin" in line:
                running = line["begin"]
            else:
                found[line["number"]], running = line["outcome"], None
        patience = SECONDS_PER_CASE
    return running


def check(root: Path, tmp_path: Path, seed: int, n_cases: int, n_workers: int) -> None:
    results: list[dict[int, str]] = [{} for _ in range(n_workers)]

    def work(k: int) -> None:
        results[k] = outcomes(root, tmp_path / f"work{k}", seed, k, n_workers, n_cases)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(n_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = {number: outcome for part in results for number, outcome in part.items()}
    counts = Counter(outcome if outcome in ("ok", "refused") else "defect" for outcome in ended.values())
    assert len(ended) == n_cases
    defects = {number: outcome for number, outcome in ended.items() if outcome not in ("ok", "refused")}
    shown = "\n".join(
        f"--- case {number} of seed {seed}\n{text[-1500:]}" for number, text in sorted(defects.items())[:12]
    )
    assert not defects, f"{dict(counts)}\n{shown}"
    assert counts["refused"] > n_cases // 3, counts
    assert counts["ok"] > n_cases // 50, counts


def test_some_damaged_inputs(root: Path, tmp_path: Path) -> None:
    check(root, tmp_path, seed=1, n_cases=120, n_workers=1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_thousand_damaged_inputs(root: Path, tmp_path: Path) -> None:
    check(root, tmp_path, seed=int(os.environ.get("EDGELLM_FUZZ_SEED", "0")), n_cases=10_000, n_workers=2)
