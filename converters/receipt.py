"""What a conversion made, what was checked, how long it took."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from converters.plan import Plan


@dataclass(frozen=True)
class Receipt:
    """Sizes in bytes, times in seconds. types: tensor type → (number of tensors, bytes). quality: see quality.py;
    budget: `Met` of budget/meet.py as plain data, if one was asked for.

    run_notes: what was so only this time; the receipt in the file goes without, as the same job writes the same bytes.
    """

    output: str
    quant: str
    architecture: str
    n_parameters: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    types: Mapping[str, tuple[int, int]]
    n_fallback: int
    convert_seconds: float
    verify_seconds: float
    peak_memory: int | None
    checks: tuple[str, ...]
    notes: tuple[str, ...]
    run_notes: tuple[str, ...] = ()
    quality: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = ""
    budget: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return asdict(self)


_PREFIX = "edgellm.receipt."
_JSON_BYTES = 6144  # reserved in the header, which is written before there is a receipt
_UNMEASURED = -1.0  # no NaN: metadata must be comparable
_FIGURES = ("perplexity", "kld_mean", "kld_p99", "same_top", "ppl_ratio")
_IN_FILE = (
    "quant", "n_parameters", "source_bytes", "output_bytes", "bits_per_weight", "n_fallback", "checks", "notes",
    "quality", "calibration", "budget",
)  # fmt: skip


def blank_entries() -> dict[str, Any]:
    """The receipt's place in a GGUF's metadata, to be filled by `entries_of` when the file is written."""
    figures = {f"{_PREFIX}{name}": _UNMEASURED for name in _FIGURES}
    return {**figures, f"{_PREFIX}level": "none", f"{_PREFIX}json": " " * _JSON_BYTES}


def entries_of(receipt: Receipt) -> dict[str, Any]:
    """The receipt as GGUF metadata, as many bytes as `blank_entries`: figures (-1: not measured), level, JSON."""
    measured = receipt.quality.get("measured") or {}
    kld = measured.get("kld") or {}
    figures = {**measured, "kld_mean": kld.get("mean"), "kld_p99": kld.get("p99")}
    found = {name: value for name, value in receipt.as_dict().items() if name in _IN_FILE}
    if found["budget"]:  # the candidates are for the chart, the speed was that of one moment
        found["budget"] = {k: v for k, v in found["budget"].items() if k not in ("candidates", "speed")}
    found["quality"] = {name: value for name, value in receipt.quality.items() if name != "speeds"}  # of this run only
    text = json.dumps(found, ensure_ascii=True)
    if len(text) > _JSON_BYTES:  # the longest parts are for people, and were printed
        text = json.dumps({**found, "checks": [], "notes": []}, ensure_ascii=True)[:_JSON_BYTES]
    return {
        **{f"{_PREFIX}{name}": _float(figures.get(name)) for name in _FIGURES},
        f"{_PREFIX}level": receipt.quality["level"],
        f"{_PREFIX}json": text.ljust(_JSON_BYTES),
    }


def _float(value: Any) -> float:
    return _UNMEASURED if value is None else float(value)


def types_used(plan: Plan) -> dict[str, tuple[int, int]]:
    """Tensor type → (number of tensors, bytes), the largest share first."""
    n_bytes: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for tensor in plan.tensors:
        n_bytes[tensor.type_name] += tensor.n_bytes
        count[tensor.type_name] += 1
    return {name: (count[name], total) for name, total in n_bytes.most_common()}


def peak_memory() -> int | None:
    """Bytes this process has had resident at most, None where the system doesn't tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
