"""Changes that are no low-rank product (DoRA, replaced matrices), as the nearest one of a given rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from converters.adapters.merge import Changes, changed_tensor
from converters.adapters.methods import Change, Factors
from converters.adapters.targets import Targets
from converters.architectures.spec import Array

DEFAULT_RANK = 64
_ENOUGH = 0.9999  # of the squared norm: more rank than that takes only makes the file larger


@dataclass(frozen=True)
class Approximation:
    """How much of the change a rank holds: kept is the share of the squared norm, over all tensors."""

    rank: int
    n_tensors: int
    kept: float


def approximate(changes: Changes, targets: Targets, rank: int) -> tuple[Changes, Approximation | None]:
    """Every matrix's change as factors: exact ones stay, the others are cut to `rank`. Vectors stay as they are."""
    made: Changes = {}
    kept = total = 0.0
    n_cut = largest = 0
    for name, several in changes.items():
        is_matrix = len(targets.tensors[name].shape) == 2
        if not is_matrix or all(change.factors is not None for change in several):
            made[name] = several
            continue
        left, right, share, norm = _cut(_difference(name, several, targets), rank)
        made[name] = [_as_change(several, left, right)]
        kept, total = kept + share, total + norm
        n_cut, largest = n_cut + 1, max(largest, left.shape[1])
    return made, Approximation(largest, n_cut, kept / total if total else 1.0) if n_cut else None


def _difference(name: str, several: list[Change], targets: Targets) -> Array:
    """Outputs first."""
    tensor = targets.tensors[name]
    transposed = name in targets.transposed
    difference = changed_tensor(tensor, several, transposed).read() - tensor.read()
    return difference.T if transposed else difference


def _cut(difference: Array, rank: int) -> tuple[Array, Array, float, float]:
    """The best factors of at most `rank` (Eckart & Young 1936), what they hold of the squared norm, and all of it.

    Through the eigenvectors of the smaller Gram matrix: of a long matrix that is far quicker than an SVD.
    """
    wide = difference.shape[0] <= difference.shape[1]
    matrix = difference.astype(np.float64) if wide else difference.T.astype(np.float64)
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    norm = float(values.sum())
    enough = int(np.searchsorted(np.cumsum(values), _ENOUGH * norm)) + 1 if norm else 1
    n = max(1, min(rank, enough, len(values)))
    left, right = vectors[:, :n], vectors[:, :n].T @ matrix
    if not wide:
        left, right = right.T, left.T
    return left.astype(np.float32), right.astype(np.float32), float(values[:n].sum()), norm


def _as_change(several: list[Change], left: Array, right: Array) -> Change:
    def factors() -> Factors:
        return left, right

    return replace(several[-1], factors=factors)
