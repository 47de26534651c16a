"""A cold `edgellm run MODEL hi -n 8`: a new process each time, its wall time, time to first text and peak memory.

    python benchmarks/cold_run.py [MODEL.gguf] [--rounds 7]

Prints a table, then one JSON line. The file itself is in the page cache after the first, uncounted, round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from edgellm.catalog.cards import resolve

COMMAND = [sys.executable, "-c", "from edgellm.cli.main import main; main()"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = options.model or resolve(None)
    runs = {mode: [once(model, mode) for _ in range(options.rounds + 1)][1:] for mode in ("repack", "mmap")}
    result: dict[str, object] = {"benchmark": "cold_run", "model": model.name}
    print(f"edgellm run {model.name} hi -n 8")
    for mode, figures in runs.items():
        total, first, peak = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"  --load-mode {mode:<7} {total:.3f} s in all, first text after {first:.3f} s, peak {peak:.0f} MiB")
        result[mode] = {"seconds": round(total, 3), "first_text_seconds": round(first, 3), "peak_mib": round(peak)}
    print(json.dumps(result))


def once(model: Path, mode: str) -> tuple[float, float, float]:
    """Seconds in all, seconds to the first text, peak resident MiB."""
    command = [*COMMAND, "run", str(model), "hi", "-n", "8", "--load-mode", mode]
    started = perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(1)
    first = perf_counter() - started
    process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"edgellm run failed with {code}")
    # Linux reports kilobytes, macOS bytes
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return perf_counter() - started, first, peak


if __name__ == "__main__":
    main()
