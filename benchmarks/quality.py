"""What calibrating is worth: files of llama.cpp's own recipes with its importance matrix, and ours of the same bytes.

    python benchmarks/quality.py [--model MODEL.gguf|CHECKPOINT] [--adapter FOLDER]
        [--quants Q4_0,Q4_K_M,Q5_K_M] [--compensated Q4_0] [--max-size Q4_0,Q4_K_M] [--effort 3] [--keep FOLDER]
        [--calibrate self|other] [--max-kld 0.05] [--fast 1.15] [--also Q3_K_M,Q6_K] [--picture docs/quality.png]

A GGUF's weights are moved off the grid they were quantized to: uniform noise of half a step, seed 0. With --adapter the
model is the fine-tune, as it is. Calibrated on one third of the Python documentation's topics (or on text the model
writes, or on Python code), measured on another third. For each recipe: llama.cpp's file, the same types compensated,
and a file of our own types of no more bytes. --max-kld also asks for that divergence; --fast for so many times the
decoding speed of Q4_K_M at Q4_0's bytes.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import numpy as np

import converters
from converters.safetensors_writer import OutTensor, write_shards
from converters.sources import open_source
from edgellm.catalog.cards import resolve
from edgellm.measure.evaluate import evaluate
from edgellm.measure.scoring import Sample
from edgellm.measure.speed import decode_seconds_per_token
from edgellm.measure.texts import SELF, read_samples

PARTS = ("calibration", "tuning", "test")
_CODE = "argparse", "ast", "configparser", "csv", "difflib", "fractions", "heapq", "shlex", "statistics", "tokenize"
_CODE_CHARACTERS = 150_000
_BLOCK, _STEPS = 32, 15  # of Q4_1, whose grid the bundled weights lie on
_ROUNDS = 5

Row = dict[str, Any]


def write_texts(folder: Path) -> dict[str, Path]:
    """Three texts without a topic in common."""
    names, found = sorted(topics), {}
    for k, part in enumerate(PARTS):
        found[part] = folder / f"{part}.txt"
        found[part].write_text("\n\n".join(topics[name] for name in names[k :: len(PARTS)]), encoding="utf-8")
    return found


def write_code(folder: Path) -> Path:
    """Text of another domain: modules of the standard library."""
    path = folder / "code.txt"
    library = Path(sysconfig.get_paths()["stdlib"])
    code = "\n\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in _CODE)
    path.write_text(code[:_CODE_CHARACTERS], encoding="utf-8")
    return path


def merged(model: Path, adapter: Path, folder: Path) -> Path:
    """The fine-tune as a checkpoint in float32."""
    whole = folder / "merged.gguf"
    converters.convert(model, whole, adapters=[adapter], quant="F32", receipt="off", force=True)
    return converters.to_checkpoint(whole, folder / "merged")


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


class Comparison:
    """Files of one model, each measured on the test text as it is made."""

    def __init__(self, model: Path, folder: Path, calibration: str | Path, test: Path, effort: int) -> None:
        self.model, self.folder, self.calibration, self.effort = model, folder, calibration, effort
        self.exact = folder / "exact.gguf"
        converters.convert(model, self.exact, quant="F16", receipt="off", force=True)
        self.samples: list[Sample] = read_samples(test, self.exact, n_ctx=512, n_chunks=12)
        self.rows: list[Row] = []

    def add(self, name: str, kind: str, **options: Any) -> Row:
        """Convert with these options, and measure."""
        out = self.folder / f"{name}-{kind}.gguf"
        started = time.perf_counter()
        converters.convert(
            self.model, out, calibrate=self.calibration, effort=self.effort, receipt="off", force=True, **options
        )
        seconds = time.perf_counter() - started
        measured = evaluate(out, self.samples, reference=self.exact, keep=self.folder / "kept").as_dict()
        row = {"name": name, "kind": kind, "bytes": out.stat().st_size, "seconds": round(seconds, 1), "file": str(out)}
        row |= {"kld": measured["kld"]["mean"], "error": measured["errors"]["kld"]["mean"]}
        self.rows.append(row | {"same_top": measured["same_top"]})
        print("{name:<8} {kind:<12} {bytes:>13,} B  KLD {kld:.5f} ± {error:.5f}  {seconds:7.1f} s".format(**row))
        return self.rows[-1]

    def find(self, name: str, kind: str) -> Row | None:
        return next((row for row in self.rows if (row["name"], row["kind"]) == (name, kind)), None)


def add_speeds(rows: Sequence[Row]) -> None:
    """Tokens per second of every file: medians of rounds in turns."""
    seconds: dict[str, list[float]] = {row["file"]: [] for row in rows}
    for _ in range(_ROUNDS):
        for file, found in seconds.items():
            found.append(decode_seconds_per_token(Path(file)))
    for row in rows:
        row["decode"] = round(1 / median(seconds[row["file"]]), 1)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Size and speed against KL divergence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    looks = {
        "standard": ("o", "llama.cpp's recipe, importance matrix"),
        "compensated": ("s", "the same types, compensated"),
    }
    for kind in dict.fromkeys(row["kind"] for row in rows):
        marker, label = looks.get(kind, ("D", "edgellm, within a budget"))
        ours = [row for row in rows if row["kind"] == kind]
        label = label if kind in looks or kind == "max-size" else f"edgellm, {kind}"
        for axis, values in ((axes[0], [r["bytes"] / 1e6 for r in ours]), (axes[1], [r["decode"] for r in ours])):
            axis.scatter(values, [row["kld"] for row in ours], marker=marker, label=label)
            for x, row in zip(values, ours, strict=True):
                axis.annotate(row["name"], (x, row["kld"]), textcoords="offset points", xytext=(5, 4), fontsize=8)
    for axis, text in zip(axes, ("size, MB", "decoding, tokens per second"), strict=True):
        axis.set_yscale("log")
        axis.set_xlabel(text)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("mean KL divergence from F16")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def compare(
    found: Comparison, quants: Sequence[str], wanted: Mapping[str, str], max_kld: float | None, fast: float | None
) -> dict[str, Any]:
    """All rows; returns the ratios that matter. wanted: kind → the recipes to make it for."""
    ratios: dict[str, Any] = {}
    for quant in quants:
        standard = found.add(quant, "standard", quant=quant, compensate=False)
        for kind, options in (("compensated", {"quant": quant}), ("max-size", {"max_size": standard["bytes"]})):
            if quant not in wanted[kind].split(","):
                continue
            ratios[f"{quant} {kind}"] = round(found.add(quant, kind, **options)["kld"] / standard["kld"], 3)
    if max_kld:
        ratios["max-kld"] = round(found.add(str(max_kld), "max-kld", max_kld=max_kld)["kld"] / max_kld, 3)
    small, usual = found.find("Q4_0", "standard"), found.find("Q4_K_M", "standard")
    if fast and small and usual:
        wanted = fast / decode_seconds_per_token(Path(usual["file"]))
        row = found.add(f"{fast}x", "min-speed", max_size=small["bytes"], min_speed=wanted)
        add_speeds([usual, row])
        ratios["min-speed decode"] = round(row["decode"] / usual["decode"], 3)
        ratios["min-speed kld"] = round(row["kld"] / usual["kld"], 3)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="instead of the bundled SmolLM2")
    parser.add_argument("--adapter", type=Path, help="of a fine-tune of it")
    parser.add_argument("--quants", default="Q4_0,Q4_K_M,Q5_K_M")
    for kind in ("compensated", "max-size"):
        parser.add_argument(f"--{kind}", help="recipes to make this file of ours for, if not for all")
    parser.add_argument("--effort", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="leave the files here")
    parser.add_argument("--calibrate", choices=["same", SELF, "other"], default="same")
    parser.add_argument("--also", default="", help="recipes to show without ours beside them, for the picture")
    parser.add_argument("--max-kld", type=float)
    parser.add_argument("--fast", type=float)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(exist_ok=True)
        named = options.model or resolve(None)
        if options.adapter:
            model = merged(named, options.adapter, folder)
        else:
            model = named if named.is_dir() else off_grid(named, folder)
        texts = write_texts(folder)
        calibration = {"same": texts["calibration"], SELF: SELF, "other": write_code(folder)}[options.calibrate]
        found = Comparison(model, folder, calibration, texts["test"], options.effort)
        wanted = {"compensated": options.compensated, "max-size": options.max_size}
        wanted = {kind: options.quants if given is None else given for kind, given in wanted.items()}
        ratios = compare(found, options.quants.split(","), wanted, options.max_kld, options.fast)
        for quant in filter(None, options.also.split(",")):
            found.add(quant, "standard", quant=quant, compensate=False)
        source = f"{named.name} with {options.adapter.name}" if options.adapter else named.name
        if options.picture:
            add_speeds(found.rows)
            draw(found.rows, options.picture, f"{source}, calibrated on {options.calibrate} text")
    rows = [{key: value for key, value in row.items() if key != "file"} for row in found.rows]
    print(json.dumps({"benchmark": "quality", "model": source, "ratios": ratios, "rows": rows}))


if __name__ == "__main__":
    main()
