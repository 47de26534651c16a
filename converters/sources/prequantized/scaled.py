"""Weights stored one by one as FP8 or int8 with scales beside them: FP8 checkpoints, and compressed-tensors' share.

A weight W (…, rows, columns) has a scale for the whole tensor (one number), for each row, for each group of columns
(rows, groups), or for each block of rows × columns; the last block of a row or column may be cropped. value =
(q - zero) · scale. FP8: DeepSeek-V3's `weight_scale_inv` (arXiv 2412.19437 §3.3; despite its name a factor).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import SourceTensor
from converters.sources.prequantized.packed import (
    FLOATS,
    Array,
    Config,
    Restored,
    Tensors,
    by_rows,
    companion,
    part_of,
    read_groups,
    stored,
)
from converters.sources.safetensors_file import to_float32
from edgellm.errors import CheckpointError

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (*FLOATS, "F8_E8M0")
_SUFFIXES = ("_scale_inv", "_scale")
Blocks = tuple[int, int]


def restore(tensors: Tensors, config: Config) -> list[Restored]:
    """Every FP8 weight of an FP8 checkpoint; CheckpointError names what is missing or doesn't fit."""
    size = config.get("weight_block_size")
    blocks = (size[0], size[1]) if isinstance(size, list) and len(size) == 2 else None
    if blocks and not all(type(n) is int and n > 0 for n in blocks):
        raise CheckpointError(f"config.json has weight_block_size = {size!r}, expected two positive numbers")
    return [scaled(tensors, name, (blocks,), "FP8") for name, t in tensors.items() if t.dtype in _FP8]


def scaled(tensors: Tensors, name: str, blocks: tuple[Blocks | None, ...], method: str) -> Restored:
    """One weight and its scale, zero points and groups; `blocks` are the sizes the config speaks of."""
    weight = tensors[name]
    if len(weight.shape) < 2:
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}, but type {weight.dtype} is for matrices")
    scale_name = next((name + suffix for suffix in _SUFFIXES if name + suffix in tensors), name + _SUFFIXES[-1])
    scale = companion(tensors, scale_name, name, _SCALES)
    zero = tensors.get(f"{name}_zero_point")
    if zero and zero.shape != scale.shape:
        raise CheckpointError(f"tensor {zero.name} has shape {list(zero.shape)}, expected {list(scale.shape)}")
    g_idx = tensors.get(f"{name}_g_idx")
    block = _block(weight, scale, blocks)
    parts = tuple(t for t in (weight, scale, zero, g_idx) if t)
    read = partial(_read, weight, scale, zero, g_idx, block)
    n_bytes = sum(t.n_bytes for t in parts)
    tensor = SourceTensor(name, weight.shape, f"{method} {weight.dtype}", n_bytes, read)
    return Restored(tensor, tuple(t.name for t in parts))


def _block(weight: SourceTensor, scale: SourceTensor, hints: tuple[Blocks | None, ...]) -> Blocks:
    """Rows and columns that share one number of the scale."""
    *lead, n_rows, n_columns = weight.shape
    if all(size == 1 for size in scale.shape):
        return n_rows, n_columns
    if scale.shape in (tuple(lead), (*lead, 1), (*lead, 1, 1)) and lead:
        return n_rows, n_columns  # one number an expert
    if scale.shape in ((*lead, n_rows), (*lead, n_rows, 1)):
        return 1, n_columns
    if len(scale.shape) == len(weight.shape) and scale.shape[:-2] == tuple(lead) and all(scale.shape):
        grid = scale.shape[-2:]
        for hint in hints:
            if hint and (-(-n_rows // hint[0]), -(-n_columns // hint[1])) == grid:
                return hint
        if n_rows % grid[0] == 0 and n_columns % grid[1] == 0:
            return n_rows // grid[0], n_columns // grid[1]
    raise CheckpointError(
        f"tensor {scale.name} has shape {list(scale.shape)}, which fits no scaling of {list(weight.shape)}"
    )


def _read(
    weight: SourceTensor,
    scale: SourceTensor,
    zero: SourceTensor | None,
    g_idx: SourceTensor | None,
    block: Blocks,
    k: int = 0,
    n: int = 1,
) -> Array:
    *lead, n_rows, n_columns = weight.shape
    raw = stored(weight, k, n)
    shape = raw.shape
    raw = raw.reshape(-1, n_columns)
    n_stacked = int(np.prod(lead, dtype=np.int64))
    # of one matrix or of all experts' matrices, one below the other
    factors = _grid(scale.read(), n_stacked, n_rows, block)
    zeros = None if zero is None else _grid(zero.read(), n_stacked, n_rows, block)
    column = read_groups(g_idx, n_columns, factors.shape[1]) if g_idx else np.arange(n_columns) // block[1]
    grid_rows = -(-n_rows // block[0])
    first, last = part_of(n_stacked * n_rows, k, n)

    def rows(start: int, stop: int) -> Array:
        at = np.arange(start, stop)
        of_row = at // n_rows * grid_rows + at % n_rows // block[0]
        values = to_float32(raw[start - first : stop - first], weight.dtype)
        if zeros is not None:
            values -= _expand(zeros[of_row], column)
        values *= _expand(factors[of_row], column)
        return values

    return by_rows(first, last, n_columns, rows).reshape(shape)


def _grid(factors: Array, n_stacked: int, n_rows: int, block: Blocks) -> Array:
    """(grid rows of all matrices, grid columns)."""
    n = n_stacked * -(-n_rows // block[0])
    return np.broadcast_to(factors.reshape(-1, 1), (n, 1)) if factors.size in (1, n) else factors.reshape(n, -1)


def _expand(factors: Array, column: NDArray[Any]) -> Array:
    return factors if factors.shape[1] == 1 else np.take(factors, column, axis=1)
