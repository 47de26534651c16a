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

from converters.quantize.grids import (
    GRIDS,
    SCALES,
    Array,
    Bytes,
    Grid,
    decoded,
    scale_of,
    set_scale,
    unit_of,
    values_of,
)
from converters.quantize.types import TYPE_IDS, block_size
from edgellm.config import physical_cpu_count
from edgellm.native.ggml import quantize_rows

Doubles = NDArray[np.float64]

_ALIGN_DAMPING = 0.05  # of the mean diagonal; how far H is trusted where inputs hardly vary
DAMPING = 0.01
HEAD_DAMPING = 0.1  # of a head whose rows are also the tokens' embeddings: a plain error counts there as well
N_SWEEPS = 2  # more bring a percent
_F16_MAX = 65504.0
_SPAN = 128  # columns whose errors are carried over to the later ones together
_PANEL = 32  # columns whose errors are carried over one by one
_SLAB_ROWS = 1024  # at most: a span of them stays in the cache


def can_compensate(type_name: str) -> bool:
    """Whether the type's grid is known; the others are left to ggml's own quantizers."""
    return type_name in GRIDS


@dataclass(frozen=True)
class Fit:
    """What weights with the same inputs are rounded by. gram: H + λI. factor: U, upper triangular, with
    (H + λI)⁻¹ = UᵀU. moved: what the weights are multiplied by first, None to leave them. added: what they then get
    added, float32 (rows, columns), None for nothing. All float32.
    """

    gram: Array
    factor: Array
    moved: Array | None = None
    added: Array | None = None

    @property
    def importance(self) -> Array:
        """What an error in each column costs after the later columns have made up for what they can: 1 / U_jj²."""
        return np.ascontiguousarray(1 / np.square(np.diagonal(self.factor)))


def fit(gram: Array, cross: Array | None = None, missing: Array | None = None, damping: float = DAMPING) -> Fit:
    """From H = E[x xᵀ] of the inputs the quantized model sees; with C = E[x_f xᵀ], x_f the unquantized model's inputs,
    the weights are first moved to W (C + λI)(H + λI)⁻¹, which gives W x_f best. float32 (columns, columns) both.

    missing: E[e xᵀ], float32 (rows, columns), of what the outputs shall make up for besides. damping: λ of rounding,
    as a share of the mean diagonal.
    """
    moved = added = None
    if cross is not None:
        h, c = _damped(gram, _ALIGN_DAMPING), cross.astype(np.float64)
        c.flat[:: len(c) + 1] += h[0, 0] - gram[0, 0]
        moved = np.linalg.solve(h, c.T).T.astype(np.float32)
        if missing is not None:
            added = np.linalg.solve(h, missing.T.astype(np.float64)).T.astype(np.float32)
    damped = _damped(gram, damping)
    # from the Cholesky factor of H with rows and columns reversed
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    factor = np.triu(np.linalg.inv(lower[::-1, ::-1])).astype(np.float32)
    return Fit(damped.astype(np.float32), factor, moved, added)


