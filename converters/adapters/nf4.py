"""The base that QLoRA trains on: weights rounded to NF4 and back (Dettmers et al. 2023, arXiv 2305.14314, appendix E).

A LoRA trained on the rounded base can be merged into the original weights or into the rounded ones; which is better
depends on the run, so the difference is measured and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from converters.adapters.targets import Targets
from converters.architectures.spec import Array
from converters.sources import SourceTensor

BLOCK = 64  # values that share a scale, in bitsandbytes' default; its second quantization, of the scales, is left out
# quantiles of the normal distribution, scaled to [-1, 1], with an exact zero
LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=np.float32,
)  # fmt: skip
_BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2


def rounded_to_nf4(weights: Array) -> Array:
    """Each value replaced by the nearest level of its block, blocks running along the rows."""
    flat = weights.reshape(-1)
    padded = np.concatenate((flat, np.zeros(-len(flat) % BLOCK, np.float32))).reshape(-1, BLOCK)
    scale = np.abs(padded).max(axis=1, keepdims=True)
    nearest = np.searchsorted(_BETWEEN, padded / np.where(scale == 0, np.float32(1), scale))
    rounded: Array = (LEVELS[nearest] * scale).reshape(-1)[: len(flat)].reshape(weights.shape)
    return rounded


def quantized_names(targets: Targets) -> list[str]:
    """The stored matrices that bitsandbytes quantizes: the blocks' linear layers, not embedding, head or router."""
    return [
        stored
        for name, stored in targets.by_name.items()
        if (weight := targets.spec_of.get(name)) is not None
        and weight.gguf.startswith("blk.")
        and "ffn_gate_inp" not in weight.gguf
        and len(targets.tensors[stored].shape) == 2
    ]


def round_base(tensors: Mapping[str, SourceTensor], names: list[str]) -> dict[str, SourceTensor]:
    """The tensors with those of `names` rounded when they are read."""
    return {
        name: replace(tensor, read=partial(_read_rounded, tensor), dtype="F32", read_stored=None)
        if name in names
        else tensor
        for name, tensor in tensors.items()
    }


def _read_rounded(tensor: SourceTensor, k: int = 0, n: int = 1) -> Array:
    return rounded_to_nf4(tensor.read(k, n) if n > 1 else tensor.read())


def rounding_difference(targets: Targets, names: list[str]) -> float:
    """‖rounded − W‖ / ‖W‖ over all those tensors."""
    error = norm = 0.0
    for name in names:
        weights = targets.tensors[name].read()
        norm += float(np.vdot(weights, weights))
        difference = rounded_to_nf4(weights) - weights
        error += float(np.vdot(difference, difference))
    return float(np.sqrt(error / norm)) if norm else 0.0
