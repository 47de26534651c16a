"""What collecting statistics costs beside the plain forward pass over the same tokens, in turns.

    python benchmarks/collect.py [--model MODEL.gguf] [--tokens 4096] [--rounds 5] [--memory 8e9]

Without --model the bundled SmolLM2 is converted to F16 first. Peak memory is measured in a process of its own for each
job; what Gram matrices take more than the forward pass should stay below --memory. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import converters
from converters.quantize.gram import collect_gram
from converters.quantize.importance import collect_importance
from edgellm.catalog.cards import resolve
from edgellm.measure.scoring import Sample
from edgellm.measure.texts import read_samples
from edgellm.measure.watching import watch_inputs

_TEXT = Path(converters.__file__).with_name("receipt_text.txt")


def make_samples(model: Path, n_tokens: int) -> list[Sample]:
    """Chunks of 512 tokens, the text as often as it takes."""
    (chunk,) = read_samples(_TEXT, model, n_ctx=512, n_chunks=1)
    return [chunk] * max(1, n_tokens // 512)


def jobs(model: Path, samples: list[Sample], folder: Path, memory: int) -> dict[str, Callable[[], object]]:
    return {
        "forward": lambda: watch_inputs(model, samples, set(), lambda *_: None),
        "importance": lambda: collect_importance(model, samples, "benchmark"),
        "gram": lambda: collect_gram(model, samples, folder / "gram", memory=memory),
    }


def run_job(job: str, model: Path, n_tokens: int, memory: int) -> tuple[float, int]:
    """Seconds it takes, and bytes that this process has had resident at most."""
    samples = make_samples(model, n_tokens)
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        jobs(model, samples, Path(name), memory)[job]()
        seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_new_process(job: str, model: Path, n_tokens: int, memory: int) -> tuple[float, int]:
    """`run_job`, with a peak that nothing before it has a part in."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run_job, job, model, n_tokens, memory).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=float, default=8e9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = options.model or Path(name) / "f16.gguf"
        if options.model is None:
            converters.convert(resolve(None), model, quant="F16", receipt="off")
        seconds: dict[str, list[float]] = {job: [] for job in ("forward", "importance", "gram")}
        peak: dict[str, int] = dict.fromkeys(seconds, 0)
        for _ in range(options.rounds):
            for job, measured in seconds.items():
                took, most = in_new_process(job, model, options.tokens, int(options.memory))
                measured.append(took)
                peak[job] = max(peak[job], most)
    medians = {job: statistics.median(values) for job, values in seconds.items()}
    ratios = {
        job: round(statistics.median(a / b for a, b in zip(seconds[job], seconds["forward"], strict=True)), 3)
        for job in medians
    }
    for job, median in medians.items():
        print(f"{job:<12} {median:7.2f} s   {ratios[job]:.2f} × the forward pass   peak {peak[job] / 1e6:6.0f} MB")
    more = peak["gram"] - peak["forward"]
    kept = "within" if more <= options.memory else "BEYOND"
    print(
        f"Gram matrices: {more / 1e6:.0f} MB more than the forward pass, {kept} the {options.memory / 1e6:.0f} allowed"
    )
    result = {"seconds": medians, "ratios": ratios, "peak_memory": peak, "more_than_forward": more}
    print(json.dumps({"benchmark": "collect", "memory": int(options.memory), "tokens": options.tokens, **result}))


if __name__ == "__main__":
    main()
