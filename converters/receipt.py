"""What a conversion made, what was checked, how long it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from converters.plan import Plan


@dataclass(frozen=True)
class Receipt:
    """Sizes in bytes, times in seconds. types: tensor type → (number of tensors, bytes)."""

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

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return asdict(self)


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
