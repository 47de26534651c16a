"""The values a block of a ggml type can hold once its scales are chosen, and where its codes lie in the bytes.

A quantizer of ggml's chooses scales and codes together. Here the scales it chose stay and the codes are set anew: the
layouts (ggml-common.h) are facts of the format, and what a code stands for is asked of `gguf.quants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from converters.quantize.types import TYPE_IDS, block_size

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# ggml-common.h, kvalues_iq4nl
_IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclass(frozen=True)
class Grid:
    """How a type codes weights. n_codes: codes run from 0 to n_codes - 1. insert: sets all codes, uint8 (blocks,
    weights of a block), in bytes (blocks, bytes of a block). levels: what the codes stand for times the scale, float32
    (n_codes,); None where they are evenly spaced.
    """

    n_codes: int
    insert: Callable[[Bytes, Bytes], None]
    levels: Array | None = None


@dataclass(frozen=True)
class Values:
    """base + scale × code of every weight, or scale × levels[code]; float32 (blocks, weights of a block) each."""

    base: Array
    scale: Array


def values_of(type_name: str, blocks: Bytes) -> Values:
    """What codes stand for in these blocks, uint8 (blocks, bytes of a block), given the scales in them."""
    grid, probe = GRIDS[type_name], blocks.copy()
    codes = np.zeros((len(blocks), block_size(type_name)), np.uint8)
    grid.insert(probe, codes)
    base = decoded(type_name, probe)
    if grid.levels is not None:
        return Values(np.zeros_like(base), base / grid.levels[0])
    grid.insert(probe, codes + np.uint8(1))
    return Values(base, decoded(type_name, probe) - base)


def decoded(type_name: str, blocks: Bytes) -> Array:
    """The weights of blocks, float32 (blocks, weights of a block), as `gguf.quants` dequantizes them."""
    rows: Array = dequantize(blocks.reshape(1, -1), GGMLQuantizationType(TYPE_IDS[type_name]))
    return rows.reshape(len(blocks), -1)


def _nibbles(at: int) -> Callable[[Bytes, Bytes], None]:
    """Runs of 16 bytes from `at`, each with 16 codes in the low halves and the next 16 in the high ones."""
    return _halves(at, 16)


def _halves(at: int, run: int) -> Callable[[Bytes, Bytes], None]:
    def insert(blocks: Bytes, codes: Bytes) -> None:
        low_high = codes.reshape(len(codes), -1, 2, run) & 15
        packed = low_high[:, :, 0] | low_high[:, :, 1] << 4
        blocks[:, at : at + codes.shape[1] // 2] = packed.reshape(len(codes), -1)

    return insert


def _fifth_bits(at: int) -> Callable[[Bytes, Bytes], None]:
    """Q5_0, Q5_1: four bytes of fifth bits, one a weight in order, then the nibbles."""
    nibbles = _nibbles(at + 4)

    def insert(blocks: Bytes, codes: Bytes) -> None:
        nibbles(blocks, codes)
        blocks[:, at : at + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")

    return insert


def _q8_0(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = codes ^ 128  # code 0 is -128


def _planes(at: int, n_bits: int, codes: NDArray[np.integer[Any]], blocks: Bytes) -> None:
    """Codes of n_bits: bytes of runs of 32 weights, a byte holding as many runs as fit, the first in its low bits."""
    per_byte = 8 // n_bits
    runs = codes.reshape(len(codes), -1, per_byte, 32)
    packed = np.zeros((len(codes), runs.shape[1], 32), np.uint8)
    for k in range(per_byte):
        packed |= runs[:, :, k] << (k * n_bits)
    blocks[:, at : at + packed[0].size] = packed.reshape(len(codes), -1)


def _q2_k(blocks: Bytes, codes: Bytes) -> None:
    _planes(16, 2, codes, blocks)


def _q3_k(blocks: Bytes, codes: Bytes) -> None:
    _planes(0, 1, codes >> 2, blocks)
    _planes(32, 2, codes & 3, blocks)


def _q5_k(blocks: Bytes, codes: Bytes) -> None:
    _planes(16, 1, codes >> 4, blocks)
    _halves(48, 32)(blocks, codes)


def _q6_k(blocks: Bytes, codes: Bytes) -> None:
    _halves(0, 64)(blocks, codes)
    _planes(128, 2, codes >> 4, blocks)


GRIDS: Mapping[str, Grid] = {
    "Q4_0": Grid(16, _nibbles(2)),
    "Q4_1": Grid(16, _nibbles(4)),
    "Q5_0": Grid(32, _fifth_bits(2)),
    "Q5_1": Grid(32, _fifth_bits(4)),
    "Q8_0": Grid(256, _q8_0),
    "IQ4_NL": Grid(16, _nibbles(2), _IQ4_LEVELS),
    "IQ4_XS": Grid(16, _nibbles(8), _IQ4_LEVELS),
    "Q2_K": Grid(4, _q2_k),
    "Q3_K": Grid(8, _q3_k),
    "Q4_K": Grid(16, _halves(16, 32)),
    "Q5_K": Grid(32, _q5_k),
    "Q6_K": Grid(64, _q6_k),
}

# where each type keeps the float16 factors that all its values are linear in: a scale, and of some the minimum's
SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def scale_of(blocks: Bytes, at: int) -> Array:
    """A factor of each block, float32 (blocks,)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0].astype(np.float32)


def set_scale(blocks: Bytes, at: int, values: Array) -> None:
    """Set a factor in all blocks."""
    blocks[:, at : at + 2] = values.astype(np.float16)[:, None].view(np.uint8)


def unit_of(type_name: str, blocks: Bytes, at: int) -> Array:
    """The weights if this factor were 1 and the others 0, float32 (blocks, weights of a block)."""
    probe = blocks.copy()
    for field in SCALES[type_name]:
        set_scale(probe, field, np.full(len(probe), field == at, np.float32))
    return decoded(type_name, probe)
