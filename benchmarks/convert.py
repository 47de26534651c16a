"""Convert time and peak memory per recipe: each conversion in a fresh process, several rounds, medians.

    python benchmarks/convert.py [--source CHECKPOINT] [--quants Q4_0,Q4_K_M] [--rounds 3]

Without --source the bundled SmolLM2 is written out as a float32 checkpoint first. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_JOB = (
    "import json, sys; import converters; "
    "r = converters.convert(sys.argv[1], sys.argv[2], quant=sys.argv[3], force=True); "
    "print(json.dumps(r.as_dict()))"
)


def run_once(source: Path, folder: Path, quant: str) -> dict[str, float]:
    """One conversion in a process of its own: seconds, and bytes of memory at the peak."""
    started = time.perf_counter()
    out = folder / f"{quant}.gguf"
    done = subprocess.run(
        [sys.executable, "-c", _JOB, str(source), str(out), quant], check=True, capture_output=True, text=True
    )
    receipt = json.loads(done.stdout)
    out.unlink()
    return {
        "process_seconds": time.perf_counter() - started,
        "convert_seconds": receipt["convert_seconds"],
        "verify_seconds": receipt["verify_seconds"],
        "peak_memory": receipt["peak_memory"],
        "output_bytes": receipt["output_bytes"],
    }


def largest_tensor(source: Path) -> int:
    """Bytes of the largest tensor as float32."""
    import converters

    return max(4 * tensor.n_elements for tensor in converters.plan(source, quant="F32").tensors)


def main() -> None:
    from converters.quantize.types import FILE_TYPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--quants", default=",".join(FILE_TYPES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = arguments.source
        if source is None:
            import converters
            from edgellm.catalog.cards import resolve

            source = converters.to_checkpoint(resolve(None), folder / "checkpoint")
        bound = (200_000_000) + 4 * largest_tensor(source)
        runs: dict[str, list[dict[str, float]]] = {quant: [] for quant in arguments.quants.split(",")}
        for _ in range(arguments.rounds):  # interleaved: a slow minute hits all alike
            for quant, results in runs.items():
                results.append(run_once(source, folder, quant))
    medians = {
        quant: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for quant, results in runs.items()
    }
    print(f"{'recipe':<8} {'convert s':>9} {'check s':>8} {'process s':>9} {'peak MB':>8} {'file MB':>8}")
    for quant, row in medians.items():
        print(
            f"{quant:<8} {row['convert_seconds']:9.2f} {row['verify_seconds']:8.2f} {row['process_seconds']:9.2f} "
            f"{row['peak_memory'] / 1e6:8.1f} {row['output_bytes'] / 1e6:8.1f}"
        )
    worst = max(row["peak_memory"] for row in medians.values())
    print(f"peak memory at most {worst / 1e6:.0f} MB; bound 200 MB + 4 × largest float32 tensor = {bound / 1e6:.0f} MB")
    print(json.dumps({"benchmark": "convert", "rounds": arguments.rounds, "bound": bound, "medians": medians}))


if __name__ == "__main__":
    main()
