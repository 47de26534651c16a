"""The numbers in an adapter_config.json: ranks, alphas, and what they scale a low-rank product by."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from converters.adapters.read import Adapter
from edgellm.errors import AdapterError


def lora_scale(adapter: Adapter, module: str, rank: int) -> float:
    """α/r, or α/√r for rsLoRA (Kalajdzievski 2023), with α of this module."""
    alpha = _number(adapter, "lora_alpha", module)
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def lycoris_scale(adapter: Adapter, module: str, default_rank: int) -> float:
    """α/r of LoHa and LoKr, where the rank can't always be told from the shapes."""
    rank = _by_pattern(adapter, "rank_pattern", module, adapter.config.get("r", default_rank))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{adapter.path}/adapter_config.json has rank {rank!r} for {module}, expected 1 or more")
    return _number(adapter, "alpha", module) / rank


def config_number(adapter: Adapter, name: str, default: float) -> float:
    """A finite number of the config."""
    return _finite(adapter, name, adapter.config.get(name, default))


def _number(adapter: Adapter, name: str, module: str) -> float:
    return _finite(adapter, name, _by_pattern(adapter, "alpha_pattern", module, adapter.config.get(name, 8)))


def _finite(adapter: Adapter, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{adapter.path}/adapter_config.json has {name} = {value!r}, expected a number")
    return float(value)


def _by_pattern(adapter: Adapter, table: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's path."""
    patterns = adapter.config.get(table) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{adapter.path}/adapter_config.json: {table} is no table of patterns")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as exc:
            raise AdapterError(f"{adapter.path}/adapter_config.json: {table} has a bad pattern {pattern!r}") from exc
    return default
