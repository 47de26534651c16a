"""The receipt as a self-contained page: figures in plain words, size and speed, a map of errors, checks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from jinja2 import Environment

from converters.plan import Plan, PlannedTensor
from converters.produce import load
from converters.quantize.types import TYPE_IDS, block_size
from converters.receipt import Receipt
from edgellm import __version__
from edgellm.errors import OutputError
from edgellm.gguf_header import read_header
from edgellm.measure.words import budget_lines, quality_lines

_TEMPLATE = Path(__file__).with_name("report_template.html")
_LEFT, _TOP, _WIDE, _HIGH = 60, 10, 560, 240  # of the chart's field
_COOL, _WARM = (226, 238, 250), (176, 24, 40)


@dataclass(frozen=True)
class TensorError:
    """rms: root mean square of the rounding error over that of the weights."""

    name: str
    type_name: str
    rms: float


def tensor_errors(planned: Plan, written: Path) -> list[TensorError]:
    """What rounding did to every quantized tensor, weighed by the importance of its columns where that is known."""
    header = read_header(written)
    found = []
    for tensor in planned.tensors:
        if block_size(tensor.type_name) > 1 and tensor.sources:
            stored = np.fromfile(written, np.uint8, tensor.n_bytes, offset=header.tensors[tensor.name].offset).reshape(
                -1, tensor.n_bytes // (tensor.n_elements // tensor.shape[-1])
            )
            found.append(TensorError(tensor.name, tensor.type_name, _rms(tensor, stored, planned.sizes)))
    return found


def _rms(tensor: PlannedTensor, stored: Any, sizes: Mapping[str, int]) -> float:
    """Source after source; each has an equal share of the rows."""
    error = norm = 0.0
    share = len(stored) // len(tensor.sources)
    for k in range(len(tensor.sources)):
        weights = load(tensor, k, sizes)
        rounded = dequantize(stored[k * share : (k + 1) * share], GGMLQuantizationType(TYPE_IDS[tensor.type_name]))
        rounded = rounded.reshape(weights.shape)
        weigh: Any = np.float32(1)
        if tensor.importance is not None:
            weigh = tensor.importance[k] if weights.ndim == 2 else tensor.importance[:, None]
        error += float((np.square(weights - rounded) * weigh).sum(dtype=np.float64))
        norm += float((np.square(weights) * weigh).sum(dtype=np.float64))
    return float(np.sqrt(error / norm)) if norm else 0.0


def write_report(
    path: Path, receipt: Receipt, errors: Sequence[TensorError], weighed: bool, original_bytes: int
) -> None:
    """One HTML file without anything from elsewhere. OutputError where it can't be written."""
    page = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    try:
        path.write_text(page.render(r=_page(receipt, errors, weighed, original_bytes)), encoding="utf-8")
    except OSError as exc:
        raise OutputError(f"cannot write the report {path}: {exc.strerror or exc}") from exc


def _page(receipt: Receipt, errors: Sequence[TensorError], weighed: bool, original_bytes: int) -> dict[str, Any]:
    measured = receipt.quality.get("measured") or {}
    speeds = receipt.quality.get("speeds") or {}
    return {
        "name": Path(receipt.output).name,
        "quant": receipt.quant,
        "architecture": receipt.architecture,
        "n_parameters": receipt.n_parameters,
        "version": __version__,
        "words": quality_lines(receipt.quality),
        "speeds": speeds,
        "sizes": _sizes(receipt, original_bytes, speeds),
        "measured": measured,
        "figures": _figures(measured) if "kld" in measured else [],
        "text": receipt.quality.get("text"),
        "weighed": weighed,
        "budget": budget_lines(receipt.budget),
        "chart": _chart(receipt.budget) if receipt.budget else None,
        "heat": _heat(errors),
        "others": ", ".join(
            f"{e.name} {100 * e.rms:.2f} % ({e.type_name})" for e in errors if not e.name.startswith("blk.")
        ),
        "checks": receipt.checks,
        "notes": [*([receipt.calibration] if receipt.calibration else []), *receipt.notes, *receipt.run_notes],
    }


