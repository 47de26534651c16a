"""What error compensation is worth: each recipe with llama.cpp's importance matrix alone, and compensated besides.

    python benchmarks/quality.py [--model MODEL.gguf] [--quants Q4_0,Q4_K_M,Q5_K_M] [--effort 3] [--keep FOLDER]

The model's weights are moved off the grid they were quantized to: uniform noise of half a step, seed 0. Calibrated on
one third of the Python documentation's topics, measured on another. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

import converters
from converters.safetensors_writer import OutTensor, write_shards
from converters.sources import open_source
from edgellm.catalog.cards import resolve
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples

PARTS = ("calibration", "tuning", "test")
_BLOCK, _STEPS = 32, 15  # of Q4_1, whose grid the bundled weights lie on


def write_texts(folder: Path) -> dict[str, Path]:
    """Three texts without a topic in common."""
    names, found = sorted(topics), {}
    for k, part in enumerate(PARTS):
        found[part] = folder / f"{part}.txt"
        found[part].write_text("\n\n".join(topics[name] for name in names[k :: len(PARTS)]), encoding="utf-8")
    return found


def off_grid(model: Path, folder: Path) -> Path:
    """The GGUF as a checkpoint in float32, every matrix moved by up to half a quantization step."""
    base = converters.to_checkpoint(model, folder / "base")
    rng, tensors = np.random.default_rng(0), []
    for name, tensor in open_source(base).tensors.items():
        weights = tensor.read()
        if weights.ndim == 2:
            blocks = weights.reshape(-1, _BLOCK)
            steps = (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / _STEPS
            weights = (blocks + rng.uniform(-0.5, 0.5, blocks.shape) * steps).astype(np.float32).reshape(weights.shape)
        tensors.append(OutTensor(name, tensor.shape, lambda weights=weights: weights))
    out = folder / "off_grid"
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    write_shards(out, tensors, "f32")
    return out


def compare(
    model: Path, texts: dict[str, Path], folder: Path, quants: Sequence[str], effort: int
) -> list[dict[str, Any]]:
    """KLD, bytes and seconds of every recipe both ways."""
    exact = folder / "exact.gguf"
    converters.convert(model, exact, quant="F16", receipt="off")
    samples = read_samples(texts["test"], exact, n_ctx=512, n_chunks=12)
    rows = []
    for quant in quants:
        for compensate in (False, True):
            out = folder / f"{quant}-{compensate}.gguf"
            started = time.perf_counter()
            converters.convert(
                model, out, quant=quant, calibrate=texts["calibration"], compensate=compensate, effort=effort,
                receipt="off",
            )  # fmt: skip
            seconds = time.perf_counter() - started
            measured = evaluate(out, samples, reference=exact).as_dict()
            row = {"quant": quant, "compensated": compensate, "bytes": out.stat().st_size, "seconds": round(seconds, 1)}
            rows.append(row | {"kld": measured["kld"]["mean"], "same_top": measured["same_top"]})
            print("{quant:<8} {compensated!s:<6} {bytes:>11,} B  KLD {kld:.5f}  {seconds:7.1f} s".format(**rows[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="instead of the bundled SmolLM2")
    parser.add_argument("--quants", default="Q4_0,Q4_K_M,Q5_K_M")
    parser.add_argument("--effort", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="leave the files here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(exist_ok=True)
        model, texts = off_grid(options.model or resolve(None), folder), write_texts(folder)
        rows = compare(model, texts, folder, options.quants.split(","), options.effort)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    ratios = {plain["quant"]: round(better["kld"] / plain["kld"], 3) for plain, better in pairs}
    print(
        json.dumps(
            {
                "benchmark": "quality",
                "model": str((options.model or resolve(None)).name),
                "ratios": ratios,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
