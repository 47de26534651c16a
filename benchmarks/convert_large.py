"""Converting a checkpoint of more than 1 GB: against llama.cpp's own two steps, and with an adapter merged on the way.

    python benchmarks/convert_large.py [--source CHECKPOINT] [--llama-cpp DIR] [--quants Q4_0,Q4_K_M] [--rounds 3]

Without --source the synthetic 666M model of expanded_target.py is made first, with noise for its zeros. DIR is the
unpacked vendor/llama.cpp of llama-cpp-python's source package, whose convert_hf_to_gguf.py (F16) and then
llama_model_quantize are timed; without it only our own conversions are. Each job is a process of its own, in turns.
Peak memory is the converting process's; our check maps the finished file in a child process, as any load of it does.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from expanded_target import expanded_smollm2
from safetensors.numpy import save_file

import converters
from converters.quantize.types import find_file_type
from converters.sources import open_source

_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
_RANK = 16


def timed(*commands: list[str], env: dict[str, str] | None = None) -> tuple[float, int]:
    """Seconds of all commands one after the other, and the largest peak memory among them in bytes."""
    started, peak = time.perf_counter(), 0
    for command in commands:
        with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
            child = subprocess.Popen(command, stdout=answer, stderr=said, env={**os.environ, **(env or {})})
            _, status, usage = os.wait4(child.pid, 0)
            for file in (answer, said):
                file.seek(0, os.SEEK_END)  # the child moved the position behind Python's back
                file.seek(0)
            if status:
                raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')[-2000:]}")
            told = answer.read()
        if b'"peak_memory"' in told:
            peak = max(peak, json.loads(told)["peak_memory"])
        else:
            peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return time.perf_counter() - started, peak


def random_adapter(source: Path, folder: Path) -> Path:
    """A LoRA of rank 16 on every matrix of every block, as peft stores it."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in open_source(source).tensors.items():
        if "layers." in name and len(tensor.shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = tensor.shape
            tensors[f"{module}.lora_A.weight"] = rng.normal(size=(_RANK, columns)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = 0.001 * rng.normal(size=(rows, _RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def jobs(source: Path, quant: str, folder: Path, llama_cpp: Path | None) -> dict[str, list[list[str]]]:
    out, middle, adapter = str(folder / "out.gguf"), str(folder / "f16.gguf"), str(folder / "adapter")
    edgellm = [sys.executable, "-c", "from edgellm.cli.main import main; main()"]
    ours = [*edgellm, "convert", str(source), "-o", out, "-q", quant, "--force", "--json"]
    made = {"edgellm convert": [ours], "edgellm convert --adapter": [[*ours, "--adapter", adapter]]}
    if llama_cpp is not None:
        script = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(source), "--outfile", middle]
        number = str(find_file_type(quant).number)
        quantize = [sys.executable, "-c", _QUANTIZE, middle, out, number]
        made["llama.cpp script + quantize"] = [[*script, "--outtype", "f16"], quantize]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--quants", default="Q4_0,Q4_K_M,Q8_0")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = options.source or expanded_smollm2(folder / "checkpoint", 6, noise=0.02)
        random_adapter(source, folder / "adapter")
        env = {"PYTHONPATH": str(options.llama_cpp / "gguf-py")} if options.llama_cpp else {}
        results: dict[str, dict[str, list[tuple[float, int]]]] = {}
        for _ in range(options.rounds):
            for quant in options.quants.split(","):
                for job, commands in jobs(source, quant, folder, options.llama_cpp).items():
                    found = timed(*commands, env=env if "script" in job else None)
                    results.setdefault(quant, {}).setdefault(job, []).append(found)
        report(source, results)


def report(source: Path, results: dict[str, dict[str, list[tuple[float, int]]]]) -> None:
    largest = max(4 * tensor.n_elements for tensor in converters.plan(source, quant="F32").tensors)
    bound = 200_000_000 + 4 * largest
    print(f"{open_source(source).n_bytes / 1e9:.2f} GB of weights; memory bound {bound / 1e6:.0f} MB")
    summary: dict[str, object] = {"benchmark": "convert_large", "memory_bound": bound}
    for quant, by_job in results.items():
        medians = {job: statistics.median(seconds for seconds, _ in runs) for job, runs in by_job.items()}
        peaks = {job: max(peak for _, peak in runs) for job, runs in by_job.items()}
        for job, seconds in medians.items():
            print(f"{quant:<8} {job:<28} {seconds:7.1f} s   peak {peaks[job] / 1e6:7.0f} MB")
        plain = medians["edgellm convert"]
        summary[quant] = {
            "seconds": {job: round(seconds, 2) for job, seconds in medians.items()},
            "peak_bytes": peaks,
            "adapter_ratio": round(medians["edgellm convert --adapter"] / plain, 3),
            "script_ratio": round(plain / medians["llama.cpp script + quantize"], 3) if len(medians) > 2 else None,
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
