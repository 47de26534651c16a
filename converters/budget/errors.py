"""What each tensor would lose in each type, expected from the inputs' Gram matrices without compensating anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from converters.plan import PlannedTensor
from converters.produce import load_whole
from converters.quantize.compensate import DAMPING, can_compensate, compensated, error_of, fit, spread_costs, unpacked
from converters.quantize.gram import Gram
from converters.quantize.grids import Array
from converters.quantize.types import TYPE_IDS
from edgellm.native.ggml import quantize_rows

_N_ROWS = 128  # of a matrix; a sample of them tells enough
_N_EXPERTS = 4
_N_TRIED = 64  # rows that are compensated to see what that brings


def matrices(tensor: PlannedTensor, sizes: dict[str, int]) -> Array:
    """A tensor's weights, float32 (matrices, rows, columns); one matrix, or one an expert."""
    return load_whole(tensor, sizes).reshape(-1, *tensor.shape[-2:])


def expected_errors(
    weights: Array,
    grams: Sequence[Array] | None,
    type_names: Sequence[str],
    damping: float = DAMPING,
    n_threads: int = 0,
) -> dict[str, float]:
    """tr(ΔW H ΔWᵀ), summed over the matrices, after compensation in each type.

    weights: float32 (matrices, rows, columns); grams: H of the columns, diagonal blocks of float32 (matrices, width,
    width); without them a plain sum of squares. GPTQ's loss is Σ_j err_j² / U_jj² (Frantar et al. 2023), err_j being
    the rounding errors of weights that have been moved, which are as large as those of weights that haven't.
    """
    found = dict.fromkeys(type_names, 0.0)
    chosen = np.unique(np.linspace(0, len(weights) - 1, min(len(weights), _N_EXPERTS)).astype(int))
    for e in chosen:
        rows = weights[e][:: max(1, weights.shape[1] // _N_ROWS)]
        costs = _costs(grams, e, weights.shape[2], damping)
        share = weights.shape[1] / len(rows) * len(weights) / len(chosen)
        for type_name in type_names:
            packed = quantize_rows(rows, TYPE_IDS[type_name], importance=costs, n_threads=n_threads)
            delta = rows - unpacked(type_name, packed, rows.shape[1])
            found[type_name] += share * float(np.square(delta).sum(axis=0, dtype=np.float64) @ costs)
    return found


def refinement(
    weights: Array,
    grams: Sequence[Array] | None,
    type_names: Sequence[str],
    damping: float = DAMPING,
    n_threads: int = 0,
) -> dict[str, float]:
    """Type → what compensation really leaves of `expected_errors`, seen on some rows of one matrix.

    The sweeps after GPTQ aren't in its formula, and bring more in finer types. Arguments as for `expected_errors`.
    """
    found = dict.fromkeys(type_names, 1.0)
    if grams is None or not all(block[0].any() for block in grams):
        return found
    rows = np.ascontiguousarray(weights[0][:: max(1, weights.shape[1] // _N_TRIED)])
    expected = expected_errors(rows[None], grams, type_names, damping, n_threads)
    fits, at = [], 0
    for block in grams:
        fits.append((slice(at, at + block.shape[-1]), block[0], fit(block[0], damping=damping)))
        at += block.shape[-1]
    for type_name in filter(can_compensate, type_names):
        left = 0.0
        for columns, gram, fitted in fits:
            ours = np.ascontiguousarray(rows[:, columns])
            packed = compensated(ours, type_name, fitted, n_threads)
            left += error_of(ours, unpacked(type_name, packed, ours.shape[1]), gram)
        if expected[type_name] > 0:
            found[type_name] = left / expected[type_name]
    return found


def plain_error(weights: Array, rounded: Array, grams: Sequence[Array] | None) -> float:
    """tr(ΔW H ΔWᵀ) of weights that were rounded, float32 (matrices, rows, columns), summed over the matrices."""
    if grams is None:
        return float(np.square(weights - rounded).sum(dtype=np.float64))
    total, at = 0.0, 0
    for block in grams:
        columns = slice(at, at + block.shape[-1])
        at += block.shape[-1]
        total += sum(error_of(w[:, columns], r[:, columns], h) for w, r, h in zip(weights, rounded, block, strict=True))
    return total


def grams_of(gram: Gram, name: str) -> list[Array] | None:
    """H of a weight's inputs as `expected_errors` takes it, None for a weight that nothing is multiplied with."""
    return gram.blocks(name) if name in gram.inputs else None


def importance_of(grams: Sequence[Array] | None, matrix: int, n_columns: int) -> Array:
    """The diagonal of H, float32 (columns,)."""
    if grams is None:
        return np.ones(n_columns, np.float32)
    return np.concatenate([np.diagonal(block[matrix]) for block in grams]).astype(np.float32)


def _costs(grams: Sequence[Array] | None, matrix: int, n_columns: int, damping: float) -> Array:
    if grams is None:
        return np.ones(n_columns, np.float32)
    parts = []
    for block in grams:
        diagonal = np.diagonal(block[matrix])
        parts.append(spread_costs(block[matrix], damping) if diagonal.any() else np.ones(len(diagonal), np.float32))
    return np.concatenate(parts)
