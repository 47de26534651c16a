"""What collecting statistics costs beside the plain forward pass over the same tokens, in turns.

    python benchmarks/collect.py [--model MODEL.gguf] [--tokens 4096] [--rounds 5] [--memory 8e9]

Without --model the bundled SmolLM2 is converted to F16 first. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
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
        samples = make_samples(model, options.tokens)
        jobs(model, samples, Path(name), 0)["forward"]()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for job, run in jobs(model, samples, Path(name), int(options.memory)).items():
                started = time.perf_counter()
                run()
                seconds.setdefault(job, []).append(time.perf_counter() - started)
    medians = {job: statistics.median(values) for job, values in seconds.items()}
    ratios = {
        job: round(statistics.median(a / b for a, b in zip(seconds[job], seconds["forward"], strict=True)), 3)
        for job in medians
    }
    for job, median in medians.items():
        print(f"{job:<12} {median:7.2f} s   {ratios[job]:.2f} × the forward pass")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    more = peak - before
    print(f"peak memory {peak / 1e6:.0f} MB, {more / 1e6:.0f} MB more than the forward pass of {model.name} alone")
    result = {"seconds": medians, "ratios": ratios, "peak_memory": peak, "more_than_forward": more}
    print(json.dumps({"benchmark": "collect", **result}))


if __name__ == "__main__":
    main()
