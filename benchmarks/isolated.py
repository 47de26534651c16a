"""An isolated model against one in this process: decode speed, and how soon a long prompt stops when it is cancelled.

Both hold the same file with the same threads and answer turn by turn, greedily, from the same prompt; the clock runs
from the first piece to the last as the consumer sees them. Then each reads a long prompt again and again and is
cancelled from another thread at moments spread over the reading; the clock runs from `cancel()` to the exception.
Prints tables, then one JSON line.

    python benchmarks/isolated.py [MODEL.gguf] [--tokens 128] [--rounds 9] [--prompt 2000] [--cancels 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from time import perf_counter

import edgellm
from edgellm import Cancelled, LoadParams, Model, SamplingParams
from edgellm.catalog.cards import resolve
from edgellm.config import physical_cpu_count

TEXT = "Once upon a time, in a village by the sea, there lived an old clockmaker who "
Figures = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--cancels", type=int, default=20)
    options = parser.parse_args()
    path = options.model or resolve(None)
    params = LoadParams(n_ctx=max(options.prompt + 8, options.tokens + 64))
    with edgellm.load(path, params) as here, edgellm.load(path, params, isolated=True) as apart:
        models = {"in this process": here, "isolated": apart}
        speeds = interleaved(models, options.tokens, options.rounds)
        stops = stop_times(models, options.prompt, options.cancels)
    report(path, speeds, stops)


def interleaved(models: dict[str, Model], n_tokens: int, rounds: int) -> Figures:
    """Tokens per second of each in every round; one round to warm up isn't counted. Who begins changes."""
    speeds: Figures = {name: [] for name in models}
    for i in range(rounds + 1):
        for name in list(models)[:: 1 if i % 2 else -1]:
            speed = decode_speed(models[name], n_tokens)
            if i:
                speeds[name].append(speed)
    return speeds


def decode_speed(model: Model, n_tokens: int) -> float:
    times: list[float] = []
    count = 0
    for response in model.generate(TEXT, SamplingParams(max_tokens=n_tokens), draft="off"):
        times.append(perf_counter())
        count += len(response.token_ids)
    return (count - 1) / (times[-1] - times[0])


def stop_times(models: dict[str, Model], n_prompt: int, n_cancels: int) -> Figures:
    """Milliseconds from `cancel()` to the exception."""
    stops: Figures = {name: [] for name in models}
    prompt = models["isolated"].tokenize(TEXT * n_prompt)[:n_prompt]
    whole = {name: reading_time(model, prompt) for name, model in models.items()}
    for i in range(n_cancels):
        for name, model in models.items():
            stops[name].append(1000 * stop_time(model, prompt, whole[name] * (i + 0.5) / (n_cancels + 1)))
    return stops


def reading_time(model: Model, prompt: list[int]) -> float:
    """Seconds."""
    forget(model)
    return model.complete(prompt, SamplingParams(max_tokens=1)).stats.prompt_seconds


def forget(model: Model) -> None:
    """Nothing of the long prompt shall be in the memory."""
    model.complete([model.n_vocab - 1], SamplingParams(max_tokens=1))


def stop_time(model: Model, prompt: list[int], delay: float) -> float:
    """Seconds; 0 where the prompt was read before the cancel came."""
    forget(model)
    cancelled: list[float] = []
    begun = threading.Event()

    def cancel() -> None:
        begun.wait()
        time.sleep(delay)
        cancelled.append(perf_counter())
        model.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    stopped = None
    try:
        begun.set()
        model.complete(prompt, SamplingParams(max_tokens=1))
    except Cancelled:
        stopped = perf_counter()
    thread.join()
    return 0.0 if stopped is None else stopped - cancelled[0]


def report(path: Path, speeds: Figures, stops: Figures) -> None:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{path.name}, {physical_cpu_count()} threads, decode tok/s")
    for name, values in speeds.items():
        print(f"  {name:<16} median {medians[name]:7.1f}   from {min(values):7.1f} to {max(values):7.1f}")
    ratios = [apart / here for here, apart in zip(speeds["in this process"], speeds["isolated"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"  isolated / in this process: median {ratio:.3f}   from {min(ratios):.3f} to {max(ratios):.3f}")
    print("ms from cancel to the exception, in a long prompt")
    for name, values in stops.items():
        print(f"  {name:<16} median {statistics.median(values):7.1f}   at most {max(values):7.1f}")
    result = {
        "benchmark": "isolated",
        "model": path.name,
        "threads": physical_cpu_count(),
        "in_process_tok_s": round(medians["in this process"], 2),
        "isolated_tok_s": round(medians["isolated"], 2),
        "ratio": round(ratio, 4),
        "in_process_stop_ms": _median_and_most(stops["in this process"]),
        "isolated_stop_ms": _median_and_most(stops["isolated"]),
    }
    print(json.dumps(result))


def _median_and_most(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "max": round(max(values), 2)}


if __name__ == "__main__":
    main()
