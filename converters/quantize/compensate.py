"""Quantization that makes up for its own rounding errors, within the grids of ggml's types.

GPTQ (Frantar et al. 2023): column by column, the error of rounding one column is spread over the columns to come so
that the outputs change least on inputs with Gram matrix H. Before that the weights are moved to where the inputs that
the quantized model will really see give the unquantized model's outputs (GPTAQ, Li et al. 2025).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.quantize.grids import GRIDS, Array, Bytes, Grid, decoded, values_of
from converters.quantize.types import TYPE_IDS, block_size
from edgellm.config import physical_cpu_count
from edgellm.native.ggml import quantize_rows

Doubles = NDArray[np.float64]

_ALIGN_DAMPING = 0.05  # of the mean diagonal; how far H is trusted where inputs hardly vary
_DAMPING = 0.01
_SPAN = 128  # columns whose errors are carried over to the later ones together
_SLAB_ROWS = 512  # a span of them stays in the cache


def can_compensate(type_name: str) -> bool:
    """Whether the type's grid is known; the others are left to ggml's own quantizers."""
    return type_name in GRIDS


@dataclass(frozen=True)
class Fit:
    """What weights with the same inputs are rounded by. factor: U, upper triangular, with (H + λI)⁻¹ = UᵀU.
    importance: the diagonal of H. moved: what the weights are multiplied by first, None to leave them. All float32.
    """

    factor: Array
    importance: Array
    moved: Array | None = None


def fit(gram: Array, cross: Array | None = None) -> Fit:
    """From H = E[x xᵀ] of the inputs the quantized model sees; with C = E[x_f xᵀ], x_f the unquantized model's inputs,
    the weights are first moved to W (C + λI)(H + λI)⁻¹, which gives W x_f best. float32 (columns, columns) both.
    """
    moved = None
    if cross is not None:
        h, c = _damped(gram, _ALIGN_DAMPING), cross.astype(np.float64)
        c.flat[:: len(c) + 1] += h[0, 0] - gram[0, 0]
        moved = np.linalg.solve(h, c.T).T.astype(np.float32)
    # from the Cholesky factor of H with rows and columns reversed
    lower = np.linalg.cholesky(_damped(gram, _DAMPING)[::-1, ::-1])
    factor = np.triu(np.linalg.inv(lower[::-1, ::-1])).astype(np.float32)
    return Fit(factor, np.ascontiguousarray(np.diagonal(gram)), moved)


def compensated(weights: Array, type_name: str, fitted: Fit, n_threads: int = 0) -> Bytes:
    """Bytes of the weights, float32 (rows, columns), in a type of GRIDS: uint8 (rows, bytes of a row).

    They don't depend on n_threads (0: all cores).
    """
    if fitted.moved is not None:
        weights = weights @ fitted.moved
    slabs = [weights[start : start + _SLAB_ROWS] for start in range(0, len(weights), _SLAB_ROWS)]
    with ThreadPoolExecutor(n_threads or physical_cpu_count(), "compensate") as pool:
        return np.concatenate(list(pool.map(lambda slab: _slab(slab, type_name, fitted), slabs)))


def unpacked(type_name: str, packed: Bytes, n_columns: int) -> Array:
    """The weights of rows of a type, float32 (rows, columns)."""
    n_block_bytes = packed.shape[-1] * block_size(type_name) // n_columns
    return decoded(type_name, packed.reshape(-1, n_block_bytes)).reshape(*packed.shape[:-1], n_columns)


def error_of(weights: Array, rounded: Array, gram: Array) -> float:
    """tr(ΔW H ΔWᵀ): mean squared change of the outputs, summed over the rows."""
    delta = weights - rounded
    return float(np.einsum("rc,rc->", delta @ gram, delta, dtype=np.float64))


def _damped(gram: Array, damping: float) -> Doubles:
    h = gram.astype(np.float64)
    h.flat[:: len(h) + 1] += damping * np.diagonal(h).mean() + 1e-30
    return h


def _slab(weights: Array, type_name: str, fitted: Fit) -> Bytes:
    """Some rows. They are worked on column by column, so columns lie in one piece."""
    factor, importance = fitted.factor, fitted.importance
    n_columns, n_block = weights.shape[1], block_size(type_name)
    running, packed = np.ascontiguousarray(weights.T), []
    span = max(_SPAN, n_block)
    for start in range(0, n_columns, span):
        stop = min(start + span, n_columns)
        errors = np.empty((stop - start, len(weights)), np.float32)
        for at in range(start, stop, n_block):
            within = slice(at - start, at - start + n_block)
            packed.append(
                _block(running[at:stop], factor[at:stop, at:stop], importance[at:], type_name, errors[within])
            )
        running[stop:] -= factor[start:stop, stop:].T @ errors
    return np.concatenate(packed, axis=1)


def _block(running: Array, factor: Array, importance: Array, type_name: str, errors: Array) -> Bytes:
    """One block of each row: scales from ggml's quantizer, then codes column by column. Updates the later columns of
    `running` (columns, rows), leaves each column's error over U's diagonal in `errors`. Bytes: (rows, block's bytes).
    """
    n, grid = len(errors), GRIDS[type_name]
    blocks = quantize_rows(running[:n].T, TYPE_IDS[type_name], importance=importance[:n], n_threads=1)
    values = values_of(type_name, blocks)
    base, scale = np.ascontiguousarray(values.base.T), np.ascontiguousarray(values.scale.T)
    inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)).astype(np.float32)
    codes = np.empty((n, running.shape[1]), np.uint8)
    for j in range(n):
        codes[j], value = _nearest(grid, running[j], base[j], scale[j], inverse[j])
        errors[j] = (running[j] - value) / factor[j, j]
        running[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    grid.insert(blocks, np.ascontiguousarray(codes.T))
    return blocks


def _nearest(grid: Grid, column: Array, base: Array, scale: Array, inverse: Array) -> tuple[Bytes, Array]:
    """Codes of the grid's values next to a column's weights, and those values."""
    if grid.levels is None:
        rounded = np.rint((column - base) * inverse).clip(0, grid.n_codes - 1)
        return rounded.astype(np.uint8), base + scale * rounded
    middles = (grid.levels[1:] + grid.levels[:-1]) / 2
    codes = np.searchsorted(middles, column * inverse)
    return codes.astype(np.uint8), scale * grid.levels[codes]
