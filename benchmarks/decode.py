"""Speed of `model.generate` against a bare llama_decode loop and against llama_cpp.Llama.

All three run in one process on the same file, with the same threads, turn by turn, greedily, from the same prompt.
The clock runs from the first token to the last as the consumer sees them, without guesses; then, of a prompt of 512
tokens, until the first. Prints a table, then one JSON line.

    python benchmarks/decode.py [MODEL.gguf] [--tokens 256] [--rounds 7]

Without a model, the demo model is requantized to Q4_0 in a temporary folder.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import llama_cpp
from llama_cpp import Llama
from llama_cpp import llama_cpp as lib

import edgellm
from edgellm.catalog.cards import resolve
from edgellm.config import physical_cpu_count
from edgellm.native import library

library.load()  # before the bare ones: where AMX crashes, this is what keeps ggml from it

PROMPT = "Once upon a time, in a village by the sea, there lived an old clockmaker who"
N_CTX = 1024
N_PREFILL = 512
QUIET = llama_cpp.llama_log_callback(lambda level, text, user_data: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    llama_cpp.llama_log_set(QUIET, None)
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or requantized(Path(folder) / "demo-Q4_0.gguf")
        speeds = measure(path, options.tokens, options.rounds)
        report(path, speeds, prefill_ratio(path, options.rounds))


def measure(path: Path, n_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every contestant in every round; one round to warm up isn't counted."""
    contestants: dict[str, Callable[[int], float]] = {
        "bare llama_decode loop": bare_loop(path),
        "edgellm model.generate": edgellm_generate(path),
        "llama_cpp.Llama stream": high_level(path),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            speed = run(n_tokens)
            if i:
                speeds[name].append(speed)
    return speeds


def prefill_ratio(path: Path, rounds: int) -> float:
    """Bare seconds to the first token over ours."""
    bare, model = bare_context(path), edgellm.load(path, edgellm.LoadParams(n_ctx=N_CTX))
    tokens = (model.tokenize(PROMPT + ". ") * N_PREFILL)[:N_PREFILL]
    ids = (ctypes.c_int32 * N_PREFILL)(*tokens)
    ratios = []
    for i in range(rounds + 1):
        lib.llama_memory_clear(lib.llama_get_memory(bare.context), False)
        started = perf_counter()
        lib.llama_decode(bare.context, lib.llama_batch_get_one(ids, N_PREFILL))
        lib.llama_sampler_sample(bare.chain, bare.context, -1)
        theirs = perf_counter() - started
        model.complete([1], edgellm.SamplingParams(max_tokens=1))  # so that nothing of the prompt is kept
        started = perf_counter()
        stream = model.generate(tokens, edgellm.SamplingParams(max_tokens=2))
        next(stream)
        ours = perf_counter() - started
        stream.close()
        if i:
            ratios.append(theirs / ours)
    model.close()
    return statistics.median(ratios)


def report(path: Path, speeds: dict[str, list[float]], prefill: float) -> None:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bare, ours, theirs = medians.values()
    print(f"{path.name}, {physical_cpu_count()} threads, tok/s")
    for name, values in speeds.items():
        print(f"  {name:<24} median {medians[name]:7.1f}   from {min(values):7.1f} to {max(values):7.1f}")
    pairs = list(zip(*speeds.values(), strict=True))
    against_bare = statistics.median(b / a for a, b, _ in pairs)
    against_llama = statistics.median(b / c for _, b, c in pairs)
    print(f"  generate / bare loop {against_bare:.3f}   generate / llama_cpp.Llama {against_llama:.3f}")
    print(f"  reading {N_PREFILL} tokens: generate / bare {prefill:.3f}")
    result = {
        "benchmark": "decode",
        "model": path.name,
        "threads": physical_cpu_count(),
        "bare_tok_s": round(bare, 2),
        "edgellm_tok_s": round(ours, 2),
        "llama_cpp_tok_s": round(theirs, 2),
        "ratio_bare": round(against_bare, 4),
        "ratio_llama_cpp": round(against_llama, 4),
        "ratio_prefill": round(prefill, 4),
    }
    print(json.dumps(result))


class Bare(NamedTuple):
    """llama.cpp's objects."""

    model: Any
    context: Any
    chain: Any


def bare_context(path: Path) -> Bare:
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = N_CTX, 512, 512, 1
    params.n_threads = params.n_threads_batch = physical_cpu_count()
    context = lib.llama_init_from_model(model, params)
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    return Bare(model, context, chain)


def bare_loop(path: Path) -> Callable[[int], float]:
    """The least that can be done: decode, sample in C, decode. It makes no text and looks for no end."""
    model, context, chain = bare_context(path)
    vocab = lib.llama_model_get_vocab(model)
    prompt = (ctypes.c_int32 * 64)()
    n_prompt = lib.llama_tokenize(vocab, PROMPT.encode(), len(PROMPT), prompt, 64, True, True)
    one = (ctypes.c_int32 * 1)()
    batch = lib.llama_batch_get_one(one, 1)

    def run(n_tokens: int) -> float:
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        lib.llama_decode(context, lib.llama_batch_get_one(prompt, n_prompt))
        one[0] = lib.llama_sampler_sample(chain, context, -1)
        started = perf_counter()
        for _ in range(n_tokens - 1):
            lib.llama_decode(context, batch)
            one[0] = lib.llama_sampler_sample(chain, context, -1)
        return (n_tokens - 1) / (perf_counter() - started)

    return run


def edgellm_generate(path: Path) -> Callable[[int], float]:
    model = edgellm.load(path, edgellm.LoadParams(n_ctx=N_CTX))

    def run(n_tokens: int) -> float:
        times: list[float] = []
        count = 0
        for response in model.generate(PROMPT, edgellm.SamplingParams(max_tokens=n_tokens), draft="off"):
            times.append(perf_counter())
            count += len(response.token_ids)
        return (count - 1) / (times[-1] - times[0])

    return run


def high_level(path: Path) -> Callable[[int], float]:
    model = Llama(str(path), n_ctx=N_CTX, n_threads=physical_cpu_count(), verbose=False)

    def run(n_tokens: int) -> float:
        stream = model.create_completion(PROMPT, max_tokens=n_tokens, temperature=0, repeat_penalty=1.0, stream=True)
        times = [perf_counter() for _ in stream]
        return (len(times) - 2) / (times[-2] - times[0])  # the last chunk only carries the finish reason

    return run


def requantized(out: Path) -> Path:
    """The demo model at Q4_0. Its quality suffers from being quantized twice; its speed doesn't."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    code = llama_cpp.llama_model_quantize(str(resolve(None)).encode(), str(out).encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"llama_model_quantize failed with {code}")
    return out


if __name__ == "__main__":
    main()