def compensated(weights: Array, type_name: str, fitted: Fit, n_threads: int = 0, *, n_sweeps: int = N_SWEEPS) -> Bytes:
    """Bytes of the weights, float32 (rows, columns), in a type of GRIDS: uint8 (rows, bytes of a row).

    They don't depend on n_threads (0: all cores). n_sweeps: how often scales and codes are refitted after GPTQ.
    """
    if fitted.moved is not None:
        weights = weights @ fitted.moved
    if fitted.added is not None:
        weights = weights + fitted.added
    slabs = np.array_split(weights, 2 * -(-len(weights) // (2 * _SLAB_ROWS)))
    with ThreadPoolExecutor(n_threads or physical_cpu_count(), "compensate") as pool:
        return np.concatenate(list(pool.map(lambda slab: _slab(slab, type_name, fitted, n_sweeps), slabs)))


def spread_costs(gram: Array, damping: float = DAMPING) -> Array:
    """1 / U_jj² of `Fit`, float32 (columns,), without the rest of U."""
    lower = np.linalg.cholesky(_damped(gram, damping)[::-1, ::-1])
    return np.square(np.diagonal(lower))[::-1].astype(np.float32)


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


@dataclass(frozen=True)
class _Rows:
    """Rows on their way to a type, columns outermost as they are worked on column by column.

    wanted: the weights, float32 (columns, rows); values: those of the codes; codes: uint8. blocks: for each block of
    columns its bytes, uint8 (rows, bytes of a block).
    """

    grid: Grid
    type_name: str
    wanted: Array
    values: Array
    codes: Bytes
    blocks: list[Bytes]


def _slab(weights: Array, type_name: str, fitted: Fit, n_sweeps: int) -> Bytes:
    rows = _fed_back(np.ascontiguousarray(weights.T), type_name, fitted)
    for _ in range(n_sweeps):
        _sweep(rows, fitted.gram)
    return np.concatenate(rows.blocks, axis=1)


def _fed_back(wanted: Array, type_name: str, fitted: Fit) -> _Rows:
    """Round column by column, each column's error being carried over to the later ones: within a panel at once, to the
    rest of a span after each panel, to all others after each span.
    """
    factor, importance = fitted.factor, fitted.importance
    n_columns, n_block = len(wanted), block_size(type_name)
    rows = _Rows(GRIDS[type_name], type_name, wanted, np.empty_like(wanted), np.empty(wanted.shape, np.uint8), [])
    running = wanted.copy()
    errors = np.empty_like(wanted)
    span = max(_SPAN, n_block)
    for start in range(0, n_columns, span):
        stop = min(start + span, n_columns)
        for at in range(start, stop, n_block):
            ours = slice(at, at + n_block)
            blocks = quantize_rows(
                running[ours].T, TYPE_IDS[type_name], importance=importance[ours], n_threads=1
            )  # scales on the weights as they have become
            rows.blocks.append(blocks)
            steps = _Steps(type_name, blocks)
            for panel in _panels(at, at + n_block):
                _round_panel(rows, steps, at, panel, running, factor, errors)
                later = slice(panel.stop, stop)
                running[later] -= factor[panel, later].T @ errors[panel]
            rows.grid.insert(blocks, np.ascontiguousarray(rows.codes[ours].T))
        running[stop:] -= factor[start:stop, stop:].T @ errors[start:stop]
    return rows


def _panels(start: int, stop: int) -> list[slice]:
    return [slice(at, min(at + _PANEL, stop)) for at in range(start, stop, _PANEL)]


def _round_panel(
    rows: _Rows, steps: _Steps, block: int, panel: slice, running: Array, factor: Array, errors: Array
) -> None:
    """Leaves each column's error over U's diagonal in `errors`. block: its first column."""
    for j in range(panel.start, panel.stop):
        rows.codes[j], rows.values[j] = steps.nearest(j - block, running[j])
        errors[j] = (running[j] - rows.values[j]) / factor[j, j]
        running[j + 1 : panel.stop] -= factor[j, j + 1 : panel.stop, None] * errors[j]


def _sweep(rows: _Rows, gram: Array) -> None:
    """Go over all blocks once more: the scales that suit their codes best, then each code that suits the others best.
    No step makes (W - Q) H (W - Q)ᵀ larger.
    """
    n_columns, n_block = len(rows.wanted), block_size(rows.type_name)
    pull = gram @ (rows.wanted - rows.values)  # minus half the slope of the error
    span = max(_SPAN, n_block)
    for start in range(0, n_columns, span):
        stop = min(start + span, n_columns)
        before = rows.values[start:stop].copy()
        for at in range(start, stop, n_block):
            h = gram[at : at + n_block, at:stop]
            old = rows.values[at : at + n_block].copy()
            near = pull[at : at + n_block].copy()
            _refit(rows, at, h[:, :n_block], near)
            _recode(rows, at, h[:, :n_block], near)
            pull[at:stop] -= h.T @ (rows.values[at : at + n_block] - old)
        pull[stop:] -= gram[stop:, start:stop] @ (rows.values[start:stop] - before)


def _refit(rows: _Rows, at: int, gram: Array, pull: Array) -> None:
    """Least squares for a block's scales (and minimum) with its codes as they are."""
    n = len(gram)
    blocks = rows.blocks[at // n]
    fields = SCALES[rows.type_name]
    old = np.stack([scale_of(blocks, field) for field in fields])  # (fields, rows)
    units = np.stack([unit_of(rows.type_name, blocks, field).T for field in fields])  # (fields, columns, rows)
    slope = np.einsum("fcr,cr->fr", units, pull)
    through = np.stack([gram @ unit for unit in units])
    curve = np.einsum("fcr,gcr->rfg", through, units).astype(np.float64)
    size = np.trace(curve, axis1=1, axis2=2)[:, None, None] / len(fields)
    curve += (1e-6 * size + 1e-30) * np.eye(len(fields))
    step = np.linalg.solve(curve, slope.T.astype(np.float64)[..., None])[..., 0].T
    new = (old + step).astype(np.float32)
    new = np.where(np.abs(new) < _F16_MAX, new, old).astype(np.float16).astype(np.float32)
    change = (new - old).astype(np.float64)
    gain = 2 * (change * slope).sum(0) - np.einsum("fr,rfg,gr->r", change, curve, change)
    new = np.where(gain > 0, new, old)
    for field, values in zip(fields, new, strict=True):
        set_scale(blocks, field, values)
    values = decoded(rows.type_name, blocks).T
    pull -= gram @ (values - rows.values[at : at + n])
    rows.values[at : at + n] = values


def _recode(rows: _Rows, at: int, gram: Array, pull: Array) -> None:
    """Each column of a block in turn, rounded to what is best with all other columns as they are."""
    n = len(gram)
    steps = _Steps(rows.type_name, rows.blocks[at // n])
    values, codes = rows.values[at : at + n], rows.codes[at : at + n]
    for panel in _panels(0, n):
        before = values[panel].copy()
        for j in range(panel.start, panel.stop):
            codes[j], new = steps.nearest(j, values[j] + pull[j] / gram[j, j])
            pull[j + 1 : panel.stop] -= gram[j + 1 : panel.stop, j, None] * (new - values[j])
            values[j] = new
        pull[panel.stop :] -= gram[panel.stop :, panel] @ (values[panel] - before)
    rows.grid.insert(rows.blocks[at // n], np.ascontiguousarray(codes.T))


class _Steps:
    """A block's possible values for its scales, column by column."""

    def __init__(self, type_name: str, blocks: Bytes) -> None:
        values = values_of(type_name, blocks)
        self._grid = GRIDS[type_name]
        self._base, self._scale = np.ascontiguousarray(values.base.T), np.ascontiguousarray(values.scale.T)
        safe = np.where(self._scale == 0, 1, self._scale)
        self._inverse = np.where(self._scale == 0, 0, 1 / safe).astype(np.float32)
        self._codes = None if self._grid.levels is None else _code_table(self._grid.levels)

    def nearest(self, j: int, column: Array) -> tuple[Bytes, Array]:
        """Codes of the values next to a column's weights, and those values."""
        base, scale, inverse = self._base[j], self._scale[j], self._inverse[j]
        levels = self._grid.levels
        if levels is None or self._codes is None:
            rounded = np.rint((column - base) * inverse).clip(0, self._grid.n_codes - 1)
            return rounded.astype(np.uint8), base + scale * rounded
        halves = ((column * inverse + 128) * 2).clip(0, 511).astype(np.int16)
        codes = self._codes[halves]
        return codes, scale * levels[codes]


def _code_table(levels: Array) -> Bytes:
    """The code of the nearest level for every half from -128 on: integer levels have their borders at whole halves."""
    middles = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(middles, np.arange(512, dtype=np.float32) / 2 - 128, side="right").astype(np.uint8)