def _sizes(receipt: Receipt, original_bytes: int, speeds: Mapping[str, Any]) -> list[dict[str, Any]]:
    original_bits = 8 * original_bytes / receipt.n_parameters
    rows = (
        ("original", original_bytes, original_bits, "reference"),
        (receipt.quant, receipt.output_bytes, receipt.bits_per_weight, "model"),
    )
    largest = max(n_bytes for _, n_bytes, _, _ in rows)
    return [
        {
            "what": what,
            "size": f"{n_bytes / 1e6:.1f} MB",
            "bits": bits,
            "percent": 100 * n_bytes / largest,
            **{kind: f"{value:.0f}" for kind, value in (speeds.get(key) or {}).items()},
        }
        for what, n_bytes, bits, key in rows
    ]


def _figures(measured: Mapping[str, Any]) -> list[dict[str, str]]:
    kld, errors = measured["kld"], measured["errors"]
    rows = [
        ("same next word", measured["same_top"], errors["same_top"], "how often both find the same word likeliest"),
        ("KL divergence, mean", kld["mean"], errors["kld"]["mean"], "0 = the same; below 0.05 is hard to tell"),
        ("KL divergence, median", kld["median"], errors["kld"]["median"], "half of all words are below"),
        ("KL divergence, 99 %", kld["p99"], errors["kld"]["p99"], "one word in a hundred is above"),
        ("perplexity", measured["perplexity"], errors["perplexity"], "surprise at the text; lower is better"),
        ("perplexity of the original", measured["reference_perplexity"], errors["reference_perplexity"], ""),
        ("ratio of the two", measured["ppl_ratio"], errors["ppl_ratio"], "1 = as good as the original"),
    ]  # fmt: skip
    return [
        {"name": name, "value": f"{value:.4g}", "error": f"{error:.2g}", "words": words}
        for name, value, error, words in rows
    ]


def _chart(budget: Mapping[str, Any]) -> dict[str, Any]:
    """Size against the logarithm of the KL divergence: what was expected of every size, and what became of this one."""
    points = [(row["n_bytes"] / 1e6, row["kld"]) for row in budget["candidates"] if row["kld"] > 0]
    chosen = budget["n_bytes"] / 1e6, max(budget["measured"], 1e-9)
    sizes, klds = zip(*points, chosen, strict=True)
    x_low, x_high = min(sizes), max(sizes) * 1.0001
    y_low, y_high = np.floor(np.log10(min(klds))), np.ceil(np.log10(max(klds)) + 1e-9)

    def place(size: float, kld: float) -> tuple[float, float]:
        across = (size - x_low) / (x_high - x_low)
        down = (y_high - np.log10(kld)) / (y_high - y_low)
        return round(_LEFT + _WIDE * across, 1), round(_TOP + _HIGH * float(down), 1)

    ticks = np.linspace(x_low, x_high, 5)
    return {
        "line": " ".join("{},{}".format(*place(*point)) for point in points),
        "chosen": place(*chosen),
        "across": [(place(size, 10**y_low)[0], f"{size:.{0 if x_high > 20 else 1}f}") for size in ticks],
        "down": [(place(x_low, 10.0**y)[1], f"{10.0**y:g}") for y in range(int(y_low), int(y_high) + 1)],
        "left": _LEFT,
        "right": _LEFT + _WIDE,
        "bottom": _TOP + _HIGH,
    }


def _heat(errors: Sequence[TensorError]) -> dict[str, Any]:
    """Rows: kinds of tensors; columns: blocks; colour by the logarithm of the error."""
    places = {}
    for error in errors:
        if found := re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", error.name):
            places[found[2], int(found[1])] = error
    blocks = range(max((block for _, block in places), default=-1) + 1)
    values = [error.rms for error in places.values() if error.rms > 0] or [1e-3]
    low, high = min(values), max(values)
    rows = [
        {"name": kind, "cells": [_cell(places.get((kind, block)), low, high) for block in blocks]}
        for kind in sorted({kind for kind, _ in places})
    ]
    return {
        "blocks": list(blocks),
        "rows": rows,
        "low": f"{100 * low:.2f} %",
        "high": f"{100 * high:.2f} %",
        "low_color": _color(0),
        "high_color": _color(1),
    }


def _cell(error: TensorError | None, low: float, high: float) -> dict[str, str] | None:
    if error is None:
        return None
    share = np.log(max(error.rms, low) / low) / np.log(high / low) if high > low else 0.0
    return {"color": _color(float(share)), "title": f"{error.name}: {100 * error.rms:.2f} %, {error.type_name}"}


def _color(share: float) -> str:
    mixed = (round(cool + share * (warm - cool)) for cool, warm in zip(_COOL, _WARM, strict=True))
    return "rgb({}, {}, {})".format(*mixed)
