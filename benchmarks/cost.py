"""What compensating costs as models grow: time and memory of whole conversions, and what that means for larger ones.

    python benchmarks/cost.py CALIBRATION.txt MODEL|CHECKPOINT… [--effort 1] [--quant Q4_0] [--budget]

Each conversion runs in a process of its own. --budget: with a budget of the recipe's bytes instead of its types.
The work is two sums, parameters × tokens (states through the blocks) and parameters × columns (error feedback): what
each costs is fitted to the conversions, with no negative share, and gives the projections. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import converters
from edgellm.gguf_header import read_header

# embedding, width of the feed-forward, key and value width, blocks: of models as they are published
SHAPES = {"1B": (2048, 8192, 512, 16), "3B": (3072, 8192, 1024, 28), "8B": (4096, 14336, 1024, 32)}
_TOKENS_AT_1 = 8 * 512  # of effort 1; each step of effort doubles them
_MATRIX_BYTES = 24  # for each entry of a Gram matrix: H and its factor in double, and copies


def work_of(matrices: list[tuple[int, int]]) -> tuple[float, float]:
    """Parameters, parameters × columns of (rows, columns) each."""
    return float(sum(r * c for r, c in matrices)), float(sum(r * c * c for r, c in matrices))


def matrices_of(path: Path) -> list[tuple[int, int]]:
    tensors = read_header(path).tensors.items()
    return [(t.shape[0], t.shape[1]) for name, t in tensors if name.startswith("blk.") and len(t.shape) == 2]


def projected(embed: int, hidden: int, kv: int, blocks: int) -> list[tuple[int, int]]:
    block = [
        (embed, embed),
        (kv, embed),
        (kv, embed),
        (embed, embed),
        (hidden, embed),
        (hidden, embed),
        (embed, hidden),
    ]
    return block * blocks


def run(source: Path, text: Path, effort: int, quant: str, budget: bool) -> dict[str, Any]:
    """One conversion: seconds in all and by what was done, peak memory beyond the mapped model."""
    phases: dict[str, float] = {}
    last = ["", perf_counter()]

    def progress(what: str, *_: object) -> None:
        now = perf_counter()
        name = last[0] if what == last[0] or "." in what else what
        phases[str(last[0])] = phases.get(str(last[0]), 0.0) + now - float(last[1])
        last[:] = [name, now]

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out.gguf"
        options: dict[str, Any] = {"quant": quant}
        if budget:
            converters.convert(source, out, quant=quant, receipt="off")
            options = {"max_size": out.stat().st_size}
        started = perf_counter()
        converters.convert(
            source, out, calibrate=text, effort=effort, receipt="off", force=True, on_progress=progress, **options
        )
        seconds = perf_counter() - started
        params, squares = work_of(matrices_of(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"source": source.name, "parameters": params, "squares": squares, "seconds": round(seconds, 1), "peak": peak}
    return row | {"phases": {what: round(took, 1) for what, took in phases.items() if took > 1}}


def fitted(rows: list[dict[str, Any]], tokens: int) -> tuple[float, float]:
    """Seconds for a parameter × token, and for a parameter × column."""
    sums = np.array([(row["parameters"] * tokens, row["squares"]) for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    both = np.linalg.lstsq(sums / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    if len(rows) > 1 and (both > 0).all():
        return float(both[0]), float(both[1])
    return 0.0, float((seconds / sums[:, 1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--effort", type=int, default=1)
    parser.add_argument("--quant", default="Q4_0")
    parser.add_argument("--budget", action="store_true")
    options = parser.parse_args()
    rows = []
    for source in options.sources:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            job = process.submit(run, source, options.calibration, options.effort, options.quant, options.budget)
            rows.append(job.result())
        row = rows[-1]
        print(
            f"{row['source']:<24} {row['parameters'] / 1e6:7.0f}M  {row['seconds']:8.1f} s  {row['peak'] / 1e6:7.0f} MB"
        )
        print("   ", "  ".join(f"{what} {seconds:.0f}" for what, seconds in row["phases"].items()), flush=True)
    tokens = _TOKENS_AT_1 << (options.effort - 1)
    per_token, per_column = fitted(rows, tokens)
    projections = {}
    for name, shape in SHAPES.items():
        params, squares = work_of(projected(*shape))
        seconds = params * tokens * per_token + squares * per_column
        n_bytes = _MATRIX_BYTES * min(8192, max(shape)) ** 2
        projections[name] = {"seconds": round(seconds), "matrix_bytes": n_bytes}
        print(f"{name}: {seconds / 60:.0f} minutes; its widest matrices take {n_bytes / 1e9:.1f} GB")
    result = {"effort": options.effort, "budget": options.budget, "rows": rows, "projections": projections}
    print(json.dumps({"benchmark": "cost", **result}))


if __name__ == "__main__":
    main()
