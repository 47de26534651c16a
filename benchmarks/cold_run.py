"""A cold `edgellm run MODEL hi -n 8` beside scripts on the bare bindings: a new process each time, interleaved.

Wall time from start to exit, time to first text, peak memory.

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
PACKAGE = """
import ctypes, os, sys
import llama_cpp as lib
"""
MODULE = """
import ctypes, importlib, importlib.util, os, sys, types
package = types.ModuleType("llama_cpp")
package.__path__ = list(importlib.util.find_spec("llama_cpp").submodule_search_locations)
sys.modules["llama_cpp"] = package
lib = importlib.import_module("llama_cpp.llama_cpp")
"""
LEAST = r"""  # that prints the same text
quiet = lib.llama_log_callback(lambda *_: None)
lib.llama_log_set(quiet, None)
lib.llama_backend_init()
params = lib.llama_model_default_params()
if sys.argv[2] == "mmap":
    params.use_extra_bufts = False
model = lib.llama_model_load_from_file(sys.argv[1].encode(), params)
params = lib.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = 4096, 512, 512, 1
params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
context = lib.llama_init_from_model(model, params)
vocab = lib.llama_model_get_vocab(model)
text = b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
tokens = (ctypes.c_int32 * 64)()
n = lib.llama_tokenize(vocab, text, len(text), tokens, 64, True, True)
chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
buffer = ctypes.create_string_buffer(64)
for _ in range(8):
    lib.llama_decode(context, lib.llama_batch_get_one(tokens, n))
    tokens[0], n = lib.llama_sampler_sample(chain, context, -1), 1
    size = lib.llama_token_to_piece(vocab, tokens[0], buffer, 64, 0, True)
    sys.stdout.buffer.write(buffer.raw[:size])
    sys.stdout.buffer.flush()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = options.model or resolve(None)
    result: dict[str, object] = {"benchmark": "cold_run", "model": model.name}
    for mode in ("repack", "mmap"):
        tried = subprocess.run(
            [sys.executable, "-c", PACKAGE + LEAST, str(model), mode], capture_output=True, check=False
        )
        if mode == "repack" and tried.returncode < 0:  # by a signal
            print(f"--load-mode {mode}: the bare bindings crash here (see `edgellm doctor`), so there is no comparison")
            continue
        commands = {
            "edgellm run": [*COMMAND, "run", str(model), "hi", "-n", "8", "--load-mode", mode],
            "bare bindings": [sys.executable, "-c", PACKAGE + LEAST, str(model), mode],
            "their module alone": [sys.executable, "-c", MODULE + LEAST, str(model), mode],
        }
        rounds = [{name: once(command) for name, command in commands.items()} for _ in range(options.rounds + 1)][1:]
        print(f"--load-mode {mode}")
        for name in commands:
            total, first, peak = (statistics.median(column) for column in zip(*(r[name] for r in rounds), strict=True))
            print(f"  {name:<18} {total:.3f} s in all, first text after {first:.3f} s, peak {peak:.0f} MiB")
            found = {"seconds": round(total, 3), "first_text_seconds": round(first, 3), "peak_mib": round(peak)}
            result[f"{mode}, {name}"] = found
        ours, *bare = ([r[name] for r in rounds] for name in commands)
        for name, theirs in zip([*commands][1:], bare, strict=True):
            time_ratio, memory_ratio = (
                statistics.median(a[i] / b[i] for a, b in zip(ours, theirs, strict=True)) for i in (0, 2)
            )
            print(f"  edgellm / {name}: time {time_ratio:.2f}, memory {memory_ratio:.2f}")
            result[f"{mode}, to {name}"] = {"seconds": round(time_ratio, 3), "peak": round(memory_ratio, 3)}
    print(json.dumps(result))


def once(command: list[str]) -> tuple[float, float, float]:
    """Seconds in all, seconds to the first text, peak resident MiB."""
    started = perf_counter()
    # compiled modules are kept from the uncounted round on, as where both are installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    process.stdout.read(1)
    first = perf_counter() - started
    process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"{command[3:]} failed with {code}")
    # Linux reports kilobytes, macOS bytes
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return perf_counter() - started, first, peak


if __name__ == "__main__":
    main()
