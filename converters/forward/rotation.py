"""Rotary positions: the angles each position turns by, for every scaling that checkpoints are trained with.

Formulas: Su et al. 2021; linear, Chen et al. 2023; yarn, Peng et al. 2023; longrope, Ding et al. 2024; llama3, as in
transformers' modeling_rope_utils. Written apart from `architectures/rope.py`, which this is there to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.forward.families import Config

Array = NDArray[np.float32]
Angles = NDArray[np.float64]

KINDS = (None, "default", "dynamic", "linear", "llama3", "yarn", "longrope", "su")


def rope_of(config: Config, is_local: bool) -> Mapping[str, Any]:
    """Its settings. transformers 5 keeps them in rope_parameters, for kinds of layers apart where they differ; 4 in
    rope_scaling, rope_theta and rope_local_base_freq.
    """
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = "sliding_attention" if is_local else "full_attention"
    theta = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    if is_local and kind not in found:
        found = {}  # a scaling is for the full layers
        theta = config.get("rope_local_base_freq") or theta
    rope: dict[str, Any] = {"rope_theta": theta, **(found.get(kind) or found)}
    original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    rope.setdefault("original_max_position_embeddings", original)
    return {**rope, "kind": rope.get("rope_type", rope.get("type"))}


def rotated_size(config: Config, size: int) -> int:
    """How many of a head's values are rotated."""
    share = rope_of(config, False).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return int(size * float(1.0 if share is None else share))


def rotation(config: Config, n: int, size: int, is_local: bool, n_ctx: int) -> tuple[Array, Array]:
    """Cosines and sines, float32 (n, 1, size / 2) each, times what yarn and longrope scale attention by.

    n_ctx: longrope has factors for contexts within and beyond the original one.
    """
    rope = rope_of(config, is_local)
    frequencies = float(rope["rope_theta"]) ** (-np.arange(0, size, 2) / size)
    original = float(rope["original_max_position_embeddings"])
    attention = 1.0
    if rope["kind"] == "linear":
        frequencies = frequencies / float(rope["factor"])
    elif rope["kind"] == "llama3":
        frequencies = _llama3(frequencies, rope, original)
    elif rope["kind"] == "yarn":
        frequencies, attention = _yarn(frequencies, rope, original), _yarn_attention(rope)
    elif rope["kind"] in ("longrope", "su"):
        frequencies = frequencies / np.asarray(rope["short_factor" if n_ctx <= original else "long_factor"], np.float64)
        attention = _longrope_attention(rope, float(config["max_position_embeddings"]) / original, original)
    angles = (np.arange(n)[:, None] * frequencies)[:, None]
    return (np.cos(angles) * attention).astype(np.float32), (np.sin(angles) * attention).astype(np.float32)


def rotated(x: Array, turns: tuple[Array, Array], neighbours: bool) -> Array:
    """x (positions, heads, size) with its first values turned in pairs: halves, or neighbours."""
    cos, sin = turns
    half = cos.shape[-1]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (head[..., ::2], head[..., 1::2]) if neighbours else (head[..., :half], head[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = np.stack(pair, axis=-1).reshape(head.shape) if neighbours else np.concatenate(pair, axis=-1)
    return np.concatenate([turned, rest], axis=-1)


def query_scale(config: Config, n: int) -> Array | None:
    """Ministral 3's and Llama 4's: queries grow with the logarithm of their position, float32 (n, 1, 1)."""
    rope = rope_of(config, False)
    if not rope.get("llama_4_scaling_beta"):
        return None
    periods = np.arange(n) // int(rope["original_max_position_embeddings"])
    scale: Array = (1 + rope["llama_4_scaling_beta"] * np.log1p(periods)).astype(np.float32)
    return scale[:, None, None]


def _llama3(frequencies: Angles, rope: Mapping[str, Any], original: float) -> Angles:
    """Slow turns are slowed by the factor, fast ones kept, and those between mixed of both."""
    turns = original * frequencies / (2 * np.pi)  # within the original context
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / float(rope["factor"]))


def _yarn(frequencies: Angles, rope: Mapping[str, Any], original: float) -> Angles:
    n = len(frequencies)
    edges = np.array([rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0])
    low, high = n * np.log(original / (edges * 2 * np.pi)) / np.log(float(rope["rope_theta"]))
    if rope.get("truncate", True):
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, 2 * n - 1.0)
    slowed = np.clip((np.arange(n) - low) / max(high - low, 1e-3), 0, 1)
    mixed: Angles = frequencies * (1 - slowed + slowed / float(rope["factor"]))
    return mixed


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (over and under):
        over, under = 1.0, 0.0
    growth = 0.1 * np.log(max(float(rope["factor"]), 1.0))
    return float((over * growth + 1) / (under * growth + 1))


def _longrope_attention(rope: Mapping[str, Any], factor: float, original: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    return float(np.sqrt(1 + np.log(factor) / np.log(original))) if factor > 1 else 1.0
